"""The offline author: answers every stage without a model, from the knowledge files and from the boxes.

Its answers go through the same rules, ledger, screening and export as a model's, and its pairs are labelled "offline".
What it says depends on the fields and the seed only. Different templates, variants and images draw different facts;
asked again, it draws anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import Any

from data_gen.authors.knowledge import UNKNOWN, Clause, Facts, load_knowledge
from data_gen.authors.wording import Subject, alike, article, descriptions, join, read
from data_gen.authors.wording import answer as word_answer
from data_gen.authors.wording import question as word_question
from data_gen.core.calls import Reply, Request, canonical
from data_gen.core.items import (
    LENGTHS,
    PERSPECTIVES,
    TEMPLATES,
    Entity,
    Item,
    Template,
    length_of,
    perspective_of,
)
from data_gen.core.names import Names, load_names
from data_gen.rules.checks import check_description, check_pair, check_turn
from data_gen.rules.positions import Landmark, statements
from medisee.records.records import Length, Perspective

_ORDER = ("attributes", "functions", "effects", "diseases", "location", "position", "extent")
"""Of two clauses the one whose kind comes first is told first."""
_BOXES = ("position", "extent")
"""The kinds of clauses that come from boxes; an extent compares the target with what is labelled and says so."""
_DENSE = 5
"""The least number of labelled objects with which a place alone tells an organ from all that is not labelled."""
_MOST_LANDMARKS = 8
_MOST_POSITIONS = 12
_TRIES = 12
_MODALITIES = {"ct": "CT", "mr": "MRI", "mri": "MRI", "pet": "PET", "x": "X-ray", "us": "ultrasound"}
_FIRST_TURNS = (
    ("What kind of image is this?", "This is {a_modality} image."),
    ("What am I looking at?", "You are looking at {a_modality} image with labelled structures."),
    ("Can you tell me how this picture was made?", "It was made by {modality}."),
)
_KIND_TURNS = (
    ("What kind of structure is of interest here?", "It is {a_noun}."),
    ("What should I pay attention to?", "Pay attention to {a_noun} in this image."),
)
_FACT_TURNS = (
    ("What is known about it?", "It {phrase}."),
    ("Can you tell me more about it?", "Yes, it {phrase}."),
)


@dataclass(frozen=True, slots=True)
class _Scene:
    """An item's target as the offline author sees it.

    Attributes:
        item: what the rules need of the item.
        subject: how the target is spoken of.
        clauses: what can be told of it, by perspective, in an order of the item's own.
        alone: a position tells enough by itself: there is no anatomy to add, or nothing else that could be meant.
        unsided: phrases that need no side, as they are true of this one of two only.
    """

    item: Item
    subject: Subject
    clauses: Mapping[Perspective, tuple[Clause, ...]]
    alone: bool
    unsided: frozenset[str]


def answer(stage: str, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Returns the answer of a stage, in the form of its schema.

    A cell that nothing is known about has an empty text, which the rules drop.

    Args:
        stage: "caption", "describe", "revise", "transform" or "converse".
        fields: facts about the item; see `data_gen.core.recipe.fields_of`.
        seed: varies what is drawn.

    Raises:
        KeyError: there is no such stage.
    """
    stages: dict[str, Callable[[_Scene, Mapping[str, Any], int], dict[str, Any]]] = {
        "caption": _caption,
        "describe": _describe,
        "revise": _revise,
        "transform": _transform,
        "converse": _converse,
    }
    return stages[stage](_scene(fields, seed), fields, seed)


@cache
def _names() -> Names:
    return load_names()


def _scene(fields: Mapping[str, Any], seed: int) -> _Scene:
    names = _names()
    item = _item(fields)
    facts = load_knowledge().get(names.base(item.category), UNKNOWN)
    side = names.side(item.category)
    subject = Subject(names.canonical(item.category), facts.noun, side, facts.plural)
    own = facts.sides.get(side or "", ())
    rng = Random(f"{seed}/{item.id}")
    positions = _positions(item, names, facts, rng)
    attributes = list(facts.clauses["attribute"])
    rng.shuffle(attributes)
    where = [*facts.clauses["location"], *own]
    rng.shuffle(where)
    longer, shorter = (where, positions) if len(where) > len(positions) else (positions, where)
    # Anatomy and positions in turn, so that each slot gets some of both.
    mixed = [each for pair in zip(longer, shorter, strict=False) for each in pair] + longer[len(shorter) :]
    return _Scene(
        item,
        subject,
        {"attribute": tuple(attributes), "location": tuple(mixed)},
        len(item.entities) >= _DENSE or not where or any(clause.kind == "effects" for clause in attributes),
        frozenset(phrase for clause in (*own, *positions) for phrase in clause.phrases),
    )


def _item(fields: Mapping[str, Any]) -> Item:
    entities = [Entity(each["category"], _box(each["box"])) for each in fields["entities"]]
    return Item(
        id=fields["item"],
        record="",
        target="",
        image="",
        mask="",
        modality=fields["modality"],
        source="",
        case="",
        category=fields["category"],
        box=_box(fields["box"]),
        entities=tuple(entities),
        width=1,
        height=1,
    )


def _box(box: Sequence[float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    return x0, y0, x1, y1


def _positions(item: Item, names: Names, facts: Facts, rng: Random) -> list[Clause]:
    """Returns what the boxes tell of where the target lies, some of it if there is much."""
    others = list(item.entities)
    target = Entity(item.category, item.box)
    if target in others:
        others.remove(target)
    held = Counter(entity.category for entity in others)
    near = sorted(others, key=lambda entity: _distance(entity.box, item.box))
    landmarks = [
        Landmark(
            f"the {names.canonical(entity.category)}",
            entity.box,
            load_knowledge().get(names.base(entity.category), UNKNOWN).compact,
        )
        for entity in near
        if held[entity.category] == 1
        and entity.category in names
        and not names.betrays(names.canonical(entity.category), item.category)
    ]
    found = statements(item.box, others, landmarks[:_MOST_LANDMARKS], compact=facts.compact)
    rng.shuffle(found)
    found.sort(key=lambda statement: len(statement.kinds))  # simple ones first
    return [
        Clause((statement.phrase,), "extent" if "extent" in statement.kinds else "position")
        for statement in found[:_MOST_POSITIONS]
    ]


def _distance(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(abs(one - other) for one, other in zip(first, second, strict=True))


def _caption(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    shown = dict.fromkeys(f"the {_names().canonical(entity.category)}" for entity in scene.item.entities)
    *head, last = shown
    listed = f"{', '.join(head)} and {last}" if head else last
    return {"caption": f"This is {article(_modality(fields))} image. It shows {listed}."}


def _describe(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    place = 2 * (fields["variant"] - 1) + TEMPLATES.index(fields["template"])
    texts: dict[str, Any] = {}
    for perspective in PERSPECTIVES:
        # What the templates and variants before this one tell is gone through again, so that this one tells the rest.
        told: list[Clause] = []
        for slot, length in product(range(place + 1), LENGTHS):
            attempt = fields["attempt"] if slot == place else 0
            rng = Random(f"{seed}/{scene.item.id}/{slot}/{perspective}/{length}/{attempt}")
            rest = _untold(scene.clauses[perspective], told)
            turned = [*rest[attempt:], *rest[:attempt]]
            text, clauses = _description(scene, turned, length, TEMPLATES[slot % 2], rng)
            told += clauses
            texts[f"{perspective}_{length}"] = text
    return texts


def _untold(clauses: Sequence[Clause], told: Sequence[Clause]) -> list[Clause]:
    """Returns the clauses with those told least and longest ago first."""
    last = {clause: (told.count(clause), place) for place, clause in enumerate(told)}
    return sorted(clauses, key=lambda clause: last.get(clause, (0, 0)))


def _description(
    scene: _Scene, clauses: Sequence[Clause], length: Length, template: Template, rng: Random
) -> tuple[str, tuple[Clause, ...]]:
    """Returns the first description that keeps the rules, and what it tells; empty when there is none."""
    for phrase, told in _phrases(clauses, length, rng):
        if told[0].kind == "position" and not scene.alone:
            continue
        worded = list(descriptions(scene.subject, phrase, template, sided=_needs_side(scene, phrase)))
        rng.shuffle(worded)
        for text in worded:
            if not check_description(text, length, scene.item, _names()):
                return text, told
    return "", ()


def _phrases(clauses: Sequence[Clause], length: Length, rng: Random) -> Iterator[tuple[str, tuple[Clause, ...]]]:
    """Yields phrases of one clause and, for long descriptions, of two, those of the first clauses first."""
    drawn = [(rng.choice(clause.phrases), clause) for clause in clauses]
    for i, (phrase, clause) in enumerate(drawn):
        if length == "long":
            for other, other_clause in drawn[i + 1 : i + 6]:
                one, two = sorted(
                    ((phrase, clause), (other, other_clause)), key=lambda each: _ORDER.index(each[1].kind)
                )
                # Two diseases, or two statements from boxes, are too much at once.
                if one[1].kind in _BOXES or one[1].kind == two[1].kind == "diseases":
                    continue
                if joined := join(one[0], two[0]):
                    yield joined, (one[1], two[1])
        yield phrase, (clause,)


def _needs_side(scene: _Scene, phrase: str) -> bool:
    return scene.subject.side is not None and not any(part in phrase for part in scene.unsided)


def _revise(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    revisions: list[dict[str, Any]] = []
    for cell, text in fields["descriptions"].items():
        breaches = check_description(text, length_of(cell), scene.item, _names())
        revisions.append(
            {
                "cell": cell,
                "verdict": "remove" if breaches else "keep",
                "text": "" if breaches else text,
                "reason": breaches[0].reason if breaches else "it keeps the rules",
            }
        )
    return {"descriptions": revisions}


def _transform(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    repeated = {fault["cell"] for fault in fields["faults"] if fault["rule"] == "duplicate"}
    pairs: list[dict[str, str]] = []
    for cell, text in fields["descriptions"].items():
        key = f"{seed}/{scene.item.id}/{cell}/{text}/{fields['attempt']}"
        described, known = ("", text) if cell in repeated else (text, "")
        pairs.append({"cell": cell, **_pair(scene, cell, fields["template"], described, key, known=known)})
    return {"pairs": pairs}


def _pair(
    scene: _Scene, cell: str, template: Template, description: str, key: str, *, known: str = ""
) -> dict[str, str]:
    """Returns a question and its answer; of a new description where the given one is empty or not in our wording.

    It is another question than the known one, and tells what that does not, where there is more to tell.
    """
    perspective, length = perspective_of(cell), length_of(cell)
    rng = Random(key)
    found = read(scene.subject, description)
    if not found:
        clauses = list(scene.clauses[perspective])
        rng.shuffle(clauses)
        clauses.sort(key=lambda clause: any(phrase in known for phrase in clause.phrases))
        found = read(scene.subject, _description(scene, clauses, length, template, rng)[0])
    pair = {"question": "", "answer": ""}
    if not found:
        return pair
    phrase, sided = found
    for _ in range(_TRIES):
        question = word_question(scene.subject, phrase, template, length, rng, sided=sided)
        pair = {
            "question": question,
            "answer": word_answer(scene.subject, phrase, _more(scene, cell, phrase, rng), rng),
        }
        if question != known and not check_pair(question, pair["answer"], length, scene.item, _names()):
            break
    return pair


def _more(scene: _Scene, cell: str, phrase: str, rng: Random) -> list[str]:
    """Returns further facts for an answer: of the same perspective, but none that the question told."""
    clauses = [c for c in scene.clauses[perspective_of(cell)] if not any(alike(each, phrase) for each in c.phrases)]
    facts = [rng.choice(clause.phrases) for clause in clauses if clause.kind not in ("diseases", *_BOXES)]
    rng.shuffle(facts)
    return facts


def _converse(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    rng = Random(f"{seed}/{scene.item.id}/{fields['attempt']}")
    cell = f"{fields['perspective']}-{fields['length']}"
    last = _pair(scene, cell, fields["template"], "", f"{seed}/{scene.item.id}/{cell}/{fields['attempt']}")
    asked = last["question"]
    told = [
        rng.choice(clause.phrases)
        for clause in scene.clauses["attribute"]
        if not any(phrase in asked for phrase in clause.phrases)
    ]
    rng.shuffle(told)
    kinds = [_FIRST_TURNS, _KIND_TURNS, _FACT_TURNS] if told else [_FIRST_TURNS, _KIND_TURNS, _FIRST_TURNS]
    turns: list[dict[str, str]] = []
    for kind in kinds[: fields["turns"] - 1]:
        worded = [
            {"question": question, "answer": text.format(**_words(scene, fields, told))} for question, text in kind
        ]
        rng.shuffle(worded)
        fitting = [turn for turn in worded if turn not in turns and _keeps_rules(turn, scene.item)]
        turns += fitting[:1]
    return {"turns": [*turns, last]}


def _words(scene: _Scene, fields: Mapping[str, Any], told: Sequence[str]) -> dict[str, str]:
    modality = _modality(fields)
    return {
        "modality": modality,
        "a_modality": article(modality),
        "a_noun": article(scene.subject.head(sided=True)),
        "phrase": told[0] if told else "",
    }


def _keeps_rules(turn: Mapping[str, str], item: Item) -> bool:
    return not check_turn(turn["question"], turn["answer"], item, _names())


def _modality(fields: Mapping[str, Any]) -> str:
    """Returns "MRI" for "mri_t1", "fundus photography" for "fundus_photography"."""
    words = str(fields["modality"]).replace("_", " ").split()
    return _MODALITIES.get(words[0].lower(), " ".join(words)) if words else "medical"


class OfflineAuthor:
    """Answers from the knowledge that comes with the package."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    async def send(self, request: Request) -> Reply:
        """Answers one request; it costs nothing."""
        return Reply(status="ok", text=canonical(answer(request.stage, request.fields, self._seed)))
