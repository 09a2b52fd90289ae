"""Compiled layers compute what the others do; what they need is named beforehand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._dynamo.utils import counters  # torch has no public count of compiled graphs

from medisee.config.load import config_from
from medisee.train import train
from medisee.training.run_log import TELEMETRY

GRAPHS = 3
"""The probe's, one for all layers, and one for lengths that vary."""


def compiled_values(tiny_config: dict[str, Any], tiny_manifest: Path, out: Path, **settings: object) -> dict[str, Any]:
    """Returns a run of four layers, whose validation has other shapes than its steps."""
    mllm = tiny_config["model"]["mllm"]
    mllm = {**mllm, "size": {**mllm["size"], "layers": 4}, "train": "lora", "lora": {"rank": 2, "dropout": 0.0}}
    own = {"out": str(out), "steps": 4, "log_every": 1, "val_every": 2, "lr": 3e-3, **settings}
    return {
        **tiny_config,
        "model": {**tiny_config["model"], "mllm": {**mllm, "pad_to": 64}},
        "data": {**tiny_config["data"], "val": str(tiny_manifest)},
        "train": {**tiny_config["train"], **own},
    }


@pytest.mark.parametrize(
    ("settings", "rel", "abs_"),
    [
        ({}, 1e-4, 1e-6),
        ({"recompute_layers": 2}, 1e-4, 1e-6),
        ({"unpadded": True}, 1e-4, 1e-6),
        ({"dtype": "bfloat16"}, 0.05, 5e-3),  # of a validation's masks a few pixels flip
    ],
    ids=["plain", "recomputed", "unpadded", "bfloat16"],
)
def test_a_compiled_training_is_the_same(
    tiny_config: dict[str, Any], tiny_manifest: Path, tmp_path: Path, settings: dict[str, Any], rel: float, abs_: float
) -> None:
    logged = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        out = tmp_path / str(compiled)
        values = compiled_values(tiny_config, tiny_manifest, out, compile_layers=compiled, **settings)
        train(config_from(values, where="test"))
        graphs = counters["stats"]["unique_graphs"]
        assert 1 < graphs <= GRAPHS if compiled else graphs == 0
        logged.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
    for ours, theirs in zip(*logged, strict=True):
        for line in (ours, theirs):
            for key in TELEMETRY:
                line.pop(key, None)
        assert ours == pytest.approx(theirs, rel=rel, abs=abs_)


def test_a_machine_without_a_compiler_is_told(tiny_config: dict[str, Any], tiny_manifest: Path, tmp_path: Path) -> None:
    """In a separate process: torch reads CXX when it is imported."""
    values = compiled_values(tiny_config, tiny_manifest, tmp_path / "run", compile_layers=True)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "medisee.train", "--config", str(config)],
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "train.compile_layers = true: torch.compile cannot build kernels for 'cpu' here (InvalidCxxCompiler" in line
    assert "train.compile_layers=false" in line and "g++" in line
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
