"""The numbers behind Figure 4 and its company: what a data set asks about, in how many words, from which perspective."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_gen.core.items import LENGTHS, PERSPECTIVES
from data_gen.ledger.ledger import Ledger
from data_gen.ledger.screening import screen
from data_gen.publishing.summary import authorship, dropped
from medisee.foundation.errors import InputError
from medisee.records.records import SPLITS
from medisee.sources.mlmr_sd import read_release


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and its answer, bare, with what they are about; an earlier turn does not ask for the target yet."""

    category: str
    perspective: str
    length: str
    question: str
    answer: str
    is_earlier_turn: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A data set in numbers.

    Attributes:
        author: who wrote the texts: "models", "offline" or "models and offline".
        images: how many images each category has, the most frequent first.
        pairs: how many question-answer pairs each category has, in the same order.
        cells: how many pairs there are of each perspective and length, as "attribute short". Here and in the numbers
            of words the earlier turns of conversations do not count, since they do not ask for the target.
        question_words: how many questions have so many words, by length.
        answer_words: how many answers have so many words.
        words: how often each word stands in a question.
        dropped: how many pairs or items each rule took out.
        faults: how often each rule objected to an answer, what was mended later included; known from a ledger only.
        calls: what each stage asked of each model, with tokens and price; known from a ledger only.
    """

    author: str
    images: dict[str, int]
    pairs: dict[str, int]
    cells: dict[str, int]
    question_words: dict[str, dict[int, int]]
    answer_words: dict[int, int]
    words: dict[str, int]
    dropped: dict[str, int]
    faults: dict[str, int] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)


def statistics_of_ledger(ledger: Ledger) -> Statistics:
    """Counts what an export of a ledger would hold, as people have decided so far.

    Raises:
        InputError: there is no pair.
    """
    items = {item.id: item for item in ledger.items()}
    candidates = ledger.pairs()
    pairs = [one.pair for one in screen(candidates, ledger.decisions()).pairs]
    if not pairs:
        raise InputError(f"{ledger.path}: holds no pair; make some with `python -m data_gen run`.")
    images = Counter(items[item].category for item in {pair.item for pair in pairs})
    last: dict[str, int] = {}
    for pair in (pair for pair in pairs if pair.conversation):
        last[pair.conversation or ""] = max(pair.turn, last.get(pair.conversation or "", 0))
    return _statistics(
        images,
        [
            Asked(
                items[pair.item].category,
                pair.perspective,
                pair.length,
                pair.question,
                pair.answer,
                pair.conversation is not None and pair.turn < last[pair.conversation],
            )
            for pair in pairs
        ],
        author=authorship(pairs),
        dropped={one.rule: one.count for one in dropped(ledger.drops(), len(candidates))},
        faults=ledger.faults(),
        calls=[
            {
                "stage": count.stage,
                "model": count.model,
                "requests": count.requests,
                "answers": count.answers,
                "tokens in": count.usage_in,
                "tokens out": count.usage_out,
                "US dollars": round(count.price, 4),
            }
            for count in ledger.counts()
        ],
    )


def statistics_of_export(folder: Path, facts: dict[str, Any]) -> Statistics:
    """Counts what an exported data set holds.

    Args:
        folder: what `python -m data_gen export` wrote.
        facts: the content of its data.json.

    Raises:
        InputError: files are missing or wrong.
    """
    images: Counter[str] = Counter()
    asked: list[Asked] = []
    for path in (folder / "release" / f"{split}.json" for split in SPLITS):
        if not path.is_file():
            continue
        release = read_release(path, folder)
        images.update(category for masks in release.classes.values() for category in masks.values())
        for one in release.questions:
            about = one.category, one.perspective, one.length
            asked += [Asked(*about, turn.question, turn.answer, True) for turn in one.history]
            asked.append(Asked(*about, one.question, one.answer, False))
    if not asked:
        raise InputError(f"{folder / 'release'}: holds no question; expected an export; name its folder.")
    return _statistics(
        images, asked, author=facts["author"], dropped={one["rule"]: one["count"] for one in facts["dropped"]}
    )


def _statistics(images: Counter[str], asked: Sequence[Asked], **known: Any) -> Statistics:
    pairs = Counter(one.category for one in asked)
    order = sorted(pairs, key=lambda category: (-pairs[category], category))
    final = [one for one in asked if not one.is_earlier_turn]
    cells = Counter(f"{one.perspective} {one.length}" for one in final)
    return Statistics(
        images={category: images[category] for category in order},
        pairs={category: pairs[category] for category in order},
        cells={cell: cells[cell] for cell in (f"{p} {length}" for p in PERSPECTIVES for length in LENGTHS)},
        question_words={
            length: _histogram(one.question for one in final if one.length == length) for length in LENGTHS
        },
        answer_words=_histogram(one.answer for one in final),
        words=_words(one.question for one in asked),
        **known,
    )


def _histogram(texts: Iterable[str]) -> dict[int, int]:
    return dict(sorted(Counter(len(text.split()) for text in texts).items()))


def _words(texts: Iterable[str]) -> dict[str, int]:
    counts = Counter(word for text in texts for word in re.findall(r"[^\W\d_]{3,}", text.lower()))
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def balance(counts: dict[str, int]) -> float:
    """Returns how evenly counts are spread: entropy over its maximum, 1 for equal counts, 0 for a single one."""
    total = sum(counts.values())
    if len(counts) < 2 or not total:
        return 0.0
    shares = [count / total for count in counts.values() if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts))
