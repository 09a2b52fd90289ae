from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from medisee.foundation.command_line import a_path, parse_words, path_or_override
from medisee.foundation.errors import InputError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--resume", action="store_true")
    made.add_argument("--out", type=a_path)
    made.add_argument("--records", type=path_or_override, nargs="+", action="extend", default=[])
    made.add_argument("overrides", nargs="*")
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["a=1", "b=2", "--resume", "--out", "x"],
        ["a=1", "--resume", "b=2", "--out", "x"],
        ["a=1", "--out", "x", "b=2", "--resume"],
        ["--out=x", "--resume", "a=1", "b=2"],
        ["--resume", "a=1", "--out", "x", "b=2"],
    ],
)
def test_overrides_stand_anywhere(words: list[str]) -> None:
    given = parse_words(parser(), words, more="overrides")
    assert (given.overrides, given.resume, given.out) == (["a=1", "b=2"], True, Path("x"))


def test_overrides_stand_anywhere_behind_a_subcommand() -> None:
    made = argparse.ArgumentParser()
    inner = made.add_subparsers(dest="command").add_parser("convert")
    inner.add_argument("--out")
    inner.add_argument("overrides", nargs="*")
    assert parse_words(made, ["convert", "a=1", "--out", "x", "b=2"], more="overrides").overrides == ["a=1", "b=2"]


@pytest.mark.parametrize("words", [["a=1", "--resum", "--bogus", "b=2"], ["--bogus=1"], ["a=1", "--out", "x", "-b=2"]])
def test_unknown_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_words(parser(), words, more="overrides")
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_several_values_and_what_follows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "split=2.jsonl").touch()
    words = ["--records", "a.jsonl", "split=2.jsonl", "--records", "./b=1", "eval.x=1", "--resume", "train.out=a//b"]
    given = parse_words(parser(), words, more="overrides")
    assert given.records == [Path("a.jsonl"), Path("split=2.jsonl"), Path("b=1"), "eval.x=1"]
    assert given.overrides == ["train.out=a//b"]


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_words(parser(), ["--out=~/x"]).out == Path("/home/someone/x")
    assert parse_words(parser(), ["--out", "./~x"]).out == Path("~x")


@pytest.mark.parametrize("text", ["", " ", "a\0b"])
def test_what_is_not_a_path(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_words(parser(), ["--out", text])
    assert "argument --out: expected a path" in capsys.readouterr().err


def test_bytes_are_told() -> None:
    with pytest.raises(InputError, match="is not UTF-8 text"):
        parse_words(parser(), ["--out", "a\udcff"])
    assert parse_words(parser(), ["--out", "脾 é"]).out == Path("脾 é")


def test_a_stray_word_behind_a_command_without_overrides_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    from medisee.convert import main

    with pytest.raises(SystemExit):
        main(["merge", "--checkpoint", "a", "--out", "b", "junk"])
    assert "unrecognized arguments: junk" in capsys.readouterr().err
