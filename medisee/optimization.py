"""How a loss becomes a step: plain torch on one device, or DeepSpeed under its launcher. Same AdamW, same schedule."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from medisee.config import Train
from medisee.precision import compute_dtype


class Optimization(Protocol):
    """Backward, accumulate, clip, step, schedule; and its own state for an exact resume."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's loss."""
        ...

    def step(self) -> float:
        """Takes the optimizer step that ends an accumulation; returns the gradient norm before clipping."""
        ...

    def save(self, folder: Path) -> None:
        """Writes optimizer and schedule state into an existing folder; every rank calls it."""
        ...

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        ...


def parameter_groups(model: nn.Module, train: Train) -> list[dict[str, Any]]:
    """Returns AdamW's groups: the mask decoder may have its own learning rate."""
    own, decoder = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decoder if name.startswith("seg_head.mask_decoder.") else own).append(parameter)
    groups = [{"params": own, "lr": train.lr}, {"params": decoder, "lr": train.lr_mask_decoder or train.lr}]
    return [group for group in groups if group["params"]]


def warmup_decay(train: Train, step: int) -> float:
    """WarmupDecayLR: linear from 1/warmup to 1 over `warmup` steps, then linear to 0 at `steps`."""
    if step < train.warmup:
        return (step + 1) / train.warmup
    return max(0.0, (train.steps - step) / max(1, train.steps - train.warmup))


class TorchOptimization:
    """One device, no launcher."""

    def __init__(self, model: nn.Module, train: Train) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.train = train
        self.optimizer = AdamW(parameter_groups(model, train), betas=train.betas, weight_decay=train.weight_decay)
        self.schedule = LambdaLR(self.optimizer, lambda step: warmup_decay(train, step))

    def backward(self, loss: Tensor) -> None:
        """See Optimization."""
        (loss / self.train.accumulation).backward()

    def step(self) -> float:
        """See Optimization."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return float(norm)

    def save(self, folder: Path) -> None:
        """See Optimization."""
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.last_epoch}
        torch.save(state, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """See Optimization."""
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]


class DeepSpeedOptimization:
    """Any number of ranks under DeepSpeed's launcher: ZeRO, gradient averaging, its own checkpoint format."""

    def __init__(self, model: nn.Module, train: Train) -> None:
        import deepspeed  # heavy, and not needed on one device

        optimizer = AdamW(parameter_groups(model, train), betas=train.betas, weight_decay=train.weight_decay)
        schedule: Any = LambdaLR(optimizer, lambda step: warmup_decay(train, step))
        device = next(model.parameters()).device
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=deepspeed_config(train, compute_dtype(train.dtype, device)),
        )
        self.train = train

    def backward(self, loss: Tensor) -> None:
        """See Optimization."""
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self) -> float:
        """See Optimization."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def save(self, folder: Path) -> None:
        """See Optimization."""
        self.engine.save_checkpoint(str(folder), tag="deepspeed")

    def load(self, folder: Path) -> None:
        """See Optimization."""
        self.engine.load_checkpoint(str(folder), tag="deepspeed")


def deepspeed_config(train: Train, dtype: torch.dtype) -> dict[str, Any]:
    """Returns DeepSpeed's configuration of this run."""
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def world_from_environment() -> tuple[int, int, int]:
    """Returns (rank, local rank, number of ranks) as a launcher sets them; (0, 0, 1) without one."""
    names: Iterable[str] = ("RANK", "LOCAL_RANK")
    rank, local = (int(os.environ.get(name, 0)) for name in names)
    return rank, local, int(os.environ.get("WORLD_SIZE", 1))
