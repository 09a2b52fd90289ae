"""The numbers of a finished data set, as data.json holds them and the card shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from data_gen.core.items import Drop, Item, Pair
from data_gen.core.recipe import OFFLINE
from data_gen.ledger.ledger import Ledger
from data_gen.ledger.screening import Screening, agreements
from data_gen.publishing.entries import Entry
from data_gen.publishing.splits import SPLITS
from medisee.foundation.errors import InputError, first_line
from medisee.foundation.yaml_files import parse_yaml
from medisee.sources.sa_med2d_index import parse_name

SOURCES_FILE = Path(__file__).with_name("sources.yaml")
SA_MED2D_LICENCE = "CC BY-NC-SA 4.0"


class ImageSource(BaseModel):
    """Where images come from, in words for people."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    url: str = ""
    licence: str = "unknown: ask where you have the images from"


def read_sources(*extra: Path) -> dict[str, ImageSource]:
    """Reads the package's table of sources, then files of the same form, whose entries win."""
    found: dict[str, ImageSource] = {}
    problems: list[str] = []
    for path in (SOURCES_FILE, *extra):
        try:
            content = parse_yaml(path.read_bytes()) or {}
            found |= {str(key): ImageSource.model_validate(value) for key, value in content.items()}
        except (OSError, ValueError, AttributeError) as error:
            form = "'<source>: {name: ..., url: ..., licence: ...}'"
            problems.append(f"{path}: cannot be used ({first_line(error)}); expected YAML with lines {form}.")
    if problems:
        raise InputError(problems)
    return found


def _source_of(item: Item, known: dict[str, ImageSource]) -> ImageSource:
    """Returns where an item's image comes from; SA-Med2D-20M's images are known by their names."""
    if item.source in known:
        return known[item.source]
    name = parse_name(item.image)
    if name is None or name.dataset != item.source:
        return ImageSource(name=item.source)
    return ImageSource(
        name=f"{item.source}, in SA-Med2D-20M",
        url="https://huggingface.co/datasets/OpenGVLab/SA-Med2D-20M",
        licence=SA_MED2D_LICENCE,
    )


def count_drops(drops: Iterable[Drop], kept: int) -> list[dict[str, Any]]:
    """Counts drops by rule, the most frequent first, with their share of all candidates (`kept` and dropped)."""
    counts = Counter(drop.rule for drop in drops)
    total = kept + counts.total()
    ranked = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return [{"rule": rule, "count": count, "share": round(count / total, 6)} for rule, count in ranked]


def authorship(pairs: Iterable[Pair]) -> str:
    """Returns who wrote the texts: "offline", "models" or "models and offline"."""
    offline = {pair.author == OFFLINE for pair in pairs}
    return "models and offline" if len(offline) == 2 else "offline" if True in offline else "models"


def summary(
    ledger: Ledger,
    entries: Sequence[Entry],
    screening: Screening,
    *,
    sources: dict[str, ImageSource],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Returns the content of data.json. It holds no time, path, price or name of a reviewer."""
    decisions = ledger.decisions()
    reviewers = sorted({decision.reviewer for decision in decisions})
    labels = {name: f"reviewer {number}" for number, name in enumerate(reviewers, start=1)}
    candidates = sum(screening.counts.values())
    models: dict[str, list[str]] = {}
    for count in ledger.answers.counts():
        models.setdefault(count.stage, []).append(count.model)
    from_source = Counter(_source_of(entry.item, sources) for entry in entries)
    images, pairs = Counter(entry.item.category for entry in entries), Counter[str]()
    for entry in entries:
        pairs[entry.item.category] += len(entry.pairs)
    return {
        "author": authorship(one.pair for entry in entries for one in entry.pairs),
        "models": models,
        "settings": settings,
        "counts": {split: _counts([entry for entry in entries if entry.split == split]) for split in SPLITS},
        "categories": {name: {"images": images[name], "pairs": pairs[name]} for name in sorted(images)},
        "dropped": count_drops(ledger.drops(), candidates),
        "screening": {
            "pairs": candidates,
            "judged": screening.judged,
            "share": round(screening.judged / candidates, 6) if candidates else 0.0,
            "outcomes": screening.counts,
            "reviewers": len(reviewers),
            "agreement": [
                {
                    "first": labels[one.first],
                    "second": labels[one.second],
                    "pairs": one.pairs,
                    "raw": round(one.raw, 6),
                    "kappa": None if one.kappa is None else round(one.kappa, 6),
                }
                for one in agreements(decisions)
            ],
        },
        "sources": [
            {**source.model_dump(), "images": count}
            for source, count in sorted(from_source.items(), key=lambda one: (-one[1], one[0].name))
        ],
    }


def _counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Counts images, cases, categories and pairs, and what asks for a target by perspective and length."""
    pairs = [one.pair for entry in entries for one in entry.pairs]
    questions = [question for entry in entries for question in entry.questions]
    return {
        "images": len(entries),
        "cases": len({(entry.item.source, entry.item.case) for entry in entries}),
        "categories": len({entry.item.category for entry in entries}),
        "pairs": len(pairs),
        "conversations": len({pair.conversation for pair in pairs if pair.conversation}),
        **{
            name: sum(name in (one.perspective, one.length) for one in questions)
            for name in ("attribute", "location", "short", "long")
        },
    }
