"""Which category an answer names, and the file that lists the names of categories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medisee.evaluation.scoring import named_category, read_categories
from medisee.foundation.errors import InputError

CATEGORIES = {
    "kidney": ["kidney", "kidneys", "ren"],
    "left kidney": ["left kidney"],
    "kidney cyst": ["left kidney cyst", "cyst"],
    "lesion (left)": ["lesion (left)"],
    "liver": ["liver", "hepatic tissue"],
}


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("It is [SEG] and [BBOX]. The liver lies above the kidney.", "liver"),
        ("The kidney lies below the liver.", "kidney"),
        ("LIVER!", "liver"),
        ("Hepatic\n  tissue", "liver"),
        ("This is the left kidney.", "left kidney"),
        ("A left kidney cyst.", "kidney cyst"),
        ("Both kidneys.", "kidney"),
        ("Both kidneys, kidney.", "kidney"),
        ("The lesion (left) is large.", "lesion (left)"),
        ("Delivery of renal blood, sliver, liver2", None),
        ("liver-like", "liver"),
        ("It is [SEG] and [BBOX].", None),
        ("", None),
    ],
)
def test_the_first_and_longest_name_counts(text: str, category: str | None) -> None:
    assert named_category(text, CATEGORIES) == category


def test_the_order_of_the_categories_does_not_matter() -> None:
    turned = dict(reversed(CATEGORIES.items()))
    assert named_category("the left kidney cyst", turned) == "kidney cyst"


def test_only_listed_names_count() -> None:
    assert named_category("the liver", {"liver": ["hepar"]}) is None


def test_reads_categories(tmp_path: Path) -> None:
    path = tmp_path / "categories.json"
    path.write_text(json.dumps(CATEGORIES), encoding="utf-8")
    assert read_categories(path) == {category: tuple(names) for category, names in CATEGORIES.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('["liver"]', "holds a list; expected {"),
        ('{"liver": "liver"}', "category 'liver' has the names 'liver'; expected a list"),
        ('{"liver": []}', "category 'liver' has the names []"),
        ('{"liver": [" "]}', "category 'liver' has the names [' ']"),
        ('{"liver": ["hepar"], "spleen": ["He  par", "hepar"]}', "'hepar' belongs to 'liver' and 'spleen'"),
    ],
)
def test_refuses_other_forms(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "categories.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_categories(path)
    (problem,) = caught.value.problems
    assert problem.startswith(str(path)) and message in problem


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: cannot be read .*correct data\.categories"):
        read_categories(tmp_path / "none.json")
