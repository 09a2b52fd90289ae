"""One reviewer's work on a ledger: which pairs are shown, and what a decision, an edit or an undo does."""

from __future__ import annotations

import hashlib
import math
import threading
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_gen.core.items import Decision, Item, Pair
from data_gen.core.pictures import image_png, mask_png
from data_gen.ledger.ledger import Ledger
from data_gen.ledger.screening import agreements
from data_gen.rules import checks as rules
from medisee.foundation.errors import InputError

_SHOWN = ("category", "modality", "source", "case", "width", "height", "box")  # what the page shows of an item


class Refused(Exception):
    """A request that is not carried out: the HTTP status and the JSON that the page is sent."""

    def __init__(self, status: int, **content: Any) -> None:
        self.status, self.content = status, content
        super().__init__(str(content))


class DecisionBody(BaseModel):
    """What the page sends about a pair."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    pair: str
    verdict: Literal["accept", "reject", "edit"]
    reason: str = Field(default="", max_length=500)
    question: str = Field(default="", max_length=2000)
    answer: str = Field(default="", max_length=2000)


class ReviewSession:
    """What the page's requests mean. Every method may be called in any thread and may raise Refused or InputError."""

    def __init__(self, ledger: Ledger, reviewer: str, *, share: float = 1.0, seed: int = 0) -> None:
        """Draws a share of the items that have pairs, by a hash of seed and id: a larger share contains a smaller one.

        The ledger must hold a pair whose words are final.
        """
        self._ledger, self._reviewer, self._names, self._root = ledger, reviewer, ledger.names(), ledger.root()
        self._lock = threading.Lock()
        self._of_item: dict[str, list[Pair]] = {}
        # The other pairs may still be rewritten under the same id.
        for pair in ledger.pairs_in("kept"):
            self._of_item.setdefault(pair.item, []).append(pair)
        items = [item for item in ledger.items() if item.id in self._of_item]
        if not items:
            reason = (
                "holds no pair to review"
                if ledger.is_deduplicated()
                else "its pairs have not been compared with each other"
            )
            raise InputError(f"{ledger.path}: {reason}; let `python -m data_gen run` finish first.")
        ranked = sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item.id}".encode()).hexdigest())
        self._items = ranked[: math.ceil(share * len(ranked))]
        self._number = {item.id: number for number, item in enumerate(self._items)}
        self._pairs = {pair.id: pair for item in self._items for pair in self._of_item[item.id]}
        self.total = len(self._pairs)  # to review
        self._mine = self._read_mine()

    @property
    def done(self) -> int:
        """How many pairs this reviewer has judged."""
        return len(self._mine)

    def _read_mine(self) -> dict[str, Decision]:
        decisions = self._ledger.decisions()
        return {one.pair: one for one in decisions if one.reviewer == self._reviewer and one.pair in self._pairs}

    def state(self) -> dict[str, Any]:
        """Returns who reviews, the counts, and the numbers of the items with an open pair."""
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
            **{name: getattr(item, name) for name in _SHOWN},
            "others": sorted({entity.category for entity in item.entities} - {item.category}),
            "pairs": pairs,
        }

    def picture(self, number: int, kind: str) -> bytes:
        """Returns an item's image, or its mask to lay over it, as PNG."""
        return (image_png if kind == "image" else mask_png)(self._find(number), self._root)

    def decide(self, body: Any) -> dict[str, Any]:
        """Stores a decision; it is on the disk when this returns. Edited words must keep the rules."""
        try:
            given = DecisionBody.model_validate(body)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            raise Refused(400, error="; ".join(problems)) from error
        pair = self._pairs.get(given.pair)
        if pair is None:
            raise Refused(404, error="this pair is not among those to review; reload the page")
        decision = self._decision(given, pair)
        with self._lock:
            self._ledger.decide(decision)
            self._mine[pair.id] = decision
            return {"done": self.done, "mine": asdict(decision)}

    def _decision(self, given: DecisionBody, pair: Pair) -> Decision:
        reason, question, answer = (" ".join(text.split()) for text in (given.reason, given.question, given.answer))
        if given.verdict == "reject" and not reason:
            raise Refused(422, error="a rejection needs a reason")
        if given.verdict != "edit":
            return Decision(pair.id, self._reviewer, given.verdict, reason)
        if (question, answer) == (pair.question, pair.answer):
            raise Refused(422, error="nothing was changed: accept it instead")
        item = self._items[self._number[pair.item]]
        turns = [each.turn for each in self._of_item[item.id] if each.conversation == pair.conversation]
        if pair.conversation is not None and pair.turn < max(turns):  # only the last turn asks for the target
            breaches = rules.check_turn(question, answer, item, self._names)
        else:
            breaches = rules.check_pair(question, answer, pair.length, item, self._names)
        if breaches:
            raise Refused(422, breaches=[asdict(breach) for breach in breaches])
        return Decision(pair.id, self._reviewer, "edit", reason, question, answer)

    def undo(self) -> dict[str, Any]:
        """Takes this reviewer's last decision back and says where it was."""
        with self._lock:
            decision = self._ledger.undo(self._reviewer)
            if decision is None:
                raise Refused(422, error="there is nothing to undo")
            self._mine = self._read_mine()
            pair = self._pairs.get(decision.pair)
            number = self._number[pair.item] if pair else None
            return {"done": self.done, "pair": decision.pair, "item": number, "verdict": decision.verdict}

    def _find(self, number: int) -> Item:
        if number >= len(self._items):
            raise Refused(404, error=f"there are only {len(self._items)} images")
        return self._items[number]


def _place(pair: Pair) -> tuple[str, int, str, str, bool, str]:
    """Orders conversations by turn, other pairs by template and perspective, the short wording before the long one."""
    is_long = pair.length == "long"
    return pair.conversation or "", pair.turn, pair.template, pair.perspective, is_long, pair.id
