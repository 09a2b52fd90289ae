"""Prints how much memory training steps of a run take on the CPU: a separate process, started by test_plan_memory.py.

  python tests/planning/peak_memory.py run.json

Bytes of resident memory at the peak, above what the process held before the model was built.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from medisee.config import Config
from medisee.config.load import config_from
from medisee.models.medisee import MediSee
from medisee.planning.parameters import stand_in_tokenizer
from medisee.planning.workload import OURS, add_pixels, make_batch, training_workload
from medisee.training.layers import recompute_layers
from medisee.training.optimization import Optimization, TrainingLoss

WARM: dict[str, Any] = {
    "model": {
        "mllm": {
            "size": {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 64},
            "vision_hidden": 32,
            "vision_layers": 2,
            "vision_size": 28,
        },
        "seg_head": {"kind": "medsam", "vit": "micro", "size": 64},
        "router_hidden": 16,
        "box_hidden": 16,
    },
    "train": {"batch_size": 1, "accumulation": 1, "dtype": "float32"},
}


def steps(config: Config, number: int) -> None:
    """Takes optimizer steps on a random model: from the second on, AdamW's moments are there."""
    model = MediSee(config.model, stand_in_tokenizer(config.model)).train()
    if config.train.recompute_layers:
        recompute_layers(model.mllm, config.train.recompute_layers)
    loss = TrainingLoss(model, config.loss, dtype=torch.float32, world=1)
    optimization = Optimization(loss, config.train)
    workload = training_workload(config)
    for _ in range(number):
        for _ in range(config.train.accumulation):
            batch = add_pixels(make_batch(model, workload, config, OURS), model, OURS)
            optimization.backward(optimization.losses(batch, masks="full").total)
        optimization.step()


def held(kind: str) -> int:
    """Returns bytes of this process's memory: `RssAnon`, what it allocated; `RssFile`, its libraries; `VmHWM`, the most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def main() -> None:
    """Warms the libraries up by a tiny run, so that their own memory does not count."""
    torch.manual_seed(0)
    steps(config_from(WARM, where="warm"), 1)
    before = held("RssAnon")
    steps(config_from(json.loads(Path(sys.argv[1]).read_text()), where=sys.argv[1]), 2)
    # A busy machine takes the libraries' pages away and gives them back: they are left out at both ends.
    print(json.dumps({"peak": held("VmHWM") - held("RssFile") - before}))


if __name__ == "__main__":
    main()
