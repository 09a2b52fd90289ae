"""An Entry: one image of the finished data set, with its target, its pairs and its split; and the Record it becomes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

from data_gen.core.items import Item, Pair
from data_gen.ledger.screening import Screened
from data_gen.publishing.splits import Split, split_items
from medisee.foundation.files import safe_name
from medisee.records.masks import Box
from medisee.records.records import Record, Target, Turn
from medisee.sources.mlmr_sd import Question, worded

_SHARED = ("id", "question", "answer", "perspective", "length", "author")  # fields of pairs and questions


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of the data set."""

    item: Item  # the image and its target
    split: Split
    name: str  # its file name without suffix, unique
    pairs: tuple[Screened, ...]  # in the order of conversations, turns and ids

    @property
    def image(self) -> str:
        """The image's path in the data set."""
        suffix = PurePosixPath(self.item.image).suffix.lower()
        return f"images/{self.name}{suffix if re.fullmatch(r'[.][a-z0-9]{1,8}', suffix) else ''}"

    @property
    def mask(self) -> str:
        """The mask's path in the data set."""
        return f"masks/{self.name}.png"

    @property
    def box(self) -> Box:
        """The box in pixels of the image, half-open."""
        x0, y0, x1, y1 = self.item.box
        width, height = self.item.width, self.item.height
        # Rounding removes what dividing and multiplying left: pixels are whole, or were given to few places.
        return round(x0 * width, 3), round(y0 * height, 3), round(x1 * width, 3), round(y1 * height, 3)

    @property
    def questions(self) -> list[Question]:
        """What asks for the target; see `questions_of`."""
        return questions_of((one.pair for one in self.pairs), self.item.category, image=self.image, mask=self.mask)

    def record(self, seed: int) -> Record:
        """Returns the entry as training and evaluation read it; the seed draws the words around questions and answers."""
        item = self.item
        qa = tuple(worded(question, seed) for question in self.questions)
        target = Target(id=item.target, category=item.category, mask=self.mask, box=self.box, qa=qa)
        return Record(
            id=item.record,
            image=self.image,
            modality=item.modality,
            source=item.source,
            case=item.case,
            targets=(target,),
        )


def entries(items: Iterable[Item], pairs: Iterable[Screened], seed: int) -> list[Entry]:
    """Gives each image one target with its pairs, and a split: train, then val, then test, each by the items' ids.

    Items without pairs are skipped. Of two items of one image the one with more pairs stays, then the first.
    """
    of_item: dict[str, list[Screened]] = {}
    for one in sorted(pairs, key=lambda one: in_turns(one.pair)):
        of_item.setdefault(one.pair.item, []).append(one)
    with_pairs = sorted((item for item in items if item.id in of_item), key=lambda item: item.id)
    best: dict[str, Item] = {}
    for item in sorted(with_pairs, key=lambda item: -len(of_item[item.id])):
        best.setdefault(item.image, item)
    names = _names(item for item in with_pairs if best[item.image] is item)
    splits = split_items((item for item in with_pairs if item.id in names), seed)
    return [
        Entry(item, split, names[item.id], tuple(of_item[item.id]))
        for split, listed in splits.items()
        for item in listed
    ]


def in_turns(pair: Pair) -> tuple[str, int, str]:
    """Sorts pairs by conversation, turn and id."""
    return pair.conversation or "", pair.turn, pair.id


def questions_of(pairs: Iterable[Pair], category: str, *, image: str = "", mask: str = "") -> list[Question]:
    """Returns what asks for the target: a conversation is one question, its last, with the turns before it.

    The pairs are those of one item, sorted by `in_turns`; `image` and `mask` are paths in the data set.
    """
    questions: list[Question] = []
    for _, turns in groupby(pairs, key=lambda pair: pair.conversation or pair.id):
        *earlier, last = turns
        shared = {name: getattr(last, name) for name in _SHARED}
        history = tuple(Turn(turn.question, turn.answer) for turn in earlier)
        questions.append(Question(image=image, mask=mask, category=category, history=history, **shared))
    return questions


def _names(items: Iterable[Item]) -> dict[str, str]:
    """Makes file names of the records' ids."""
    taken: set[str] = set()
    return {item.id: safe_name(item.record, taken, only_ascii=True) for item in items}
