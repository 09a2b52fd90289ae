"""What the offline author knows: for each category, clauses from which descriptions and answers are composed.

The files of `atlas/` hold one entry per category; see `AtlasEntry` for its keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_gen.core.names import SIDES
from data_gen.core.schemas import reasons
from medisee.foundation.errors import InputError
from medisee.foundation.yaml_files import parse_yaml
from medisee.records.records import Perspective
from medisee.sources.query_bank import Pool, load_bank

ATLAS = Path(__file__).with_name("atlas")

_LEAST_WORDS = 4  # of a sentence in the bank that says enough
_DISEASED = ("can be affected by {}", "is at risk of {}", "is examined when doctors suspect {}")
# "Which nucleus shrinks first?" says that it "shrinks first"; a noun with an adjective would say more than its verb.
_QUESTION = re.compile(
    r"Which (?:structure|nucleus|part|cortex|gyrus|cavity|space|region|hollow|lobe|area|strip) ((?!does )[a-z]+s [^?:]+)\?"
)
# After "the organ that ..." a sentence must not change its subject.
_LOOSE = re.compile(r"^is where |, (?:and (?!makes|is|can|has|forms)|so |\w+$)")
_VERB = re.compile(r"[a-z]+s (?=[a-z])|can |was ")
_FORM = "a mapping with 'noun' and, unless 'bank' is true, attributes, functions or effects, and location"

_TwoOrMore = Annotated[list[str], Field(min_length=2)]
_ThreeOrMore = Annotated[list[str], Field(min_length=3)]
_FourOrMore = Annotated[list[str], Field(min_length=4)]


@dataclass(frozen=True, slots=True)
class Clause:
    phrases: tuple[str, ...]  # its wordings, each of which completes "the organ that ...", such as "produces bile"
    kind: str  # the list of the entry that it comes from, or "position" or "extent" when it comes from the boxes


@dataclass(frozen=True, slots=True)
class Facts:
    noun: str  # what it is in general
    clauses: Mapping[Perspective, tuple[Clause, ...]]
    sides: Mapping[str, tuple[Clause, ...]]  # location clauses of "left" and "right" that differ
    plural: bool  # its name is a plural
    compact: bool  # it is one piece, about where the centre of its box is


# The facts of a category that is in no file: its boxes only.
UNKNOWN = Facts("structure", {"attribute": (), "location": ()}, {}, plural=False, compact=False)


class AtlasEntry(BaseModel):
    """An entry of the atlas. Its clauses complete "the organ that ..."; each is true of this category and, as far as
    possible, of no other that is seen in the same images."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    noun: str  # what it is in general, such as "organ"; questions ask "which organ ..."
    attributes: _FourOrMore = []
    functions: _FourOrMore = []
    effects: _FourOrMore = []
    diseases: _FourOrMore = []  # phrases that complete "can be affected by ..."
    location: _ThreeOrMore = []
    left: _TwoOrMore = []  # location clauses that are true of one side only
    right: _TwoOrMore = []
    plural: bool = False  # the category's name is a plural
    spread: bool = False  # it has several parts in one image, or surrounds others
    bank: bool = False  # its clauses are those of the demo's query bank, so that they are written down once

    @model_validator(mode="after")
    def _is_complete(self) -> AtlasEntry:
        if not self.bank and not (self.attributes and (self.functions or self.effects) and self.location):
            raise ValueError("lacks attributes, functions and effects, or location")
        return self


@cache
def load_knowledge(folder: Path = ATLAS) -> Mapping[str, Facts]:
    """Reads all files of a folder; the keys are canonical category names, without sides."""
    problems: list[str] = []
    facts: dict[str, Facts] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            content: Any = parse_yaml(path.read_bytes())
        except (OSError, ValueError) as error:
            problems.append(f"{path}: cannot be read ({error}); expected entries of categories; correct the file.")
            continue
        if not isinstance(content, dict):
            problems.append(f"{path}: holds {type(content).__name__}; expected 'category: {{...}}'; correct the file.")
            continue
        for category, entry in content.items():
            if category in facts:
                problems.append(f"{path}: {category}: is in two files; remove one.")
            try:
                facts[category] = _facts(category, AtlasEntry.model_validate(entry))
            except ValidationError as error:
                problems += [f"{path}: {category}: {each}; expected {_FORM}; correct it." for each in reasons(error)]
    if problems:
        raise InputError(problems)
    return facts


def _facts(category: str, entry: AtlasEntry) -> Facts:
    if entry.bank:
        clauses = _of_bank(category, load_bank()[category])
    else:
        kinds = ("attributes", "functions", "effects")
        known = [Clause((text,), kind) for kind in kinds for text in getattr(entry, kind)]
        ill = [Clause(tuple(form.format(text) for form in _DISEASED), "diseases") for text in entry.diseases]
        where = tuple(Clause((text,), "location") for text in entry.location)
        clauses: dict[Perspective, tuple[Clause, ...]] = {"attribute": (*known, *ill), "location": where}
    texts = {side: getattr(entry, side) for side in SIDES}
    sides = {side: tuple(Clause((text,), "location") for text in texts[side]) for side in SIDES if texts[side]}
    return Facts(entry.noun, clauses, sides, plural=entry.plural, compact=not entry.spread)


def _of_bank(category: str, pool: Pool) -> dict[Perspective, tuple[Clause, ...]]:
    """Returns the clauses in a pool's explanations ("The putamen forms ...") and questions ("Which part ...?")."""
    clauses: dict[Perspective, tuple[Clause, ...]] = {}
    for perspective, explanations in pool.explanations.items():
        kind = "location" if perspective == "location" else "attributes"
        stated = [text.removeprefix(f"The {category} ").rstrip(".") for text in explanations]
        asked = [match[1] for text in pool.queries[perspective, "short"] if (match := _QUESTION.fullmatch(text))]
        clauses[perspective] = tuple(
            Clause((text,), kind)
            for text in dict.fromkeys([*stated, *asked])
            if len(text.split()) >= _LEAST_WORDS and _VERB.match(text) and not _LOOSE.search(text)
        )
    return clauses
