"""Damaged ledgers: every command gives a right answer or one sentence, and leaves the file as it is."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_gen import export, review, run, stats
from data_gen.core.calls import Answer, Fault, Reply
from data_gen.core.items import Decision
from data_gen.ledger.ledger import Ledger
from medisee.foundation.errors import InputError, exit_code

LedgerMaker = Callable[..., Path]


@pytest.fixture
def path(make_ledger: LedgerMaker) -> Path:
    """A ledger with something in every table."""
    path = make_ledger(cases=4)
    with Ledger(path) as ledger:
        ((key,),) = ledger.answers._store.read("SELECT key FROM requests")
        reply = Reply(status="ok", text="{}", usage_in=5, usage_out=2, price=0.5)
        ledger.answers.store(key, Answer(reply, 1, (Fault("attribute-short", "words", "too long"),))).result()
        ledger.answers.start_batch("token", 1)
        ledger.decide(Decision(ledger.pairs()[0].id, "anna", "accept"))
    return path


def everything(path: Path) -> list[Any]:
    """Reads all that a ledger holds."""
    with Ledger(path) as ledger:
        answers = ledger.answers
        keys = [key for (key,) in answers._store.read("SELECT key FROM requests ORDER BY key")]
        return [
            ledger.settings(),
            ledger.root(),
            ledger.items(),
            list(ledger.open_items("other")),
            ledger.count_open("single"),
            ledger.pairs(),
            ledger.count_pairs(),
            ledger.drops(),
            ledger.decisions(),
            [(answers.body(key), answers.find(key), answers.stage(key)) for key in keys],
            answers.counts(),
            answers.faults(),
            answers.spent(),
            answers.open_batches(),
        ]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Flips some bytes, or cuts the file, or overwrites a piece."""
    kind = draw.choice(("flip", "flip", "flips", "cut", "zeros"))
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    start = draw.randrange(len(content))
    if kind == "zeros":
        changed[start : start + 600] = bytes(len(changed[start : start + 600]))
    for _ in range({"flip": 1, "flips": 40}.get(kind, 0)):
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def shape(value: Any) -> Any:
    """Returns the types of a value: a letter that was changed in a text cannot be noticed, a lost row can."""
    if isinstance(value, list):
        return [shape(each) for each in value]
    return type(value)


def test_of_two_hundred_damaged_ledgers_each_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    content, draw = path.read_bytes(), random.Random(0)
    expected = shape(everything(path))
    copy, outcomes = tmp_path / "copy.sqlite", Counter[str]()
    for number in range(200):
        copy.write_bytes(changed := damaged(content, draw))
        try:
            found = everything(copy)
        except InputError as error:
            outcomes["refused"] += 1
            assert str(copy) in str(error) and len(error.problems) == 1 and len(str(error)) < 700, number
            assert copy.read_bytes() == changed, "a refused ledger stays as it is"
        else:
            outcomes["read"] += 1
            assert shape(found) == expected, number
    assert outcomes["refused"] > 60 and outcomes["read"] > 20, outcomes


@pytest.mark.parametrize("seed", range(4))
def test_commands_refuse_damaged_ledgers_in_a_sentence(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    content, draw = path.read_bytes(), random.Random(seed)
    for number in range(50):
        path.write_bytes(changed := damaged(content, draw))
        out = tmp_path / f"out{number}"
        command, argv = draw.choice(
            [(export.main, ["--out", str(out)]), (stats.main, ["--out", str(out)]), (review.main, ["--reviewer", " "])]
        )
        if command is stats.main:
            continue  # it draws figures
        code = exit_code(command, ["--ledger", str(path), *argv])
        err = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in err
        if code:
            assert path.read_bytes() == changed and not out.exists()


WRONG = {
    "an item's JSON": "UPDATE items SET content = '{' WHERE number = 1",
    "an item's nesting": f"UPDATE items SET content = '{'[' * 5000}' WHERE number = 1",
    "an item's types": "UPDATE items SET content = json_set(content, '$.width', 'wide') WHERE number = 1",
    "an item's box": "UPDATE items SET content = json_set(content, '$.box', json('[0, 0, 5, 5]')) WHERE number = 1",
    "an item's keys": "UPDATE items SET content = json_remove(content, '$.case') WHERE number = 1",
    "an item's id": "UPDATE items SET content = json_set(content, '$.id', 'x') WHERE number = 1",
    "an item that is gone": "DELETE FROM items WHERE number = 2",
    "a pair's JSON": "UPDATE pairs SET content = 'x'",
    "a pair's list": "UPDATE pairs SET content = '[]'",
    "a pair's types": "UPDATE pairs SET content = json_set(content, '$.question', 3)",
    "a pair's words": "UPDATE pairs SET content = json_set(content, '$.answer', ' ')",
    "a pair's form": "UPDATE pairs SET content = json_set(content, '$.length', 'middling')",
    "a pair's keys": "UPDATE pairs SET content = json_set(content, '$.more', 1)",
    "a pair's surrogate": """UPDATE pairs SET content = json_set(content, '$.author', json('"\\ud800"'))""",
    "a pair's state": "UPDATE pairs SET state = 'keqt'",
    "a decision": "UPDATE decisions SET verdict = 'perhaps'",
    "a drop": "UPDATE drops SET reason = x'ff'",
    "an answer's status": "UPDATE answers SET status = 'oj'",
    "an answer's verdict": "UPDATE answers SET verdict = '[[1]]'",
    "an answer's attempt": "UPDATE answers SET attempt = 'first'",
    "a stage": "UPDATE requests SET stage = 'dezcribe'",
    "a form": "UPDATE forms SET content = '[1]'",
    "a form that is gone": "DELETE FROM forms",
    "the settings": "UPDATE facts SET value = '[]' WHERE name = 'settings'",
    "the root": "UPDATE facts SET value = 'a' || char(0) WHERE name = 'root'",
    "a table's columns": "ALTER TABLE pairs RENAME COLUMN state TO stage",
    "a table": "DROP TABLE decisions",
    "the version": "PRAGMA user_version = 2",
}


@pytest.mark.parametrize("statement", WRONG.values(), ids=WRONG.keys())
def test_what_no_run_writes_is_refused(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as raw:
        raw.execute(statement)
    raw.close()
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        everything(path)
    assert str(path) in str(caught.value) and path.read_bytes() == before


def test_a_run_refuses_a_damaged_ledger(
    path: Path, records: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(4096) + content[8192:])
    before = path.read_bytes()
    argv = ["--records", str(records(1)), "--ledger", str(path), "--author", "offline"]
    assert exit_code(run.main, argv) == 2
    err = capsys.readouterr().err
    assert f"{path}: not a ledger, or a damaged one" in err and ".recover" in err
    assert path.read_bytes() == before


def test_damage_that_begins_in_the_middle_is_told(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger._store.execute("DROP TABLE drops").result()
        with pytest.raises(InputError, match=r"cannot be read \(no such table: drops\)"):
            ledger.drops()


def test_a_ledger_whose_last_writes_are_beside_it_is_whole(path: Path, tmp_path: Path) -> None:
    """A killed run leaves its last transactions in the WAL file."""
    with Ledger(path) as ledger:
        pair = ledger.pairs()[0].id
        ledger.decide(Decision(pair, "ben", "accept"))
        copies = [tmp_path / "copy" / each.name for each in (path, path.with_name(f"{path.name}-wal"))]
        copies[0].parent.mkdir()
        for source, copy in zip((path, path.with_name(f"{path.name}-wal")), copies, strict=True):
            copy.write_bytes(source.read_bytes())
    with Ledger(copies[0]) as ledger:
        assert [decision.reviewer for decision in ledger.decisions()] == ["anna", "ben"]
    with Ledger(copies[0]) as ledger:
        assert [decision.reviewer for decision in ledger.decisions()] == ["anna", "ben"]
