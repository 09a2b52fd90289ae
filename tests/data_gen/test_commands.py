"""The commands together: their help, the packages that they need, and the names that they share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_server import FakeServer

from data_gen import __main__ as command
from data_gen.ledger.ledger import Ledger
from data_gen.publishing.review_session import Refused, ReviewSession
from medisee.foundation.errors import exit_code

Capture = pytest.CaptureFixture[str]


def test_the_first_word_names_the_command(capsys: Capture) -> None:
    assert exit_code(command.main, ["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"python -m data_gen {name} ..." in told for name in command.COMMANDS)
    assert exit_code(command.main, ["rum"]) == 2
    assert "Did you mean 'run'?" in capsys.readouterr().err
    for name in command.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            command.main([name, "--help"])
        assert caught.value.code == 0 and f"python -m data_gen {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "package"), [(n, each) for n, packages in command.COMMANDS.items() for each in packages]
)
def test_a_missing_package_is_told_with_its_remedy(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert exit_code(command.main, [name, "--help"]) == 2
    told = capsys.readouterr().err
    assert f"python -m data_gen {name}: needs {package}; " in told and "pip install -e '.[engine]'" in told


HIDDEN = ("openai", "datasets", "pyarrow", "wordcloud", "starlette", "uvicorn")
PROGRAM = """
import sys
hidden, argv = sys.argv[1].split(","), sys.argv[2:]
sys.modules.update(dict.fromkeys(filter(None, hidden)))
from data_gen.__main__ import main
main(argv)
"""


@pytest.mark.parametrize("name", ["review", "export", "stats"])
def test_what_is_asked_for_is_all_that_is_needed(name: str, make_ledger: Callable[..., Path], tmp_path: Path) -> None:
    """Each command works without the packages of the extra that only others need."""
    needed = {*command.COMMANDS[name], *(["pyarrow"] if name == "export" else [])}  # datasets brings pyarrow along
    more = ["--help"] if name == "review" else ["--ledger", str(make_ledger()), "--out", str(tmp_path / "out")]
    hidden = ",".join(each for each in HIDDEN if each not in needed)
    done = subprocess.run([sys.executable, "-c", PROGRAM, hidden, name, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("python -m data_gen review" if name == "review" else "done: ") in done.stdout


def test_further_names_are_given_once_and_count_in_every_command(
    records: Callable[[int], Path], serve: Callable[..., FakeServer], tmp_path: Path, capsys: Capture
) -> None:
    names, path = tmp_path / "names.yaml", tmp_path / "l.sqlite"
    names.write_text("spleen: {names: [lien, blood sponge]}\nkidney: {names: [ren, water sieve], sided: true}\n")
    argv = ["run", "--records", str(records(1)), "--ledger", str(path), "--base-url", serve().url, "--model", "m"]
    argv += ["--free", "--variants", "1"]
    command.main([*argv, "--names", str(names)])
    assert exit_code(command.main, argv) == 2, "another run must be given the same"
    assert "names = " in capsys.readouterr().err
    names.unlink()
    with Ledger(path) as ledger:
        pair, category = ledger.pairs()[0], ledger.items()[0].category
        told = {"spleen": "blood sponge", "left kidney": "left water sieve"}[category]
        body = {
            "pair": pair.id,
            "verdict": "edit",
            "question": f"Which {told} of the upper belly is shown here and cleans the blood?",
        }
        with pytest.raises(Refused) as caught:
            ReviewSession(ledger, "anna").decide({**body, "answer": pair.answer})
        assert [breach["rule"] for breach in caught.value.content["breaches"]] == ["names_target"]
    command.main(["export", "--ledger", str(path), "--out", str(tmp_path / "out")])
    assert told in json.loads((tmp_path / "out/categories.json").read_text())[category]


def test_a_wrong_table_of_names_is_told(records: Callable[[int], Path], tmp_path: Path, capsys: Capture) -> None:
    names = tmp_path / "names.yaml"
    names.write_text("spleen: {synonyms: [lien]}\n")
    common = ["--records", str(records(1)), "--author", "offline", "--names"]
    for argv in (["plan", *common], ["run", "--ledger", str(tmp_path / "l.sqlite"), *common]):
        assert exit_code(command.main, [*argv, str(names)]) == 2
        assert f"{names}: spleen: holds" in capsys.readouterr().err
        assert exit_code(command.main, [*argv, str(tmp_path / "gone.yaml")]) == 2
        assert "gone.yaml: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "l.sqlite").exists()


def test_bad_options_of_a_plan_are_all_told(records: Callable[[int], Path], tmp_path: Path, capsys: Capture) -> None:
    path = str(records(1))
    assert exit_code(command.main, ["plan", "--records", path, "--again", "99", "--variants", "0", "--limit", "0"]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in ("either --model", "--again is 99", "--variants is 0", "--limit is 0"))
    assert exit_code(command.main, ["plan", "--records", str(tmp_path / "gone.jsonl"), "--author", "offline"]) == 2
    assert "gone.jsonl" in capsys.readouterr().err
    assert exit_code(command.main, ["plan", "--records", path, "--model", "nobody-knows"]) == 2
    assert "no price is known" in capsys.readouterr().err
