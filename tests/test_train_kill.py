"""SIGKILL at twenty random moments of one run: nothing is lost but the steps since the last saved state."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from medisee.config.load import config_from
from medisee.models.medisee import MediSee
from medisee.train import train
from medisee.training.resume import damage, find_last, saved_folders
from medisee.weights.checkpoints import load_checkpoint

KILLS = 20
STEPS = 200


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["total"] for line in lines if "total" in line}


def last_step(out: Path) -> int:
    try:
        return max(losses(out), default=0)
    except (OSError, ValueError):
        return 0


@pytest.mark.kill
@pytest.mark.timeout(3600)
def test_twenty_kills_change_nothing(tiny_config: dict[str, Any], tiny_manifest: Path, tmp_path: Path) -> None:
    section = {"steps": STEPS, "log_every": 1, "save_every": 3, "val_every": 5, "warmup": 10, "batch_size": 1}
    data = {**tiny_config["data"], "val": str(tiny_manifest)}
    run = {**tiny_config, "data": data, "train": {**tiny_config["train"], **section}}
    whole = {**run, "train": {**run["train"], "out": str(tmp_path / "whole")}}
    train(config_from(whole, where="test"))
    out, path = tmp_path / "killed", tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump({**run, "train": {**run["train"], "out": str(out)}}), encoding="utf-8")
    rng, killed_at, found = random.Random(0), [], []
    # Far enough from each other that every start takes some steps.
    for goal in (5 + 9 * number + rng.randrange(7) for number in range(KILLS)):
        resume = ["--resume"] if saved_folders(out) else []
        command = [sys.executable, "-m", "medisee.train", "--config", str(path), *resume]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None and last_step(out) < goal:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            assert process.poll() is None, f"the run has ended by itself with {process.returncode}"
        finally:
            process.kill()
            process.wait()
        killed_at.append(last_step(out))
        assert [damage(folder) for folder in saved_folders(out)] == [None] * len(saved_folders(out))
        found.append(find_last(out).progress.step)
        if (out / "checkpoint").exists():
            load_checkpoint(out / "checkpoint", MediSee)
    train(config_from(yaml.safe_load(path.read_text()), where="test"), resume=True)
    print(f"killed at {killed_at}, resumed from {found}", file=sys.__stderr__)
    assert all(at - 3 <= state <= at for at, state in zip(killed_at, found, strict=True))
    expected, ours = losses(tmp_path / "whole"), losses(out)
    assert sorted(ours) == list(range(1, STEPS + 1))
    assert ours == pytest.approx(expected, rel=1e-6)
    kept = [
        json.loads((folder / "checkpoint" / "config.json").read_text())["run"] for folder in (tmp_path / "whole", out)
    ]
    assert kept[0]["step"] == kept[1]["step"]
    assert not [name for name in os.listdir(out) if name.startswith(".")]
