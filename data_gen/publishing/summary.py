"""What a finished data set consists of, as numbers: the one place that the card, data.json and the figures read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data_gen.core.items import Decision, Drop, Item, Pair
from data_gen.ledger.agreement import agreements
from data_gen.ledger.screening import Screening
from data_gen.publishing.entries import Entry, questions
from data_gen.publishing.splits import SPLITS
from medisee.foundation.errors import InputError, first_line
from medisee.sources.sa_med2d_index import parse_name

OFFLINE = "offline"
"""The author of pairs that no model wrote."""
SOURCES_FILE = Path(__file__).with_name("sources.yaml")
SA_MED2D_LICENCE = "CC BY-NC-SA 4.0"


class Source(BaseModel):
    """Where images come from, in words for people."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    url: str = ""
    licence: str = "unknown: ask where you have the images from"


@dataclass(frozen=True, slots=True)
class Dropped:
    """How many candidate pairs or items one rule took out, and which share of all candidates that is."""

    rule: str
    count: int
    share: float


def read_sources(*extra: Path) -> dict[str, Source]:
    """Reads the table of known sources and files of the same form, the later ones before the earlier.

    Raises:
        InputError: a file cannot be read or has another form; all problems are named.
    """
    found: dict[str, Source] = {}
    problems: list[str] = []
    form = "'<source>: {name: ..., url: ..., licence: ...}'"
    for path in (SOURCES_FILE, *extra):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            found |= {str(key): Source.model_validate(value) for key, value in content.items()}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            problems.append(f"{path}: cannot be read ({error}); expected YAML with lines {form}; correct the path.")
        except (AttributeError, ValidationError) as error:
            problems.append(f"{path}: has another form ({first_line(error)}); expected lines {form}; correct it.")
    if problems:
        raise InputError(problems)
    return found


def source_of(item: Item, known: dict[str, Source]) -> Source:
    """Returns where an item's image comes from; SA-Med2D-20M's images are known by their names."""
    if item.source in known:
        return known[item.source]
    name = parse_name(item.image)
    if name is not None and name.dataset == item.source:
        return Source(
            name=f"{item.source}, in SA-Med2D-20M",
            url="https://huggingface.co/datasets/OpenGVLab/SA-Med2D-20M",
            licence=SA_MED2D_LICENCE,
        )
    return Source(name=item.source)


def dropped(drops: Iterable[Drop], kept: int) -> list[Dropped]:
    """Counts drops by rule, the most frequent first; candidates are what was kept and what was dropped."""
    counts = Counter(drop.rule for drop in drops)
    total = kept + sum(counts.values())
    return [Dropped(rule, count, count / total) for rule, count in sorted(counts.items(), key=lambda c: (-c[1], c[0]))]


def split_counts(entries: Iterable[Entry]) -> dict[str, dict[str, int]]:
    """Counts images, cases, categories and pairs of each split, and what asks for a target by perspective and length."""
    listed = list(entries)
    return {split: _counts([entry for entry in listed if entry.split == split]) for split in SPLITS}


def _counts(entries: Sequence[Entry]) -> dict[str, int]:
    pairs = [one.pair for entry in entries for one in entry.pairs]
    asked = [question for entry in entries for question in questions(entry)]
    return {
        "images": len(entries),
        "cases": len({(entry.item.source, entry.item.case) for entry in entries}),
        "categories": len({entry.item.category for entry in entries}),
        "pairs": len(pairs),
        "conversations": len({pair.conversation for pair in pairs if pair.conversation}),
        **{
            name: sum(name in (one.perspective, one.length) for one in asked)
            for name in ("attribute", "location", "short", "long")
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """All that a summary is made from.

    Attributes:
        entries: the data set.
        candidates: all pairs that the machine accepted.
        screening: what people made of them.
        decisions: those that stand.
        drops: what the machine dropped.
        models: the models that each stage asked.
        sources: the known sources.
        settings: what the data set was exported with.
    """

    entries: Sequence[Entry]
    candidates: Sequence[Pair]
    screening: Screening
    decisions: Sequence[Decision]
    drops: Sequence[Drop]
    models: dict[str, list[str]]
    sources: dict[str, Source]
    settings: dict[str, Any]


def summary(made: Made) -> dict[str, Any]:
    """Returns the content of data.json. It holds no time, path, price or name of a reviewer."""
    pairs = len(made.candidates)
    sources: dict[Source, list[Entry]] = {}
    for entry in made.entries:
        sources.setdefault(source_of(entry.item, made.sources), []).append(entry)
    reviewers = sorted({decision.reviewer for decision in made.decisions})
    labels = {name: f"reviewer {number}" for number, name in enumerate(reviewers, start=1)}
    return {
        "author": authorship(one.pair for entry in made.entries for one in entry.pairs),
        "models": made.models,
        "settings": made.settings,
        "counts": split_counts(made.entries),
        "categories": _by_category(made.entries),
        "dropped": [
            {"rule": one.rule, "count": one.count, "share": round(one.share, 6)} for one in dropped(made.drops, pairs)
        ],
        "screening": {
            "pairs": pairs,
            "judged": made.screening.judged,
            "share": round(made.screening.judged / pairs, 6) if pairs else 0.0,
            "outcomes": made.screening.counts,
            "reviewers": len(reviewers),
            "agreement": [
                {
                    "first": labels[one.first],
                    "second": labels[one.second],
                    "pairs": one.pairs,
                    "raw": None if one.raw is None else round(one.raw, 6),
                    "kappa": None if one.kappa is None else round(one.kappa, 6),
                }
                for one in agreements(made.decisions)
            ],
        },
        "sources": [
            {**source.model_dump(), "images": len(listed)}
            for source, listed in sorted(sources.items(), key=lambda one: (-len(one[1]), one[0].name))
        ],
    }


def authorship(pairs: Iterable[Pair]) -> str:
    """Returns "offline", "models" or "models and offline": who wrote the texts."""
    offline = {pair.author == OFFLINE for pair in pairs}
    return "models and offline" if len(offline) == 2 else "offline" if True in offline else "models"


def _by_category(entries: Iterable[Entry]) -> dict[str, dict[str, int]]:
    images: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for entry in entries:
        images[entry.item.category] += 1
        pairs[entry.item.category] += len(entry.pairs)
    return {name: {"images": images[name], "pairs": pairs[name]} for name in sorted(images)}
