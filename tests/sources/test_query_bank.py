"""The banks describe every structure without naming it, and their splits share no wording."""

import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import yaml

from medisee.foundation.errors import InputError
from medisee.sources.brain import STRUCTURES
from medisee.sources.query_bank import (
    BANK_FILE,
    BANKS,
    Pool,
    held_out_questions,
    load_bank,
    split_bank,
    training_questions,
)

BANK = load_bank()
ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
STRUCTURES_OF_PATIENTS = (
    "left ventricle",
    "right ventricle",
    "myocardium",
    "polyp",
    "fetal head",
    "anterior hippocampus",
    "posterior hippocampus",
)
# Sources store slices either way up: a query about a side of the picture would be wrong for some.
SIDE_OF_PICTURE = r"\b(image|picture)('s)? (left|right|top|bottom)|(left|right|top|bottom|upper|lower)[ \w]* of (the|this) (image|picture|scan|slice)"
every_bank = pytest.mark.parametrize("bank", [load_bank(path, None) for path in BANKS.values()], ids=list(BANKS))
CELLS = [(name, cell) for name, pool in BANK.items() for cell in pool.queries]


def _place(names: tuple[str, ...], text: str) -> int:
    """Where a text first names one of `names` as whole words; -1 when it does not."""
    found = re.search(r"\b(" + "|".join(map(re.escape, names)) + r")\b", text, re.IGNORECASE)
    return found.start() if found else -1


def test_every_structure_has_a_full_pool() -> None:
    assert list(BANK) == list(STRUCTURES)
    for name, pool in BANK.items():
        assert pool.names[0] == name
        assert {len(queries) for queries in pool.queries.values()} == {64}, name
        assert all(len(texts) >= 4 for texts in pool.explanations.values()), name


def test_the_abdomen_has_all_organs() -> None:
    bank = load_bank(BANKS["abdomen"], None)
    assert tuple(bank) == ORGANS
    for name, pool in bank.items():
        assert pool.names[0] == name
        assert {len(queries) for queries in pool.queries.values()} == {44}, name
        assert all(len(texts) >= 4 for texts in pool.explanations.values()), name


def test_the_patients_bank_has_the_structures_of_the_public_sets() -> None:
    bank = load_bank(BANKS["patients"], None)
    assert tuple(bank) == STRUCTURES_OF_PATIENTS
    for name, pool in bank.items():
        assert pool.names[0] == name
        assert {len(queries) for queries in pool.queries.values()} == {24}, name
        assert all(len(texts) >= 4 for texts in pool.explanations.values()), name


@every_bank
def test_no_query_names_its_target(bank: dict[str, Pool]) -> None:
    for name, pool in bank.items():
        for queries in pool.queries.values():
            assert [query for query in queries if _place(pool.names, query) >= 0] == [], name


@every_bank
def test_no_query_speaks_of_sides_of_the_picture(bank: dict[str, Pool]) -> None:
    queries = [query for pool in bank.values() for cell in pool.queries.values() for query in cell]
    assert [query for query in queries if re.search(SIDE_OF_PICTURE, query, re.IGNORECASE)] == []


@every_bank
def test_explanations_name_the_target_first(bank: dict[str, Pool]) -> None:
    for name, pool in bank.items():
        for text in (text for texts in pool.explanations.values() for text in texts):
            own = _place(pool.names, text)
            others = [_place(other.names, text) for key, other in bank.items() if key != name]
            assert 0 <= own <= min([place for place in others if place >= 0], default=own), text


@every_bank
def test_long_queries_are_longer(bank: dict[str, Pool]) -> None:
    for name, pool in bank.items():
        for perspective in ("attribute", "location"):
            short, long = (pool.queries[perspective, length] for length in ("short", "long"))
            assert max(len(query.split()) for query in short) <= 16, name
            assert min(len(query.split()) for query in long) >= 10, name


@every_bank
def test_no_wording_is_there_twice(bank: dict[str, Pool]) -> None:
    queries = Counter(q.casefold() for pool in bank.values() for cell in pool.queries.values() for q in cell)
    assert [query for query, count in queries.items() if count > 1] == []


def test_names_belong_to_one_structure() -> None:
    banks = [load_bank(path, None) for path in BANKS.values()]
    names = Counter(name.casefold() for bank in banks for pool in bank.values() for name in pool.names)
    assert max(names.values()) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_split_pools_are_disjoint_and_whole(seed: int) -> None:
    parts = split_bank(BANK, seed)
    for name, cell in CELLS:
        train, val, test = (parts[split][name].queries[cell] for split in ("train", "val", "test"))
        assert (len(train), len(val), len(test)) == (50, 7, 7)
        assert sorted(train + val + test) == sorted(BANK[name].queries[cell])


def test_the_split_depends_on_the_seed() -> None:
    assert split_bank(BANK, 0) == split_bank(BANK, 0)
    assert split_bank(BANK, 0) != split_bank(BANK, 1)


def test_training_questions_are_different_and_spread_evenly() -> None:
    pool = split_bank(BANK, 0)["train"]["thalamus"]
    questions = training_questions(pool, 8, Random(0))
    assert set(Counter((qa.perspective, qa.length) for qa in questions).values()) == {2}
    assert len({qa.question for qa in questions}) == 8
    assert len(training_questions(pool, 1000, Random(0))) == 4 * 50
    assert training_questions(pool, 3, Random(1)) != training_questions(pool, 3, Random(2))


@pytest.mark.parametrize("turn", range(4))
def test_held_out_questions_alternate(turn: int) -> None:
    short, long = held_out_questions(split_bank(BANK, 0)["val"]["insula"], turn, Random(0))
    perspectives = ("attribute", "location") if turn % 2 == 0 else ("location", "attribute")
    assert (short.length, long.length) == ("short", "long")
    assert (short.perspective, long.perspective) == perspectives


def test_answers_explain_from_the_same_perspective() -> None:
    pool = BANK["putamen"]
    for qa in training_questions(pool, 16, Random(3)):
        assert qa.perspective != "class"
        assert any(qa.answer.endswith(text) for text in pool.explanations[qa.perspective])


def test_all_gaps_of_a_bank_are_told_at_once(tmp_path: Path) -> None:
    content = yaml.safe_load(BANK_FILE.read_text(encoding="utf-8"))
    del content["structures"]["insula"]
    content["structures"]["thalamus"]["queries"]["location"]["long"] = ["only one"]
    content["structures"]["putamen"]["names"] = "putamen"
    path = tmp_path / "bank.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_bank(path)
    assert len(error.value.problems) == 3
    assert "thalamus > queries > location > long: expected a list of at least 3 texts" in str(error.value)


@pytest.mark.parametrize("content", ["[1, 2]", "structures: 3", "a: [", ""])
def test_a_file_that_is_no_bank_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bank.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"bank\.yaml"):
        load_bank(path)
