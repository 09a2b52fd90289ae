"""Banks of implicit queries about structures: read one, split it without overlap, draw questions for records.

What is drawn depends only on the seed and on the record and target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from medisee.foundation.errors import InputError
from medisee.foundation.files import write_json
from medisee.foundation.output import Result, check_output
from medisee.foundation.yaml_files import read_yaml
from medisee.records.prompts import reasoning_answer, reasoning_question
from medisee.records.records import LENGTHS, PERSPECTIVES, QA, SPLITS, Length, Perspective, Record, Split, write_records
from medisee.sources.brain import STRUCTURES

Cell: TypeAlias = tuple[Perspective, Length]

BANK_FILE = Path(__file__).with_name("demo_bank.yaml")
BANKS = {
    "brain": BANK_FILE,
    "abdomen": Path(__file__).with_name("abdomen_bank.yaml"),
    "patients": Path(__file__).with_name("patients_bank.yaml"),
}
HELD_OUT_SHARE = 0.11  # of each pool, for val and again for test


@dataclass(frozen=True)
class Pool:
    """The questions and explanations of one structure."""

    names: tuple[str, ...]  # words that count as naming it; the first is the category
    queries: Mapping[Cell, tuple[str, ...]]  # wordings that describe it without naming it
    explanations: Mapping[Perspective, tuple[str, ...]]  # sentences that name and explain it


def load_bank(path: Path = BANK_FILE, structures: Iterable[str] | None = tuple(STRUCTURES)) -> dict[str, Pool]:
    """Reads a query bank, YAML in the form of the banks that come with medisee: one pool for each structure.

    `structures` are their names, in order; by default the demo brain's. None takes all of the file.
    """
    content = read_yaml(path, "a query bank")
    entries = content.get("structures") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected a mapping with the key 'structures'.")
    wanted = [str(name) for name in entries] if structures is None else list(structures)
    problems = [
        f"{path}: structures > {name}: expected names, queries and explanations; add them."
        for name in wanted
        if not isinstance(entries.get(name), dict)
    ]

    def texts(least: int, *keys: str) -> tuple[str, ...]:
        value: Any = entries
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, list) and len(value) >= least and all(isinstance(text, str) for text in value):
            return tuple(value)
        where = f"{path}: structures > {' > '.join(keys)}"
        problems.append(f"{where}: expected a list of at least {least} texts; add them.")
        return ()

    pools = {
        name: Pool(
            names=texts(1, name, "names"),
            queries={
                (one, length): texts(3, name, "queries", one, length) for one in PERSPECTIVES for length in LENGTHS
            },
            explanations={one: texts(1, name, "explanations", one) for one in PERSPECTIVES},
        )
        for name in wanted
        if isinstance(entries.get(name), dict)
    }
    if problems:
        raise InputError(problems)
    return pools


def split_bank(bank: Mapping[str, Pool], seed: int) -> dict[Split, dict[str, Pool]]:
    """Gives each split its own wordings: about 78 % train, 11 % val, 11 % test of every list, at least one each.

    The order depends only on the seed and each wording's text, so adding wordings moves few others.
    """
    parts: dict[Split, dict[str, Pool]] = {split: {} for split in SPLITS}
    for name, pool in bank.items():
        queries: dict[Split, dict[Cell, tuple[str, ...]]] = {split: {} for split in SPLITS}
        for cell, wordings in pool.queries.items():
            ranked = tuple(sorted(wordings, key=lambda query: hashlib.sha256(f"{seed} {query}".encode()).hexdigest()))
            few = max(1, round(len(ranked) * HELD_OUT_SHARE))
            queries["val"][cell], queries["test"][cell] = ranked[:few], ranked[few : 2 * few]
            queries["train"][cell] = ranked[2 * few :]
        for split, part in parts.items():
            part[name] = replace(pool, queries=queries[split])
    return parts


def training_questions(pool: Pool, count: int, rng: Random) -> tuple[QA, ...]:
    """Draws `count` different wordings, spread evenly over perspectives and lengths; fewer when the pool is smaller."""
    cells = [[(cell, query) for query in rng.sample(queries, len(queries))] for cell, queries in pool.queries.items()]
    rng.shuffle(cells)
    drawn = [item for turn in zip_longest(*cells) for item in turn if item is not None][:count]
    return tuple(_ask(pool, cell, query, rng) for cell, query in drawn)


def held_out_questions(pool: Pool, turn: int, rng: Random) -> tuple[QA, ...]:
    """Draws one short and one long question of different perspectives; odd turns swap the two perspectives."""
    perspectives = PERSPECTIVES if turn % 2 == 0 else PERSPECTIVES[::-1]
    cells = list(zip(perspectives, LENGTHS, strict=True))
    return tuple(_ask(pool, cell, rng.choice(pool.queries[cell]), rng) for cell in cells)


def _ask(pool: Pool, cell: Cell, query: str, rng: Random) -> QA:
    perspective, length = cell
    answer = reasoning_answer(rng.choice(pool.explanations[perspective]), rng)
    return QA(reasoning_question(query, rng), answer, perspective, length)


def _with_questions(
    records: Iterable[Record], pools: Mapping[str, Pool], seed: int, count: int | None = None
) -> list[Record]:
    """Gives each target `count` training questions or, without a count, the two held-out ones."""
    made: list[Record] = []
    for turn, record in enumerate(records):
        targets = []
        for place, target in enumerate(record.targets):
            pool, rng = pools[target.category], Random(f"{seed}/{record.id}/{target.id}")
            qa = held_out_questions(pool, turn + place, rng) if count is None else training_questions(pool, count, rng)
            targets.append(replace(target, qa=qa))
        made.append(replace(record, targets=tuple(targets)))
    return made


QUESTION_FILES = (
    r"(train_class|train_reasoning|val|test|test_seen)\.(jsonl|offsets\.safetensors)|categories\.json|run\.json"
)
"""The files of a data set with questions, beside its own; a command may add run.json."""


def check_settings(
    numbers: Mapping[str, tuple[int | None, int]], out: Path, result: Result, inputs: Mapping[str, Path | None]
) -> None:
    """Checks what a data set with questions is made of, and its folder; see `check_output`.

    `numbers` has the value and the least allowed value of each setting; None is not checked.
    """
    problems = [
        f"{name} is {value}; expected {least} or more; raise it."
        for name, (value, least) in numbers.items()
        if value is not None and value < least
    ]
    try:
        check_output(out, result, inputs=inputs, whole=True)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)


def write_questions(
    folder: Path, plain: Mapping[Split, list[Record]], bank: Mapping[str, Pool], seed: int, count: int
) -> dict[str, list[Record]]:
    """Writes the manifests of a data set with questions, and categories.json, the names of each category.

    Returns:
        The records of each manifest, by its name: train_class (without questions), train_reasoning (`count` questions
        for each target), val, test, and test_seen, which repeats test with wordings of training.
    """
    wordings = split_bank(bank, seed)
    manifests = {
        "train_class": plain["train"],
        "train_reasoning": _with_questions(plain["train"], wordings["train"], seed, count),
        "val": _with_questions(plain["val"], wordings["val"], seed),
        "test": _with_questions(plain["test"], wordings["test"], seed),
        # What a model loses on test but not here, it loses by the wording. Its ids differ, so one evaluation takes both.
        "test_seen": _with_questions(
            (replace(record, id=f"{record.id}_seen") for record in plain["test"]), wordings["train"], seed
        ),
    }
    for name, records in manifests.items():
        write_records(folder / f"{name}.jsonl", records)
    write_json(folder / "categories.json", {name: pool.names for name, pool in bank.items()})
    return manifests
