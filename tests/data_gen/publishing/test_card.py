"""The card: front matter that a hub reads, tables, labels, and odd texts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from data_gen.core.items import Drop
from data_gen.ledger.screening import OUTCOMES
from data_gen.publishing.card import card
from data_gen.publishing.summary import SA_MED2D_LICENCE, count_drops

SPLIT = {
    "images": 6,
    "cases": 3,
    "categories": 2,
    "pairs": 24,
    "conversations": 0,
    "attribute": 12,
    "location": 12,
    "short": 12,
    "long": 12,
}
SUMMARY: dict[str, Any] = {
    "author": "models",
    "models": {"describe": ["some-model"]},
    "settings": {"seed": 0, "screened_only": False},
    "counts": {"train": SPLIT, "val": {**SPLIT, "images": 2}, "test": dict.fromkeys(SPLIT, 0)},
    "categories": {"liver": {"images": 8, "pairs": 32}},
    "dropped": [{"rule": "words", "count": 3, "share": 0.0625}],
    "screening": {
        "pairs": 45,
        "judged": 9,
        "share": 0.2,
        "reviewers": 2,
        "outcomes": dict.fromkeys(OUTCOMES, 3),
        "agreement": [{"first": "reviewer 1", "second": "reviewer 2", "pairs": 9, "raw": 0.75, "kappa": 0.5}],
    },
    "sources": [{"name": "BTCV, in SA-Med2D-20M", "url": "https://x", "licence": SA_MED2D_LICENCE, "images": 8}],
}


def changed(**changes: Any) -> str:
    return card({**copy.deepcopy(SUMMARY), **changes})


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_the_front_matter_names_the_files_that_are_there() -> None:
    told = front(changed())
    files = told["configs"][0]["data_files"]
    assert [(one["split"], one["path"]) for one in files] == [
        ("train", "data/train-*.parquet"),
        ("validation", "data/validation-*.parquet"),
    ]
    assert told["license"] == "cc-by-nc-sa-4.0"
    assert told["size_categories"] == ["n<1K"]
    assert "synthetic" not in told["tags"]


def test_other_licences_are_other() -> None:
    other = {"name": "mine", "url": "", "licence": "unknown", "images": 1}
    assert front(changed(sources=[*SUMMARY["sources"], other]))["license"] == "other"


def test_what_it_tells() -> None:
    text = changed()
    assert "| train | 6 | 3 | 2 | 24 |" in text
    assert "| describe | `some-model` |" in text
    assert "| `words` | 3 | 6.25% |" in text
    assert "9 of 45 pairs (20.0%) were judged by 2 reviewer(s)" in text
    assert "75.0% the same verdict on 9 pairs, Cohen's kappa 0.50" in text
    assert f"| [BTCV, in SA-Med2D-20M](https://x) | {SA_MED2D_LICENCE} | 8 |" in text
    assert "offline author" not in text


@pytest.mark.parametrize("author", ["offline", "models and offline"])
def test_the_offline_author_is_named(author: str) -> None:
    text = changed(author=author)
    assert "by the offline author" in text
    assert "synthetic" in front(text)["tags"]


def test_a_pipe_in_a_name_does_not_break_a_table() -> None:
    assert "| a\\|b | c | 1 |" in changed(sources=[{"name": "a|b", "url": "", "licence": "c", "images": 1}])


def test_nothing_dropped_nothing_asked() -> None:
    text = changed(dropped=[], models={})
    assert "The rules dropped nothing." in text and "No request to a model" in text


def test_shares_are_of_all_candidates() -> None:
    drops = [Drop("i", "transform", rule, "why") for rule in ("words", "words", "question")]
    assert count_drops(drops, 7) == [
        {"rule": "words", "count": 2, "share": 0.2},
        {"rule": "question", "count": 1, "share": 0.1},
    ]
    assert count_drops([], 0) == []
