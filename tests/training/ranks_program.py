"""One rank of a launch that trains several runs after each other: starting processes takes longer than all of them.

  RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29613 python ranks_program.py jobs.json

jobs.json: [{"config": run.yaml, "resume": false, "fault": null | "nan" | "term" | "refused" | "unreadable"}]. The second rank has the fault. How a
job ended is written to <train.out>/ended_<rank>.json, or to resumed_<rank>.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import deepspeed.ops
import torch

import medisee.train
from medisee.config import Config
from medisee.config.load import load_config
from medisee.data.dataset import TrainingBatches
from medisee.foundation.errors import InputError
from medisee.models import losses
from medisee.models.processing import Batch
from medisee.training.interruption import Stopped

RANK = int(os.environ["RANK"])
FAULT_STEP = 3
ORIGINAL_NEXT = TrainingBatches.__next__


def run(job: dict[str, Any]) -> None:
    config = load_config(job["config"])
    originals = medisee.train._seed_step, medisee.train.check_files, losses.l1_loss
    if RANK == 1 and job["fault"] == "nan":
        losses.l1_loss = lambda boxes, truth: boxes.sum(1) * torch.nan
    if RANK == 1 and job["fault"] == "term":
        medisee.train._seed_step = _term
    if RANK == 1 and job["fault"] == "refused":
        medisee.train.check_files = _refuse
    if RANK == 1 and job["fault"] == "unreadable":
        TrainingBatches.__next__ = _unreadable
    ended = {"how": "finished"}
    try:
        medisee.train.train(config, resume=job["resume"])
    except InputError as error:
        ended = {"how": "error", "problems": list(error.problems)}
    except Stopped as stopped:
        ended = {"how": "stopped", "code": stopped.code}
    finally:
        medisee.train._seed_step, medisee.train.check_files, losses.l1_loss = originals
        TrainingBatches.__next__ = ORIGINAL_NEXT
    out = Path(config.train.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{'resumed' if job['resume'] else 'ended'}_{RANK}.json").write_text(json.dumps(ended), encoding="utf-8")


def _term(seed: int, step: int, rank: int) -> None:
    torch.manual_seed(seed)
    if step == FAULT_STEP:
        os.kill(os.getpid(), signal.SIGTERM)


READ: list[TrainingBatches] = []


def _unreadable(self: TrainingBatches) -> Batch:
    """Reads the first step's two micro-batches and one of the second's."""
    READ.append(self)
    if len(READ) == 4:
        self.close()
        raise InputError("r7.png: cannot be read; copy it again.")
    return ORIGINAL_NEXT(self)


def _refuse(config: Config) -> None:
    raise InputError("train.jsonl: cannot be read on this machine; copy it there.")


if __name__ == "__main__":
    # Without its C++ module for shared memory, which each machine would first compile, DeepSpeed communicates by gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(one)
