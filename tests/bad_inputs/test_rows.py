"""Every row of bad input ends with its exit code and its sentence: no traceback, nothing half-written, nothing lost."""

from __future__ import annotations

import hashlib
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rows import Row, Workspace

from medisee.foundation.errors import exit_code

_TABLES = sorted(path.stem for path in Path(__file__).parent.glob("rows_*.py"))
ROWS: list[Row] = [row for table in _TABLES for row in import_module(table).ROWS]


@pytest.fixture
def workspace(tmp_path: Path, tiny_manifest: Path, tiny_checkpoint: Path, tiny_config: dict[str, Any]) -> Workspace:
    """A workspace of the test's own."""
    shutil.copytree(tiny_manifest.parent, tmp_path / "data")
    data = {
        **tiny_config["data"],
        "train": [{"records": str(tmp_path / "data" / "tiny.jsonl")}],
        "categories": str(tmp_path / "data" / "categories.json"),
    }
    settings = {**tiny_config, "data": data, "train": {**tiny_config["train"], "out": str(tmp_path / "run")}}
    return Workspace(tmp_path, tiny_checkpoint, settings)


def _files(folder: Path) -> dict[str, str]:
    """Returns every file below a folder with the digest of its content; caches that readers keep do not count."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".offsets.safetensors") and not path.is_fifo()
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command}-{row.name}")
def test_bad_input_is_refused_in_a_sentence(
    row: Row, workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace.folder)
    argv = [str(word) for word in row.make(workspace)]
    before = _files(workspace.folder)
    try:
        code = exit_code(row.main(), argv)
    except SystemExit as ended:  # argparse
        code = ended.code
    message = capsys.readouterr().err
    assert code == row.code, message
    assert "Traceback" not in message
    assert [word for word in row.words if word not in message] == [], message
    longest = max(map(len, message.splitlines()), default=0)
    assert longest < 700, "an error is one or two short sentences"
    assert _files(workspace.folder) == before, "nothing is half-written, nothing lost"


def test_names_of_rows_are_unique() -> None:
    names = [(row.command, row.name) for row in ROWS]
    assert len(names) == len(set(names))
