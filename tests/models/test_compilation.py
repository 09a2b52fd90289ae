"""Compiled layers compute what the others do; what they need is named beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from medisee.config import config_from
from medisee.errors import InputError
from medisee.models.compilation import check_compiler
from medisee.train import train


def test_a_compiled_training_is_the_same(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    logged, graphs = [], []
    mllm = {**tiny_config["model"]["mllm"], "train": "lora", "lora": {"rank": 2, "dropout": 0.0}, "pad_to": 64}
    for name in ("eager", "compiled"):
        torch.compiler.reset()
        counters.clear()
        settings = {"out": str(tmp_path / name), "steps": 4, "log_every": 1, "val_every": 2, "lr": 3e-3}
        train_values = {**tiny_config["train"], **settings, "compile_layers": name == "compiled"}
        values = {"model": {**tiny_config["model"], "mllm": mllm}, "train": train_values}
        train(config_from({**tiny_config, **values}, where="test"))
        graphs.append(counters["stats"]["unique_graphs"])
        logged.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    assert graphs[0] == 0 < graphs[1] <= 2  # one layer's code for all layers, once more for lengths that vary
    for ours, theirs in zip(*logged, strict=True):
        for line in (ours, theirs):
            line.pop("seconds", None)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_cpu_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no C\\+\\+ compiler found") as caught:
        check_compiler(torch.device("cpu"))
    assert "train.compile_layers=false" in str(caught.value)
    check_compiler(torch.device("cuda"))
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(InputError, match="my-compiler"):
        check_compiler(torch.device("cpu"))
    program = tmp_path / "my-compiler"
    program.touch(mode=0o755)
    check_compiler(torch.device("cpu"))
