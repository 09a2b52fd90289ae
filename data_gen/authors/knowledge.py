"""What the offline author knows: for each category, clauses from which descriptions and answers are put together.

The files of `atlas/` hold one entry a category:

- `noun`: what it is in general, as "organ"; questions ask "which organ ...".
- `attributes`, `functions`, `effects`, `location`: clauses which complete "the organ that ...", each true of this
  category and, as far as it can be, of no other that is seen in the same images.
- `diseases`: phrases which complete "can be affected by ...".
- `left`, `right`: location clauses that are true of one side only.
- `plural`: the category's name is a plural. `spread`: it has several parts in one image, or surrounds others.
- `bank`: its clauses are the sentences of the demo's query bank, so that they are written down once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from data_gen.core.names import SIDES
from medisee.foundation.errors import InputError
from medisee.records.records import Perspective
from medisee.sources.query_bank import Pool, load_bank

ATLAS = Path(__file__).with_name("atlas")

_CLAUSES = {"attributes": 4, "functions": 4, "effects": 4, "diseases": 4, "location": 3, "left": 2, "right": 2}
"""The lists of an entry and how many clauses each has at least, if it is there."""
_FLAGS = ("plural", "spread", "bank")
_LEAST_WORDS = 4  # of a sentence in the bank that tells enough
_DISEASED = ("can be affected by {}", "is at risk of {}", "is examined when doctors suspect {}")
# "Which nucleus shrinks first?" tells that it "shrinks first"; a noun with an adjective would tell more than its verb.
_QUESTION = re.compile(
    r"Which (?:structure|nucleus|part|cortex|gyrus|cavity|space|region|hollow|lobe|area|strip) ((?!does )[a-z]+s [^?:]+)\?"
)
# Behind "the organ that ..." a sentence must not change its subject.
_LOOSE = re.compile(r"^is where |, (?:and (?!makes|is|can|has|forms)|so |\w+$)")
_VERB = re.compile(r"[a-z]+s (?=[a-z])|can |was ")


@dataclass(frozen=True, slots=True)
class Clause:
    """What is told of a category.

    Attributes:
        phrases: wordings of one fact, each of which completes "the organ that ...", as "produces bile".
        kind: the list of the entry that it comes from, or "position" when it was read off the boxes.
    """

    phrases: tuple[str, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one category.

    Attributes:
        noun: what it is in general.
        clauses: what is told of it, by perspective.
        sides: location clauses of the left and of the right one, if they differ.
        plural: its name is a plural.
        compact: it is one piece, about where the centre of its box is.
    """

    noun: str
    clauses: Mapping[Perspective, tuple[Clause, ...]]
    sides: Mapping[str, tuple[Clause, ...]]
    plural: bool
    compact: bool


UNKNOWN = Facts("structure", {"attribute": (), "location": ()}, {}, plural=False, compact=False)
"""What is known of a category that no file tells of: its boxes only."""


@cache
def load_knowledge(folder: Path = ATLAS) -> Mapping[str, Facts]:
    """Reads all files of a folder; the keys are canonical category names, without sides.

    Raises:
        InputError: a file is unreadable, or an entry is there twice or lacks something; all is named.
    """
    problems: list[str] = []
    facts: dict[str, Facts] = {}
    for path in sorted(folder.glob("*.yaml")):
        for category, entry in _content(path, problems).items():
            found = list(_problems(entry))
            found += ["is there twice; remove one"] if category in facts else []
            problems += [f"{path}: {category}: {problem}." for problem in found]
            if not found:
                facts[category] = _facts(category, entry)
    if problems:
        raise InputError(problems)
    return facts


def _content(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{path}: cannot be read ({error}); expected entries of categories; mend or remove the file.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path}: holds {type(content).__name__}; expected 'category: {{noun: ..., ...}}'; mend it.")
        return {}
    return content


def _problems(entry: Any) -> Iterable[str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("noun"), str):
        yield "has no noun; expected a mapping with 'noun'; add it"
        return
    for key in sorted(set(entry) - {"noun", *_CLAUSES, *_FLAGS}):
        yield f"has the key {key!r}; expected noun, {', '.join((*_CLAUSES, *_FLAGS))}; correct it"
    if entry.get("bank"):
        return
    wanted = ["attributes", "effects" if "effects" in entry else "functions", "location"]
    for key in [*wanted, *(key for key in _CLAUSES if key in entry and key not in wanted)]:
        clauses = entry.get(key)
        if (
            not isinstance(clauses, list)
            or len(clauses) < _CLAUSES[key]
            or not all(isinstance(text, str) for text in clauses)
        ):
            yield f"{key} holds {clauses!r:.60}; expected a list of at least {_CLAUSES[key]} clauses; add them"


def _facts(category: str, entry: dict[str, Any]) -> Facts:
    if entry.get("bank"):
        clauses = _of_bank(category, load_bank()[category])
    else:
        told = [Clause((text,), key) for key in ("attributes", "functions", "effects") for text in entry.get(key, [])]
        ill = [Clause(tuple(form.format(text) for form in _DISEASED), "diseases") for text in entry.get("diseases", [])]
        where = tuple(Clause((text,), "location") for text in entry["location"])
        clauses: dict[Perspective, tuple[Clause, ...]] = {"attribute": (*told, *ill), "location": where}
    return Facts(
        noun=entry["noun"],
        clauses=clauses,
        sides={side: tuple(Clause((text,), "location") for text in entry[side]) for side in SIDES if side in entry},
        plural=entry.get("plural", False),
        compact=not entry.get("spread", False),
    )


def _is_fit(text: str) -> bool:
    return len(text.split()) >= _LEAST_WORDS and bool(_VERB.match(text)) and not _LOOSE.search(text)


def _of_bank(category: str, pool: Pool) -> dict[Perspective, tuple[Clause, ...]]:
    """Returns the clauses in a pool's explanations ("The putamen forms ...") and plain questions ("Which part ...?")."""
    clauses: dict[Perspective, tuple[Clause, ...]] = {}
    for perspective, explanations in pool.explanations.items():
        kind = "location" if perspective == "location" else "attributes"
        told = [text.removeprefix(f"The {category} ").rstrip(".") for text in explanations]
        asked = [match[1] for text in pool.queries[perspective, "short"] if (match := _QUESTION.fullmatch(text))]
        fitting = [text for text in (*told, *asked) if _is_fit(text)]
        clauses[perspective] = tuple(Clause((text,), kind) for text in dict.fromkeys(fitting))
    return clauses
