"""The command `medisee`: what it starts, what it refuses, and that it is quick where it can be."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medisee.cli import ALL, COMMANDS, console, main
from medisee.foundation.errors import InputError


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "medisee", *words], capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command renames the program; the other tests keep its name."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def test_help_names_every_command_and_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  medisee {command} " in shown for command in ALL)
    main([])
    assert capsys.readouterr().out == shown
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert run("--help").stdout == shown
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5
    code = "import sys; from medisee.cli import main; main(['--help']); print(bool({'torch', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_module_gets_the_rest(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr(importlib.import_module(f"medisee.{COMMANDS[command]}"), "main", got.append)
    main([command, "--out", "x", "train.lr=1e-4"])
    assert got == [["--out", "x", "train.lr=1e-4"]]


@pytest.mark.parametrize("command", [*COMMANDS, "plan", "info"])
def test_usage_names_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: medisee {command} ")


@pytest.mark.parametrize("script", ["inference", "train", "eval", "prepare_data", "download_weights"])
def test_a_script_keeps_its_name(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}.py"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"medisee.{script}").main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {script}.py ")


def test_an_unknown_command_names_the_nearest() -> None:
    done = run("trainn")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'trainn'; see medisee --help. Did you mean 'train'?\n"


def test_bad_input_of_a_command_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["medisee", "train", "--config", str(tmp_path / "none.yaml")])
    assert console() == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "none.yaml" in printed


def test_plan_takes_a_configuration_or_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[list[str]] = []
    asked: list[list[str]] = []
    monkeypatch.setattr("medisee.train.main", trained.append)
    monkeypatch.setattr("medisee.inference.main", asked.append)
    main(["plan", "--config", "c.yaml", "train.batch_size=4", "--gpu", "l4", "--gpus", "2"])
    main(["plan", "--checkpoint", "folder", "--gpu", "l4"])
    assert trained == [["--plan", "--config", "c.yaml", "--gpu", "l4", "--gpus", "2", "train.batch_size=4"]]
    assert asked == [["--plan", "--checkpoint", "folder", "--gpu", "l4"]]
    with pytest.raises(InputError, match="belong to --config"):
        main(["plan", "--checkpoint", "folder", "--gpus", "2"])
    with pytest.raises(SystemExit):
        main(["plan", "--gpu", "l4"])


def test_info_tells_what_is_here_without_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["info", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found["seg_heads"]) == {"sam", "medsam", "sam_med2d", "lite_medsam"}
    assert found["packages"]["torch"] and found["devices"][0]["device"] == "cpu"
    assert found["reads"]["images"] == ["PNG", "JPEG", "TIFF"]
    assert tuple(found["commands"]) == ALL
    main(["info"])
    text = capsys.readouterr().out
    assert all(word in text for word in (found["packages"]["torch"], "lite_medsam", "mask.png", "prepare"))
    code = (
        "import sys, pathlib, shutil; shutil.which = lambda name: None; pathlib.Path.exists = lambda path: False\n"
        "from medisee.cli import main; main(['info']); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


def test_info_writes_what_an_evaluation_writes() -> None:
    from medisee.evaluation.report import FILES
    from medisee.info import facts

    assert {*facts(ALL)["writes"]["evaluation"], "run.json"} == set(FILES)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.startswith("medisee 0.")


@pytest.mark.parametrize("word", ["-V", "--version", "version"])
def test_the_version_has_several_names(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([word])
    assert capsys.readouterr().out.startswith("medisee 0.")


def test_help_takes_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["help"])
    assert "medisee ask ..." in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["help", "plan"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: medisee plan ")


def test_questions_and_images_that_the_shell_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    from medisee.foundation.command_line import parse_words
    from medisee.inference import _parser

    monkeypatch.setenv("HOME", "/home/someone")
    words = ["--image", "a.png", "~/b.png", "--query", "What is it?", "脾在哪?", "--checkpoint=~/c", "--image", "d.png"]
    given = parse_words(_parser(), [*words, "--out=~/o"])
    assert given.image == [Path("a.png"), Path("/home/someone/b.png"), Path("d.png")]
    assert given.query == ["What is it?", "脾在哪?"]
    assert (given.checkpoint, given.out) == ("/home/someone/c", Path("/home/someone/o"))
