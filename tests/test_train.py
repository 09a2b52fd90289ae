"""Training: an exact resume, a kill at any step, ranks that agree with one, selection on val, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from medisee.config import Config, config_from
from medisee.errors import InputError, exit_code
from medisee.optimization import warmup_decay
from medisee.train import main, train

Run = dict[str, Any]


def configured(run: Run, **sections: dict[str, Any]) -> Config:
    """Returns a tiny run with sections changed."""
    merged = {name: {**run.get(name, {}), **sections.get(name, {})} for name in {*run, *sections}}
    return config_from(merged, where="test")


def losses(out: Path) -> dict[int, float]:
    """Returns the total loss of every logged step."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["total"] for line in lines if "total" in line}


@pytest.fixture
def every_step(tiny_config: Run, tiny_manifest: Path) -> Run:
    """A tiny run of eight steps that logs each, saves every third and validates every fourth."""
    train_section = {"steps": 8, "log_every": 1, "save_every": 3, "val_every": 4, "warmup": 2, "accumulation": 2}
    data = {**tiny_config["data"], "val": str(tiny_manifest)}
    return {**tiny_config, "data": data, "train": {**tiny_config["train"], **train_section}}


def test_a_run_leaves_a_checkpoint_logs_and_facts(every_step: Run, tmp_path: Path) -> None:
    folder = train(configured(every_step, train={"out": str(tmp_path / "run")}))
    assert folder == tmp_path / "run" / "checkpoint"
    assert {"config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert sorted(losses(tmp_path / "run")) == list(range(1, 9))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["settings"]["train"]["steps"] == 8 and facts["seconds"] > 0
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_the_loss_falls(every_step: Run, tmp_path: Path) -> None:
    train(configured(every_step, train={"out": str(tmp_path), "steps": 40, "lr": 3e-3, "accumulation": 1}))
    curve = losses(tmp_path)
    assert sum(curve[step] for step in range(36, 41)) < 0.8 * sum(curve[step] for step in range(1, 6))


def test_resumed_equals_uninterrupted(every_step: Run, tmp_path: Path) -> None:
    whole = configured(every_step, train={"out": str(tmp_path / "whole")})
    train(whole)
    broken = configured(every_step, train={"out": str(tmp_path / "broken")})
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("medisee.run_log.RunLog.losses", _interrupt_at(7))
        train(broken)
    train(broken, resume=True)
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    assert {step: found[step] for step in (7, 8)} == pytest.approx({step: expected[step] for step in (7, 8)}, rel=1e-6)
    ours, theirs = (load_file(tmp_path / name / "last-00000008" / "model.safetensors") for name in ("broken", "whole"))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-6


def _interrupt_at(step: int) -> Any:
    from medisee.run_log import RunLog

    original = RunLog.losses

    def losses_until(self: RunLog, number: int, *rest: Any, **named: Any) -> None:
        if number == step:
            raise KeyboardInterrupt
        original(self, number, *rest, **named)

    return losses_until


@pytest.mark.kill
def test_killed_at_any_step_and_resumed(every_step: Run, tmp_path: Path) -> None:
    run = configured(every_step, train={"out": str(tmp_path / "whole"), "steps": 60, "save_every": 5})
    train(run)
    killed = configured(every_step, train={"out": str(tmp_path / "killed"), "steps": 60, "save_every": 5})
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    for kill_after in (12, 23, 41):
        resume = ["--resume"] if (tmp_path / "killed" / "last").exists() else []
        process = subprocess.Popen([sys.executable, "-m", "medisee.train", "--config", str(path), *resume])
        while process.poll() is None and max([0, *_logged(tmp_path / "killed")]) < kill_after:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    train(killed, resume=True)
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert sorted(found) == sorted(expected)
    assert found == pytest.approx(expected, rel=1e-6)


def _logged(out: Path) -> list[int]:
    try:
        return list(losses(out))
    except (OSError, ValueError):
        return []


def test_two_ranks_with_half_the_batch_equal_one(tiny_config: Run, tmp_path: Path) -> None:
    section = {**tiny_config["train"], "steps": 20, "log_every": 1, "save_every": 20, "warmup": 3, "zero_stage": 2}
    one = {**tiny_config, "train": {**section, "batch_size": 2, "out": str(tmp_path / "one")}}
    train(config_from(one, where="test"))
    two = {**tiny_config, "train": {**section, "batch_size": 1, "out": str(tmp_path / "two")}}
    _deepspeed(two, tmp_path / "two.yaml")
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(found) == list(range(1, 21))
    assert found == pytest.approx(expected, rel=1e-4)


def test_two_ranks_in_bf16(tiny_config: Run, tmp_path: Path) -> None:
    section = {"steps": 6, "log_every": 1, "batch_size": 1, "dtype": "bfloat16", "zero_stage": 2, "save_every": 3}
    run = {**tiny_config, "train": {**tiny_config["train"], **section, "out": str(tmp_path / "two")}}
    _deepspeed(run, tmp_path / "two.yaml")
    assert len(losses(tmp_path / "two")) == 6
    assert (tmp_path / "two" / "checkpoint" / "model.safetensors").exists()
    _deepspeed(run, tmp_path / "two.yaml", "--resume")


def _deepspeed(run: Run, path: Path, *arguments: str) -> None:
    path.write_text(yaml.safe_dump(run))
    launcher = Path(sys.executable).with_name("deepspeed")
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, str(launcher), "--num_gpus", "2", "--master_port", "29611", str(script)]
    done = subprocess.run(
        [*command, "--config", str(path), *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_checkpoint_is_chosen_on_val(every_step: Run, tmp_path: Path) -> None:
    folder = train(configured(every_step, train={"out": str(tmp_path), "steps": 12}))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    figures = {line["step"]: (line["val_Dice"] + line["val_IoU"]) / 2 for line in lines if "val_Dice" in line}
    kept = json.loads((folder / "config.json").read_text())["run"]["step"]
    assert sorted(figures) == [4, 8, 12]
    assert figures[kept] == max(figures.values())


def test_a_vision_tower_works_beside_cached_features(every_step: Run, tmp_path: Path) -> None:
    vision = {"image_tokens": "vision_tower", "vision_hidden": 64, "vision_layers": 2, "vision_size": 28}
    model = {**every_step["model"], "mllm": {**every_step["model"]["mllm"], **vision}}
    data = {**every_step["data"], "cache": str(tmp_path / "cache")}
    train(configured({**every_step, "model": model, "data": data}, train={"out": str(tmp_path / "run"), "steps": 2}))
    assert sorted(losses(tmp_path / "run")) == [1, 2]


def test_a_source_joins_at_its_step_and_masks_can_be_few(every_step: Run, tiny_manifest: Path, tmp_path: Path) -> None:
    sources = [{"records": str(tiny_manifest)}, {"records": str(tiny_manifest), "from_step": 4, "weight": 3}]
    section = {"out": str(tmp_path), "mask_from": 2, "masks_per_image": 1, "true_box": 1.0, "true_box_until": 6}
    train(configured(every_step, data={"train": sources}, train=section))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    dice = {line["step"]: line["dice"] for line in lines if "dice" in line}
    assert [dice[step] for step in (1, 2)] == [0, 0]
    assert all(dice[step] > 0 for step in range(3, 9))


def test_warmup_decay() -> None:
    section = Config().train.model_copy(update={"warmup": 4, "steps": 10})
    assert [warmup_decay(section, step) for step in range(11)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    )


def test_a_loss_that_is_not_finite_names_the_records(every_step: Run, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"step 1: the loss is not finite on records .+"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("medisee.models.losses.l1_loss", lambda boxes, truth: boxes.sum(1) * torch.nan)
        train(configured(every_step, train={"out": str(tmp_path)}))


def test_bad_input_ends_with_2_and_a_sentence(
    every_step: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**every_step, "train": {**every_step["train"], "out": str(tmp_path / "new")}}))
    cases = {
        ("--config", str(tmp_path / "none.yaml")): "none.yaml",
        ("--config", str(path), "--resume"): "nothing to resume",
        ("--config", str(path), "train.lrr=1"): "Did you mean 'lr'?",
        ("--config", str(path), "data.train=[]"): "no training manifest",
        ("--config", str(path), "data.val=missing.jsonl"): "missing.jsonl",
    }
    for arguments, expected in cases.items():
        assert exit_code(main, arguments) == 2
        message = capsys.readouterr().err
        assert expected in message and "Traceback" not in message
    assert not (tmp_path / "new").exists()


def test_resuming_with_another_configuration_is_refused(every_step: Run, tmp_path: Path) -> None:
    train(configured(every_step, train={"out": str(tmp_path / "run"), "steps": 3}))
    with pytest.raises(InputError, match="another configuration"):
        train(configured(every_step, train={"out": str(tmp_path / "run"), "steps": 4}), resume=True)
