"""The second stage: a run that starts from a checkpoint, with L_sim; and its configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medisee.config import Config
from medisee.config.load import config_from, load_config
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.records.manifest import Manifest
from medisee.train import train
from medisee.training.initial_model import build_model, build_tokenizer, read_records
from medisee.training.ranks import Place
from medisee.training.run_log import TELEMETRY
from medisee.weights.missing import missing_files

CONFIGS = Path(__file__).parents[1] / "configs"

Run = dict[str, Any]


def second_stage(run: Run, checkpoint: Path, out: Path, **train: Any) -> Config:
    settings = {"out": str(out), "init": str(checkpoint), "steps": 4, "log_every": 1, "save_every": 2, "lr": 3e-3}
    values = {"loss": {"js": 2.0, "mse": 1.0}, "train": {**run["train"], **settings, **train}}
    return config_from({**run, **values}, where="test")


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_starts_from_a_checkpoint(
    tiny_config: Run, tiny_manifest: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = second_stage(tiny_config, tiny_checkpoint, tmp_path)
    first = MediSee.from_pretrained(tiny_checkpoint)
    # Other texts would give a newly trained tokenizer other words.
    model = build_model(config, build_tokenizer(config, set()))
    assert model.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    expected, found = first.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    config = config_from(tiny_config, where="test")
    read = read_records(config, [Manifest(tiny_manifest)], None, Place(0, 1, torch.device("cpu")))
    fresh = build_model(config, read.tokenizer).state_dict()
    assert any(not torch.equal(found[name], value) for name, value in fresh.items())


def test_fine_tuning_logs_l_sim_and_resumes(tiny_config: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = second_stage(tiny_config, tiny_checkpoint, tmp_path / "whole")
    folder = train(config)
    logged = [line for line in lines(tmp_path / "whole") if "total" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert all(line["js"] > 0 and line["mse"] > 0 for line in logged)
    first, last = MediSee.from_pretrained(tiny_checkpoint).state_dict(), MediSee.from_pretrained(folder).state_dict()
    assert any(not torch.equal(first[name], value) for name, value in last.items())
    assert train(config, resume=True) == folder


def test_without_l_sim_its_terms_are_zero(tiny_config: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = second_stage(tiny_config, tiny_checkpoint, tmp_path, steps=1)
    train(config.model_copy(update={"loss": config.loss.model_copy(update={"js": 0.0, "mse": 0.0})}))
    (logged,) = (line for line in lines(tmp_path) if "total" in line)
    assert logged["js"] == logged["mse"] == 0


@pytest.mark.parametrize("language", [{}, {"train": "lora", "lora": {"rank": 2, "dropout": 0.0}}], ids=["full", "lora"])
@pytest.mark.parametrize("change", [{}, {"recompute_layers": True}], ids=["kept", "recomputed"])
def test_a_training_that_reads_one_by_one_is_the_same(
    tiny_config: Run, tmp_path: Path, language: dict[str, Any], change: dict[str, Any]
) -> None:
    model = {**tiny_config["model"], "mllm": {**tiny_config["model"]["mllm"], **language, "prefix_attention": "full"}}
    logged = []
    for name in ("together", "unpadded"):
        settings = {"out": str(tmp_path / name), "steps": 3, "log_every": 1, "lr": 3e-3, **change}
        values = {"model": model, "loss": {"js": 2.0, "mse": 1.0}, "train": {**tiny_config["train"], **settings}}
        config = config_from({**tiny_config, **values}, where="test")
        train(config.model_copy(update={"train": config.train.model_copy(update={"unpadded": name == "unpadded"})}))
        logged.append([line for line in lines(tmp_path / name) if "total" in line])
    for ours, theirs in zip(*logged, strict=True):
        for line in (ours, theirs):
            for key in TELEMETRY:
                del line[key]
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert ours["js"] > 0


def test_another_model_is_refused(tiny_config: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = {**tiny_config["model"], "seg_head": {**tiny_config["model"]["seg_head"], "pixels": "minmax"}}
    config = second_stage({**tiny_config, "model": {**model, "box_hidden": 8}}, tiny_checkpoint, tmp_path)
    with pytest.raises(InputError) as caught:
        build_tokenizer(config, set())
    (problem,) = caught.value.problems
    assert "config.json: train.init holds a model with model." in problem
    assert "model.seg_head.pixels" in problem or "model.box_hidden = 16, but the run says 8" in problem


def test_no_checkpoint_is_refused_and_named_beforehand(tiny_config: Run, tmp_path: Path) -> None:
    config = second_stage(tiny_config, tmp_path / "none" / "at" / "all", tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        build_tokenizer(config, set())
    assert "train.init" in [missing.setting for missing in missing_files(config)]


@pytest.mark.parametrize(
    ("name", "first", "weights"),
    [
        ("medisee_7b_ft", "medisee_7b", (2.0, 1.0)),
        ("demo_ft", "demo", (2.0, 1.0)),
        ("ablations/without_l_sim", "medisee_7b", (0.0, 0.0)),
        ("ablations/demo_without_l_sim", "demo", (0.0, 0.0)),
    ],
)
def test_configurations_of_the_second_stage(name: str, first: str, weights: tuple[float, float]) -> None:
    config, before = load_config(CONFIGS / f"{name}.yaml"), load_config(CONFIGS / f"{first}.yaml")
    assert (config.loss.js, config.loss.mse) == weights
    assert (before.loss.js, before.loss.mse, before.train.init) == (0.0, 0.0, None)
    assert config.model == before.model
    assert config.train.init == f"{before.train.out}/checkpoint"
    assert config.train.out != before.train.out
    (source,) = config.data.train
    assert source.records in [one.records for one in before.data.train] and source.from_step == 0
