"""The start of a training: what it refuses before anything is written or computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from medisee.config.load import config_from
from medisee.config.model import Model
from medisee.foundation.errors import InputError, exit_code
from medisee.train import main, train
from medisee.training.resume import damage, saved_folders
from medisee.weights.missing import check_files, with_missing_weights

CONFIGS = Path(__file__).parents[1] / "configs"
Run = dict[str, Any]


@pytest.mark.parametrize("left", ["last-00000003", "checkpoint"])
def test_a_run_is_not_replaced_unasked(
    every_step: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    out, path = tmp_path / "run", tmp_path / "run.yaml"
    settings = {**every_step["train"], "out": str(out), "steps": 3, "val_every": 3}
    path.write_text(yaml.safe_dump({**every_step, "train": settings}))
    arguments = ["--config", str(path)]
    assert exit_code(main, arguments) == 0
    shutil.rmtree(out / ("checkpoint" if left.startswith("last-") else "last-00000003"))
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert exit_code(main, arguments) == 2
    assert f"{out}: already holds a run ({left})" in (message := capsys.readouterr().err)
    assert ("--resume" in message) == left.startswith("last-") and "--fresh" in message
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before
    assert exit_code(main, [*arguments, "--fresh", "train.seed=1"]) == 0
    assert json.loads((out / "run.json").read_text())["settings"]["train"]["seed"] == 1
    assert (out / "checkpoint").is_dir() and damage(out / "last-00000003") is None


def test_all_that_is_missing_is_named_at_once_with_where_to_get_it(
    every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path, config = tmp_path / "run.yaml", CONFIGS / "medisee_7b.yaml"
    path.write_text(yaml.safe_dump({"base": str(config), "train": {"out": str(tmp_path / "new")}}))
    assert exit_code(main, ["--config", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    for name in ("model.mllm.source", "model.seg_head.checkpoint", "data.train[0].records", "data.val"):
        assert any(line.startswith(f"error: {name} = ") and "python scripts/" in line for line in said), said
    # The data is there, the weights are not.
    model = {"mllm": {**every_step["model"]["mllm"], "source": "weights/none"}}
    path.write_text(yaml.safe_dump({**every_step, "model": {**every_step["model"], **model}}))
    assert exit_code(main, ["--config", str(path), f"train.out={tmp_path / 'new'}"]) == 2
    said = capsys.readouterr().err
    assert "weights/none" in said and "download_weights.py llava-med" in said and "Traceback" not in said


def test_resume_and_fresh_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--config", "configs/demo.yaml", "--resume", "--fresh"])
    assert caught.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_a_fresh_start_leaves_no_state_that_a_resume_could_take_for_its_own(
    every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    values = {**every_step, "train": {**every_step["train"], "out": str(out), "save_every": 100, "steps": 4}}
    train(config_from(values, where="test"))
    assert [folder.name for folder in saved_folders(out)] == ["last-00000004"]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("medisee.train._steps", killed)
        train(config_from(values, where="test"), fresh=True)
    with pytest.raises(InputError, match="nothing to resume"):
        train(config_from(values, where="test"), resume=True)


@pytest.mark.parametrize(("setting", "refused"), [("categories", False), ("root", False), ("val", True)])
def test_only_what_training_reads_must_be_there(every_step: Run, setting: str, refused: bool) -> None:
    data = {**every_step["data"], "val": None, setting: "none/at/all"}
    config = config_from({**every_step, "data": data}, where="test")
    if not refused:
        check_files(config)
        return
    with pytest.raises(InputError, match=r"data\.val = none/at/all: not on this machine .*or correct the setting"):
        check_files(config)


def test_weights_that_are_not_at_fault_are_not_named() -> None:
    model = Model.model_validate({"mllm": {"source": "weights/none"}})
    other = with_missing_weights(InputError("train.init holds another model"), model)
    assert other.problems == ("train.init holds another model",)
    named = with_missing_weights(InputError("weights/none: cannot be read"), model)
    assert len(named.problems) == 2 and "download_weights.py llava-med" in named.problems[1]
