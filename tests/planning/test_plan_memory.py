"""Planned memory against the resident memory of real training steps, each in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medisee.config.load import config_from
from medisee.planning.plan import plan_training

PROGRAM = Path(__file__).with_name("peak_memory.py")
SIZES = {
    "6 layers of 256": {"hidden": 256, "layers": 6, "heads": 4, "kv_heads": 2, "intermediate": 896},
    "8 layers of 512": {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "intermediate": 1792},
}


def values(size: dict[str, int], *, recompute: bool) -> dict[str, Any]:
    """A run with the paper's 576 image tokens that a laptop can take."""
    mllm = {"size": size, "vocabulary": 4000, "train": "full", "vision_hidden": 64, "vision_layers": 2}
    model = {"mllm": mllm, "seg_head": {"vit": "micro", "size": 256}, "router_hidden": 128, "box_hidden": 64}
    train = {"batch_size": 2, "accumulation": 2, "dtype": "float32", "zero_stage": 0, "recompute_layers": recompute}
    return {"model": model, "train": train}


@pytest.mark.scale
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_step_takes_the_planned_memory(size: str, recompute: bool, tmp_path: Path) -> None:
    content = values(SIZES[size], recompute=recompute)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    # Freed memory goes back to the system at once, or the peak would depend on what the allocator keeps.
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), str(path)], capture_output=True, text=True, env={**os.environ, **quiet}
    )
    assert ran.returncode == 0, ran.stderr
    plan = plan_training(config_from(content, where="test"), gpu="a6000", gpus=1)
    ratio = json.loads(ran.stdout)["peak"] / plan.peak
    print(f"{size}, {'recomputed' if recompute else 'kept'}: measured / planned = {ratio:.3f}")
    assert 0.8 < ratio < 1.2
