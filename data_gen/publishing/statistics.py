"""The numbers behind Figure 4 and the other figures: what is asked about, in how many words, from which perspective."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from data_gen.ledger.ledger import Ledger
from data_gen.ledger.screening import screen
from data_gen.publishing.entries import in_turns, questions_of
from data_gen.publishing.summary import authorship, count_drops
from medisee.foundation.errors import InputError
from medisee.records.records import LENGTHS, PERSPECTIVES, SPLITS
from medisee.sources.mlmr_sd import Question, read_release


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A data set in numbers. `faults` and `calls` are known from a ledger only.

    In `cells` and the numbers of words the earlier turns of conversations do not count: they do not ask for the target.
    """

    author: str  # of the texts: "models", "offline" or "models and offline"
    images: dict[str, int]  # by category, in the order of `pairs`
    pairs: dict[str, int]  # by category, the most frequent first
    cells: dict[str, int]  # pairs by perspective and length, such as "attribute short"
    question_words: dict[str, dict[int, int]]  # for each length, how many questions have a given number of words
    answer_words: dict[int, int]  # how many answers have a given number of words
    words: dict[str, int]  # how often each word occurs in a question
    dropped: dict[str, int]  # how many pairs or items each rule took out
    faults: dict[str, int] = field(default_factory=dict)  # how often each rule objected, also to what was corrected
    calls: list[dict[str, Any]] = field(default_factory=list)  # requests, tokens and price of each stage and model


def statistics_of_ledger(ledger: Ledger) -> Statistics:
    """Counts what an export of a ledger would hold, given the decisions so far."""
    categories = {item.id: item.category for item in ledger.items()}
    candidates = ledger.pairs()
    pairs = [one.pair for one in screen(candidates, ledger.decisions()).pairs]
    if not pairs:
        raise InputError(f"{ledger.path}: holds no pair; make some with `python -m data_gen run`.")
    ranked = sorted(pairs, key=lambda pair: (pair.item, in_turns(pair)))
    return _statistics(
        Counter(categories[item] for item in {pair.item for pair in pairs}),
        [
            question
            for item, listed in groupby(ranked, key=lambda pair: pair.item)
            for question in questions_of(listed, categories[item])
        ],
        author=authorship(pairs),
        dropped=count_drops(ledger.drops(), len(candidates)),
        faults=ledger.answers.faults(),
        calls=[
            {
                **{name: getattr(count, name) for name in ("stage", "model", "requests", "answers")},
                "tokens in": count.usage_in,
                "tokens out": count.usage_out,
                "US dollars": round(count.price, 4),
            }
            for count in ledger.answers.counts()
        ],
    )


def statistics_of_export(folder: Path, facts: dict[str, Any]) -> Statistics:
    """Counts what the folder of an export holds; `facts` is the content of its data.json."""
    images: Counter[str] = Counter()
    questions: list[Question] = []
    for path in (folder / "release" / f"{split}.json" for split in SPLITS):
        if path.is_file():
            classes, asked = read_release(path, folder)
            images.update(category for masks in classes.values() for category in masks.values())
            questions += asked
    if not questions:
        raise InputError(f"{folder / 'release'}: holds no question; expected an export; name its folder.")
    return _statistics(images, questions, author=facts["author"], dropped=facts["dropped"])


def _statistics(
    images: Counter[str], questions: Sequence[Question], *, dropped: list[dict[str, Any]], **known: Any
) -> Statistics:
    pairs: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for one in questions:
        pairs[one.category] += len(one.history) + 1
        for text in (*(turn.question for turn in one.history), one.question):
            words.update(re.findall(r"[^\W\d_]{3,}", text.lower()))
    cells = Counter(f"{one.perspective} {one.length}" for one in questions)
    ranked = _ranked(pairs)
    return Statistics(
        images={category: images[category] for category in ranked},
        pairs=ranked,
        cells={f"{one} {length}": cells[f"{one} {length}"] for one in PERSPECTIVES for length in LENGTHS},
        question_words={
            length: _histogram(one.question for one in questions if one.length == length) for length in LENGTHS
        },
        answer_words=_histogram(one.answer for one in questions),
        words=_ranked(words),
        dropped={one["rule"]: one["count"] for one in dropped},
        **known,
    )


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def _histogram(texts: Iterable[str]) -> dict[int, int]:
    return dict(sorted(Counter(len(text.split()) for text in texts).items()))


def balance(counts: dict[str, int]) -> float:
    """Returns how evenly counts are spread: entropy over its maximum, 1 for equal counts, 0 for a single one."""
    total = sum(counts.values())
    if len(counts) < 2 or not total:
        return 0.0
    shares = [count / total for count in counts.values() if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts))
