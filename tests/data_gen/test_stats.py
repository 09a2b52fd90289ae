"""Statistics: the numbers from a ledger and from its export, the tables, the command and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_gen import export, stats
from data_gen.core.items import Decision
from data_gen.ledger.ledger import Ledger
from data_gen.publishing.statistics import Statistics, balance, statistics_of_ledger
from medisee.foundation.errors import exit_code

LedgerMaker = Callable[..., Path]


def numbers(out: Path) -> dict[str, object]:
    return json.loads((out / "stats.json").read_text())


def of_ledger(path: Path) -> Statistics:
    with Ledger(path) as ledger:
        return statistics_of_ledger(ledger)


def test_numbers_of_a_ledger(make_ledger: LedgerMaker) -> None:
    found = of_ledger(make_ledger())
    assert found.images == {"liver": 5, "spleen": 5}
    assert found.pairs == {"liver": 20, "spleen": 20}
    assert found.cells == dict.fromkeys(("attribute short", "attribute long", "location short", "location long"), 10)
    assert sum(found.question_words["long"].values()) == 20
    assert (found.answer_words, found.author) == ({15: 10, 16: 30}, "models")
    assert (found.words["organ"], found.dropped) == (30, {"words": 1})
    assert found.calls[0]["model"] == "some-model"


def test_a_ledger_and_its_export_tell_the_same(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    for style in ("single", "multi-turn"):
        path = make_ledger(style=style, name=f"{style}.sqlite")
        with Ledger(path) as ledger:
            ledger.decide(Decision(ledger.pairs()[0].id, "anna", "reject", "wrong"))
        export.main(["--ledger", str(path), "--out", str(tmp_path / style)])
        stats.main(["--export", str(tmp_path / style), "--out", str(tmp_path / "stats")])
        expected = replace(of_ledger(path), calls=[], faults={})
        told = numbers(tmp_path / "stats")
        assert told["pairs"] == expected.pairs and told["images"] == expected.images
        assert told["cells"] == expected.cells and told["words"] == expected.words
        assert told["dropped"] == expected.dropped


def test_earlier_turns_do_not_count_as_asking(make_ledger: LedgerMaker) -> None:
    found = of_ledger(make_ledger(style="multi-turn"))
    assert found.pairs == {"liver": 15, "spleen": 15}
    assert found.cells["attribute short"] == sum(found.cells.values()) == 10


def test_the_command_writes_figures_and_tables(
    make_ledger: LedgerMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats.main(["--ledger", str(make_ledger(author="offline")), "--out", str(tmp_path / "out")])
    assert "40 pairs, 10 images, 2 categories, author: offline" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*numbers(tmp_path / "out")["figures"], "stats.json", "stats.md"}  # pyright: ignore[reportGeneralTypeIssues]
    assert "| liver | 20 | 5 |" in (tmp_path / "out/stats.md").read_text()
    assert "| words | 0 | 1 |" in (tmp_path / "out/stats.md").read_text()


def test_balance() -> None:
    assert balance({"a": 5, "b": 5}) == pytest.approx(1)
    assert balance({"a": 5, "b": 0}) == balance({"a": 5}) == balance({}) == 0
    assert 0 < balance({"a": 9, "b": 1}) < 1


def test_bad_input(make_ledger: LedgerMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str | Path) -> str:
        assert exit_code(stats.main, [str(word) for word in argv]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "no such ledger" in refused("--ledger", tmp_path / "none.sqlite", "--out", out)
    assert "data.json: cannot be read" in refused("--export", tmp_path, "--out", out)
    for content, told in (
        ('{"author": "models", "dropped": [1]}', "dropped.0"),
        ('{"author": "models", "dropped": [{"rule": "words", "count": "many"}]}', "dropped.0.count"),
        ('{"author": "me", "dropped": []}', "author"),
        ("[" * 9999, "nested too deeply"),
    ):
        (tmp_path / "data.json").write_text(content)
        assert told in refused("--export", tmp_path, "--out", out)
    (tmp_path / "data.json").write_text('{"author": "models", "dropped": []}')
    assert "holds no question" in refused("--export", tmp_path, "--out", out)
    assert "holds the ledger" in refused("--ledger", make_ledger(), "--out", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    assert "holds 'notes.txt', which is not" in refused("--ledger", make_ledger(), "--out", tmp_path / "mine")
    with Ledger(tmp_path / "empty.sqlite", create=True):
        pass
    assert "holds no pair" in refused("--ledger", tmp_path / "empty.sqlite", "--out", out)
    assert not out.exists()
