"""Screening by people: a local page that shows each image with its target and asks about every pair. Run it as

  python -m data_gen review --ledger data/mlmr_sd/ledger.sqlite --reviewer anna
  python -m data_gen review --ledger data/mlmr_sd/ledger.sqlite --reviewer ben --share 0.1     a tenth of the images

Open the address that it prints. Every decision is in the ledger before the page goes on, so stop whenever you like and
start again with the same name. Shown are the pairs whose words are final, as a run leaves them at its end. Two
reviewers with the same --share and --seed see the same pairs, neither sees what the other said, and the page shows how
far they agree (raw and Cohen's kappa). `python -m data_gen export` says what becomes of pairs that they see differently.

Keys: a accept, r reject with a reason, e edit, u undo, arrows move, m and b hide mask and box, ? help.

The page is reachable from this machine only (127.0.0.1) and with the token of this run only.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_gen.core.items import Decision, Item, Pair
from data_gen.core.pictures import image_png, mask_png
from data_gen.ledger.agreement import agreements
from data_gen.ledger.ledger import Ledger
from data_gen.publishing.review_server import Refused, ReviewServer
from data_gen.rules import checks as rules
from medisee.foundation.errors import InputError

_LONGEST_NAME = 64


class DecisionBody(BaseModel):
    """What the page sends about a pair."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    pair: str
    verdict: Literal["accept", "reject", "edit"]
    reason: str = Field(default="", max_length=500)
    question: str = Field(default="", max_length=2000)
    answer: str = Field(default="", max_length=2000)


class ReviewSession:
    """One reviewer's work on a ledger: what the page's requests mean. Every method may be called in any thread."""

    def __init__(self, ledger: Ledger, reviewer: str, *, share: float = 1.0, seed: int = 0) -> None:
        """Draws the items to review.

        Args:
            ledger: where pairs come from and decisions go.
            reviewer: the name that decisions are kept under.
            share: of the items that have pairs, chosen by a hash of the seed and the id: a larger share holds a
                smaller one.
            seed: of the choice.

        Raises:
            InputError: the ledger holds no pair whose words are final.
        """
        self._ledger, self._reviewer, self._names = ledger, reviewer, ledger.names()
        self._root = ledger.root()
        self._lock = threading.Lock()
        self._of_item: dict[str, list[Pair]] = {}
        # The others may still be put in other words, under the same id.
        for pair in ledger.pairs_in("kept"):
            self._of_item.setdefault(pair.item, []).append(pair)
        items = [item for item in ledger.items() if item.id in self._of_item]
        if not items and not ledger.settled():
            raise InputError(
                f"{ledger.path}: its pairs have not been compared with each other, so their words may change; let the "
                "same `python -m data_gen run` come to its end first."
            )
        if not items:
            raise InputError(f"{ledger.path}: holds no pair to review; make some with `python -m data_gen run`.")
        ranked = sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item.id}".encode()).hexdigest())
        self._items = ranked[: math.ceil(share * len(ranked))]
        self._number = {item.id: number for number, item in enumerate(self._items)}
        self._pairs = {pair.id: pair for item in self._items for pair in self._of_item[item.id]}
        self._mine = self._read_mine()

    def _read_mine(self) -> dict[str, Decision]:
        decisions = self._ledger.decisions()
        return {one.pair: one for one in decisions if one.reviewer == self._reviewer and one.pair in self._pairs}

    @property
    def total(self) -> int:
        """How many pairs there are to review."""
        return len(self._pairs)

    @property
    def done(self) -> int:
        """How many of them this reviewer has judged."""
        return len(self._mine)

    def state(self) -> dict[str, Any]:
        """Returns who reviews, how far, and the first item with an open pair."""
        with self._lock:
            return {
                "reviewer": self._reviewer,
                "items": len(self._items),
                "pairs": self.total,
                "done": self.done,
                "open": [
                    number
                    for number, item in enumerate(self._items)
                    if any(pair.id not in self._mine for pair in self._of_item[item.id])
                ],
            }

    def agreement(self) -> dict[str, Any]:
        """Returns how far this reviewer agrees with each other one."""
        found = agreements(self._ledger.decisions())
        return {"agreement": [asdict(one) for one in found if self._reviewer in (one.first, one.second)]}

    def item(self, number: int) -> dict[str, Any]:
        """Returns an item's facts, its pairs and this reviewer's own decisions about them."""
        item = self._find(number)
        with self._lock:
            pairs = [
                {**asdict(pair), "mine": asdict(self._mine[pair.id]) if pair.id in self._mine else None}
                for pair in sorted(self._of_item[item.id], key=_place)
            ]
        return {
            "number": number,
            "category": item.category,
            "modality": item.modality,
            "source": item.source,
            "case": item.case,
            "width": item.width,
            "height": item.height,
            "box": item.box,
            "others": sorted({entity.category for entity in item.entities} - {item.category}),
            "pairs": pairs,
        }

    def picture(self, number: int, kind: str) -> bytes:
        """Returns an item's image, or its mask to lay over it, as PNG."""
        item = self._find(number)
        return (image_png if kind == "image" else mask_png)(item, self._root)

    def decide(self, body: Any) -> dict[str, Any]:
        """Stores a decision; it is on the disk when this returns. Edited words must keep the rules."""
        try:
            given = DecisionBody.model_validate(body)
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            raise Refused(HTTPStatus.BAD_REQUEST, error=told) from error
        pair = self._pairs.get(given.pair)
        if pair is None:
            raise Refused(HTTPStatus.NOT_FOUND, error="this pair is not among those to review; reload the page")
        decision = self._decision(given, pair)
        with self._lock:
            self._ledger.decide(decision)
            self._mine[pair.id] = decision
            return {"done": self.done, "mine": asdict(decision)}

    def _decision(self, given: DecisionBody, pair: Pair) -> Decision:
        reason, question, answer = (" ".join(text.split()) for text in (given.reason, given.question, given.answer))
        if given.verdict == "reject" and not reason:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, error="a rejection needs a reason")
        if given.verdict != "edit":
            return Decision(pair.id, self._reviewer, given.verdict, reason)
        if (question, answer) == (pair.question, pair.answer):
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, error="nothing was changed: accept it instead")
        item = self._items[self._number[pair.item]]
        if breaches := self._breaches(replace(pair, question=question, answer=answer), item):
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, breaches=[asdict(breach) for breach in breaches])
        return Decision(pair.id, self._reviewer, "edit", reason, question, answer)

    def _breaches(self, pair: Pair, item: Item) -> list[rules.Breach]:
        turns = [each.turn for each in self._of_item[item.id] if each.conversation == pair.conversation]
        if pair.conversation is not None and pair.turn < max(turns):  # the last turn alone asks for the target
            return rules.check_turn(pair.question, pair.answer, item, self._names)
        return rules.check_pair(pair.question, pair.answer, pair.length, item, self._names)

    def undo(self) -> dict[str, Any]:
        """Takes this reviewer's last decision back and says where it was."""
        with self._lock:
            taken = self._ledger.undo(self._reviewer)
            if taken is None:
                raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, error="there is nothing to undo")
            self._mine = self._read_mine()
            pair = self._pairs.get(taken.pair)
            return {
                "done": self.done,
                "pair": taken.pair,
                "item": self._number[pair.item] if pair else None,
                "verdict": taken.verdict,
            }

    def _find(self, number: int) -> Item:
        if number >= len(self._items):
            raise Refused(HTTPStatus.NOT_FOUND, error=f"there are {len(self._items)} images only")
        return self._items[number]


def _place(pair: Pair) -> tuple[str, int, str, str, bool, str]:
    """Conversations by turns; else by template and perspective, the short wording before the long one."""
    is_long = pair.length == "long"
    return pair.conversation or "", pair.turn, pair.template, pair.perspective, is_long, pair.id


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the page until Ctrl-C."""
    arguments = _parser().parse_args(argv)
    _check_arguments(arguments)
    with Ledger(arguments.ledger) as ledger:
        api = ReviewSession(ledger, arguments.reviewer, share=arguments.share, seed=arguments.seed)
        with ReviewServer(api, arguments.port) as server:
            print(f"{api.done} of {api.total} pairs are judged by {arguments.reviewer}. Open\n\n  {server.url}\n")
            print("Ctrl-C ends; nothing is lost.", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(f"\n{api.done} of {api.total} pairs are judged by {arguments.reviewer}.")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_gen review", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--ledger", type=Path, required=True, help="the ledger that `run` wrote")
    add("--reviewer", required=True, metavar="NAME", help="whose decisions these are; kept in the ledger")
    add("--share", type=float, default=1.0, help="of the images to review, above 0 up to 1 (default: 1)")
    add("--seed", type=int, default=0, help="of the choice of these images (default: 0)")
    add("--port", type=int, default=8765, help="of the page; 0 takes a free one (default: 8765)")
    return parser


def _check_arguments(arguments: argparse.Namespace) -> None:
    problems = []
    name = arguments.reviewer
    if not name.strip() or name != name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        problems.append(
            f"--reviewer {name!r}: expected a name of 1 to {_LONGEST_NAME} printable characters; give another."
        )
    if not 0 < arguments.share <= 1:
        problems.append(f"--share {arguments.share}: expected a number above 0 up to 1; correct it.")
    if not 0 <= arguments.port <= 65535:
        problems.append(f"--port {arguments.port}: expected 0 to 65535; correct it.")
    if problems:
        raise InputError(problems)
