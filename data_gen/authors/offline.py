"""The offline author: answers every stage without a model, from the knowledge files and from the boxes.

Its answers go through the same rules, ledger, screening and export as a model's, and its pairs are labelled "offline".
They depend on the fields and the seed only. Different templates, variants, images and attempts draw different facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from random import Random
from typing import Any, cast

from data_gen.authors.knowledge import UNKNOWN, Clause, Facts, load_knowledge
from data_gen.authors.wording import Subject, alike, article, descriptions, join, read
from data_gen.authors.wording import answer as word_answer
from data_gen.authors.wording import question as word_question
from data_gen.core.calls import Reply, Request, canonical
from data_gen.core.items import TEMPLATES, Entity, Item, Template, length_of, perspective_of
from data_gen.core.names import Names, load_names
from data_gen.rules.checks import check_description, check_pair, check_turn
from data_gen.rules.positions import Landmark, statements
from medisee.records.masks import Box
from medisee.records.records import LENGTHS, PERSPECTIVES, Length, Perspective

_ORDER = ("attributes", "functions", "effects", "diseases", "location", "position", "extent")  # in a sentence
_BOXES = ("position", "extent")  # from boxes; an extent compares the target with what is labelled and says so
_DENSE = 5  # labelled objects, at least: then a place alone tells an organ from all that is not labelled
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
_FACT_TURNS = (("What is known about it?", "It {phrase}."), ("Can you tell me more about it?", "Yes, it {phrase}."))


@dataclass(frozen=True, slots=True)
class _Scene:
    item: Item  # with the fields that the rules need
    subject: Subject
    clauses: Mapping[Perspective, tuple[Clause, ...]]  # in an order that depends on the item
    alone: bool  # a position is enough by itself: there is no anatomy to add, or nothing else that could be meant
    unsided: frozenset[str]  # phrases that need no side, as they are true of this one of two only


def answer(stage: str, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Returns a stage's answer to `data_gen.core.recipe.fields_of`; what is not known is empty, and the rules drop it."""
    stages = {
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
    names, item = _names(), _item(fields)
    facts = load_knowledge().get(names.base(item.category), UNKNOWN)
    side = names.side(item.category)
    one_sided = facts.sides.get(side or "", ())
    rng = Random(f"{seed}/{item.id}")
    positions = _positions(item, names, facts, rng)
    attributes, where = list(facts.clauses["attribute"]), [*facts.clauses["location"], *one_sided]
    rng.shuffle(attributes)
    rng.shuffle(where)
    longer, shorter = (where, positions) if len(where) > len(positions) else (positions, where)
    # Anatomy and positions alternate, so that each cell gets some of both.
    mixed = [each for pair in zip(longer, shorter, strict=False) for each in pair] + longer[len(shorter) :]
    return _Scene(
        item,
        Subject(names.canonical(item.category), facts.noun, side, facts.plural),
        {"attribute": tuple(attributes), "location": tuple(mixed)},
        alone=len(item.entities) >= _DENSE or not where or any(clause.kind == "effects" for clause in attributes),
        unsided=frozenset(phrase for clause in (*one_sided, *positions) for phrase in clause.phrases),
    )


def _item(fields: Mapping[str, Any]) -> Item:
    unused = dict.fromkeys(("record", "target", "image", "mask", "source", "case"), "")
    return Item(
        id=fields["item"],
        modality=fields["modality"],
        category=fields["category"],
        box=cast(Box, tuple(fields["box"])),
        entities=tuple(Entity(each["category"], cast(Box, tuple(each["box"]))) for each in fields["entities"]),
        width=1,
        height=1,
        **unused,
    )


def _positions(item: Item, names: Names, facts: Facts, rng: Random) -> list[Clause]:
    """Returns statements about where the target is, from the boxes; some of them if there are many."""
    others = list(item.entities)
    target = Entity(item.category, item.box)
    if target in others:
        others.remove(target)
    held = Counter(entity.category for entity in others)
    near = sorted(others, key=lambda entity: sum(abs(a - b) for a, b in zip(entity.box, item.box, strict=True)))
    landmarks = [
        Landmark(f"the {name}", entity.box, load_knowledge().get(names.base(name), UNKNOWN).compact)
        for entity in near
        if held[entity.category] == 1 and entity.category in names
        if not names.betrays(name := names.canonical(entity.category), item.category)
    ]
    found = statements(item.box, others, landmarks[:_MOST_LANDMARKS], compact=facts.compact)
    rng.shuffle(found)
    found.sort(key=lambda statement: len(statement.kinds))  # simple ones first
    kinds = [(each.phrase, "extent" if "extent" in each.kinds else "position") for each in found]
    return [Clause((phrase,), kind) for phrase, kind in kinds[:_MOST_POSITIONS]]


def _caption(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    shown = dict.fromkeys(f"the {_names().canonical(entity.category)}" for entity in scene.item.entities)
    *head, last = shown
    listed = f"{', '.join(head)} and {last}" if head else last
    return {"caption": f"This is {article(_modality(fields))} image. It shows {listed}."}


def _describe(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    place = 2 * (fields["variant"] - 1) + TEMPLATES.index(fields["template"])
    texts: dict[str, Any] = {}
    for perspective in PERSPECTIVES:
        # The descriptions of earlier templates and variants are drawn again, so that this one states the rest.
        used: list[Clause] = []
        for slot, length in product(range(place + 1), LENGTHS):
            attempt = fields["attempt"] if slot == place else 0
            rng = Random(f"{seed}/{scene.item.id}/{slot}/{perspective}/{length}/{attempt}")
            last = {clause: (used.count(clause), number) for number, clause in enumerate(used)}
            # Those used least and longest ago first.
            rest = sorted(scene.clauses[perspective], key=lambda clause, last=last: last.get(clause, (0, 0)))
            rotated = [*rest[attempt:], *rest[:attempt]]
            text, clauses = _description(scene, rotated, length, TEMPLATES[slot % 2], rng)
            used += clauses
            texts[f"{perspective}_{length}"] = text
    return texts


def _description(
    scene: _Scene, clauses: Sequence[Clause], length: Length, template: Template, rng: Random
) -> tuple[str, tuple[Clause, ...]]:
    """Returns the first description that keeps the rules, and its clauses; empty when there is none."""
    for phrase, used in _phrases(clauses, length, rng):
        if used[0].kind == "position" and not scene.alone:
            continue
        needs_side = scene.subject.side is not None and not any(part in phrase for part in scene.unsided)
        worded = list(descriptions(scene.subject, phrase, template, sided=needs_side))
        rng.shuffle(worded)
        for text in worded:
            if not check_description(text, length, scene.item, _names()):
                return text, used
    return "", ()


def _phrases(clauses: Sequence[Clause], length: Length, rng: Random) -> Iterator[tuple[str, tuple[Clause, ...]]]:
    """Yields phrases of one clause and, for long descriptions, of two, those of the first clauses first."""
    drawn = [(rng.choice(clause.phrases), clause) for clause in clauses]
    for i, (phrase, clause) in enumerate(drawn):
        if length == "long":
            for other, other_clause in drawn[i + 1 : i + 6]:
                both = ((phrase, clause), (other, other_clause))
                one, two = sorted(both, key=lambda each: _ORDER.index(each[1].kind))
                # Two diseases, or two statements from boxes, are too much at once.
                if one[1].kind in _BOXES or one[1].kind == two[1].kind == "diseases":
                    continue
                if joined := join(one[0], two[0]):
                    yield joined, (one[1], two[1])
        yield phrase, (clause,)


def _revise(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    revisions: list[dict[str, Any]] = []
    for cell, text in fields["descriptions"].items():
        verdict, reason = "keep", "it keeps the rules"
        if breaches := check_description(text, length_of(cell), scene.item, _names()):
            verdict, text, reason = "remove", "", breaches[0].reason
        revisions.append({"cell": cell, "verdict": verdict, "text": text, "reason": reason})
    return {"descriptions": revisions}


def _transform(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    repeated = {fault["cell"] for fault in fields["faults"] if fault["rule"] == "duplicate"}
    pairs: list[dict[str, str]] = []
    for cell, text in fields["descriptions"].items():
        rng = Random(f"{seed}/{scene.item.id}/{cell}/{text}/{fields['attempt']}")
        described, known = ("", text) if cell in repeated else (text, "")
        pairs.append({"cell": cell, **_pair(scene, cell, fields["template"], described, rng, known=known)})
    return {"pairs": pairs}


def _pair(
    scene: _Scene, cell: str, template: Template, description: str, rng: Random, *, known: str = ""
) -> dict[str, str]:
    """Returns a question and its answer; of a new description where the given one is empty or not in our wording.

    The question differs from the known one and states other facts, where there are any.
    """
    perspective, length = perspective_of(cell), length_of(cell)
    found = read(scene.subject, description)
    if not found:
        clauses = list(scene.clauses[perspective])
        rng.shuffle(clauses)
        clauses.sort(key=lambda clause: any(phrase in known for phrase in clause.phrases))
        found = read(scene.subject, _description(scene, clauses, length, template, rng)[0])
    if not found:
        return {"question": "", "answer": ""}
    phrase, sided = found
    question = text = ""
    for _ in range(_TRIES):
        question = word_question(scene.subject, phrase, template, length, rng, sided=sided)
        # Further facts: of the same perspective, but none from the question.
        others = [each for each in scene.clauses[perspective] if not any(alike(said, phrase) for said in each.phrases)]
        facts = [rng.choice(clause.phrases) for clause in others if clause.kind not in ("diseases", *_BOXES)]
        rng.shuffle(facts)
        text = word_answer(scene.subject, phrase, facts, rng)
        if question != known and not check_pair(question, text, length, scene.item, _names()):
            break
    return {"question": question, "answer": text}


def _converse(scene: _Scene, fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    rng = Random(f"{seed}/{scene.item.id}/{fields['attempt']}")
    cell = f"{fields['perspective']}-{fields['length']}"
    pair_rng = Random(f"{seed}/{scene.item.id}/{cell}/{fields['attempt']}")
    last = _pair(scene, cell, fields["template"], "", pair_rng)
    phrases = [
        rng.choice(clause.phrases)
        for clause in scene.clauses["attribute"]
        if not any(phrase in last["question"] for phrase in clause.phrases)
    ]
    rng.shuffle(phrases)
    modality = _modality(fields)
    words = {"modality": modality, "a_modality": article(modality), "phrase": phrases[0] if phrases else ""}
    words["a_noun"] = article(scene.subject.head(sided=True))
    turns: list[dict[str, str]] = []
    for kind in (_FIRST_TURNS, _KIND_TURNS, _FACT_TURNS if phrases else _FIRST_TURNS)[: fields["turns"] - 1]:
        worded = [{"question": question, "answer": text.format(**words)} for question, text in kind]
        rng.shuffle(worded)
        fitting = (
            turn
            for turn in worded
            if turn not in turns and not check_turn(turn["question"], turn["answer"], scene.item, _names())
        )
        turns += islice(fitting, 1)
    return {"turns": [*turns, last]}


def _modality(fields: Mapping[str, Any]) -> str:
    """Returns "MRI" for "mri_t1", "fundus photography" for "fundus_photography"."""
    words = str(fields["modality"]).replace("_", " ").split()
    return _MODALITIES.get(words[0].lower(), " ".join(words)) if words else "medical"


@dataclass(frozen=True)
class OfflineAuthor:
    """Answers from the knowledge that comes with the package."""

    seed: int

    async def send(self, request: Request) -> Reply:
        """Answers one request, free of charge."""
        return Reply(status="ok", text=canonical(answer(request.stage, request.fields, self.seed)))
