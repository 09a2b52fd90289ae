"""The knowledge covers what it should, names nothing that it describes, and wrong files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_gen.authors.knowledge import load_knowledge
from data_gen.core.names import load_names
from medisee.foundation.errors import InputError
from medisee.sources.brain import STRUCTURES

NAMES = load_names()
KNOWLEDGE = load_knowledge()
ENTRY = """
  noun: organ
  attributes: [is a, is b, is c, is d]
  functions: [makes a, makes b, makes c, makes d]
  location: [lies a, lies b, lies c]
"""


def test_it_covers_the_demo_and_more_than_sixty_other_categories() -> None:
    assert set(STRUCTURES) <= set(KNOWLEDGE)
    assert len(set(KNOWLEDGE) - set(STRUCTURES)) >= 60


@pytest.mark.parametrize("category", KNOWLEDGE)
def test_each_category_has_names_and_never_names_itself(category: str) -> None:
    facts = KNOWLEDGE[category]
    assert category in NAMES and NAMES.canonical(category) == category
    clauses = [*facts.clauses["attribute"], *facts.clauses["location"], *sum(facts.sides.values(), ())]
    for clause in clauses:
        for phrase in clause.phrases:
            assert NAMES.betrays(f"The {facts.noun} that {phrase}", category) is None
            assert phrase[0].islower() and phrase[-1].isalnum()
    assert len({clause.phrases for clause in clauses}) == len(clauses)
    assert len(facts.clauses["attribute"]) >= 7 and len(facts.clauses["location"]) >= 3


@pytest.mark.parametrize("category", [c for c in KNOWLEDGE if KNOWLEDGE[c].sides])
def test_facts_about_sides_belong_to_categories_with_sides(category: str) -> None:
    assert NAMES.side(f"left {category}") == "left"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- liver", "holds list"),
        ("{", "cannot be read"),
        ("liver: [a]", r"organs\.yaml: liver: .*valid dictionary.*with 'noun'"),
        ("liver: {attributes: [a]}", r"liver: noun: Field required"),
        ("liver: {noun: organ}", r"organs\.yaml: liver: .*lacks attributes"),
        (f"liver:{ENTRY}  colour: [red]", r"organs\.yaml: liver: colour: Extra inputs are not permitted"),
        (f"liver:{ENTRY}  diseases: [one]", r"organs\.yaml: liver: diseases: .*at least 4 items"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "organs.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_knowledge(tmp_path)


def test_an_entry_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"liver:{ENTRY}", encoding="utf-8")
    with pytest.raises(InputError, match=r"b\.yaml: liver: is in two files"):
        load_knowledge(tmp_path)
