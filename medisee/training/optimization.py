"""How a loss becomes a step: plain torch on one device, or DeepSpeed under its launcher. Same AdamW, same schedule.

Trainable weights are stored in float32 in both, and autocast sets the compute precision: DeepSpeed's own 16-bit mode would round the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from medisee.config import Loss, Train
from medisee.foundation.errors import InputError
from medisee.models.losses import Terms, end_to_end_loss
from medisee.models.medisee import MaskDetail, MediSee
from medisee.models.processing import Batch
from medisee.training.ranks import world_from_environment
from medisee.weights.checkpoints import trained_state

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class TrainingLoss(nn.Module):
    """Model and loss as one module: DeepSpeed's hooks need the tensor from which the backward pass starts."""

    def __init__(self, model: MediSee, weights: Loss, *, dtype: torch.dtype, world: int, release: bool = False) -> None:
        super().__init__()
        self.model, self.weights, self.dtype, self.world, self.release = model, weights, dtype, world, release

    def forward(self, batch: Batch, *, masks: MaskDetail) -> tuple[Tensor, ...]:
        """Returns the values of Terms in their order; only the total has a graph."""
        with torch.autocast(batch.input_ids_SL.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(batch, masks=masks)
            terms = end_to_end_loss(output, batch, self.weights, world=self.world, release=self.release)
        others = terms.detach()
        return tuple(getattr(terms if field.name == "total" else others, field.name) for field in fields(Terms))


def split_batch(train: Train, world: int) -> Train:
    """Returns the settings with the accumulation that gives `global_batch` on this number of ranks."""
    if train.global_batch is None:
        return train
    whole, micro = train.global_batch, train.batch_size * world
    if whole % micro == 0:
        return train.model_copy(update={"accumulation": whole // micro})
    sizes = [size for size in range(1, whole // world + 1) if whole % (world * size) == 0]
    below, above = whole // micro * micro, (whole // micro + 1) * micro
    batches = " or ".join(f"train.global_batch={one}" for one in (below, above) if one)
    near = sorted(sizes, key=lambda size: abs(size - train.batch_size))[:1]
    more = "".join(f", or train.batch_size={size}" for size in near)
    raise InputError(
        f"train.global_batch = {whole}: not divisible by {_ranks(world)} x {train.batch_size} images (train.batch_size); "
        f"set {batches}{more}."
    )


def effective_batch(train: Train, world: int) -> int:
    """Returns the images of one optimizer step over all ranks."""
    return world * train.batch_size * train.accumulation


def describe_batch(train: Train, world: int) -> str:
    """Describes how the effective batch is made up."""
    parts = f"{_ranks(world)} x {train.batch_size} x {train.accumulation}"
    return f"effective batch {effective_batch(train, world)} images = {parts} (ranks x batch_size x accumulation)"


def _ranks(world: int) -> str:
    return "1 rank" if world == 1 else f"{world} ranks"


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


class Optimization:
    """Forward, backward, accumulate, clip, step, schedule; and its own state for an exact resume. Plain torch, one device."""

    def __init__(self, loss: TrainingLoss, train: Train) -> None:
        self.loss, self.train = loss, train
        self.learning = {name: value for name, value in loss.model.named_parameters() if value.requires_grad}
        self.optimizer = AdamW(
            parameter_groups(loss.model, train), betas=train.betas, weight_decay=train.weight_decay, fused=True
        )
        self.schedule = LambdaLR(self.optimizer, lambda step: warmup_decay(train, step))

    def losses(self, batch: Batch, *, masks: MaskDetail) -> Terms:
        return Terms(*self.loss(batch, masks=masks))

    def backward(self, loss: Tensor) -> None:
        (loss / self.train.accumulation).backward()

    def step(self) -> float:
        """Takes the optimizer step that ends an accumulation; returns the gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.learning.values(), self.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return float(norm)

    def whole_parameters(self) -> AbstractContextManager[object]:
        """Returns a context in which the parameters that a checkpoint holds are whole, though ZeRO 3 cuts them."""
        return nullcontext()

    def moments(self) -> dict[str, Tensor]:
        """Returns AdamW's state as `<kind>/<parameter>` on the CPU; on other ranks than the first it is empty."""
        return {
            f"{kind}/{name}": self.optimizer.state[parameter][kind].detach().cpu().clone().contiguous()
            for name, parameter in self.learning.items()
            if parameter in self.optimizer.state
            for kind in (*MOMENTS, STEP)
        }

    def load(self, path: Path, step: int) -> None:
        """Reads what `moments` returned from a safetensors file, and sets the schedule to after `step` steps."""
        self._set_schedule(step)
        with safe_open(str(path), framework="pt") as file:
            known = set(file.keys())
            for name, parameter in self.learning.items():
                # A parameter that has had no gradient yet has no state.
                if f"{STEP}/{name}" in known:
                    moments = {kind: file.get_tensor(f"{kind}/{name}").to(parameter.device) for kind in MOMENTS}
                    self.optimizer.state[parameter] = {**moments, STEP: file.get_tensor(f"{STEP}/{name}")}

    def _set_schedule(self, step: int) -> None:
        self.schedule.last_epoch = step
        for group, base in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = base * warmup_decay(self.train, step)


class DeepSpeedOptimization(Optimization):
    """Any number of ranks under DeepSpeed's launcher: ZeRO, gradient averaging, offloading. Each rank calls every method."""

    def __init__(self, loss: TrainingLoss, train: Train) -> None:
        import deepspeed  # heavy, and not needed on one device

        super().__init__(loss, train)
        schedule: Any = self.schedule
        self.engine, *_ = deepspeed.initialize(
            model=loss, optimizer=self.optimizer, lr_scheduler=schedule, config=deepspeed_config(train)
        )
        if train.zero_stage == 3:
            _register_direct_readers(loss)

    def losses(self, batch: Batch, *, masks: MaskDetail) -> Terms:
        return Terms(*self.engine(batch, masks=masks))

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self) -> float:
        # ZeRO keeps the norm that it clips with; without ZeRO the gradients are whole, and clipped by the step.
        gradients = [one.grad for one in self.learning.values() if one.grad is not None]
        whole = float(torch.nn.utils.get_total_norm(gradients)) if self.train.zero_stage == 0 else None
        self.engine.step()
        return whole if whole is not None else float(self.engine.get_global_grad_norm() or 0.0)

    def whole_parameters(self) -> AbstractContextManager[object]:
        import deepspeed

        model = self.loss.model
        names = trained_state(model).keys()
        cut = [value for name, value in model.named_parameters() if name in names and hasattr(value, "ds_id")]
        return deepspeed.zero.GatheredParameters(cut, enabled=bool(cut))

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        first = world_from_environment()[0] == 0
        if self.train.zero_stage == 0:
            return super().moments() if first else {}
        self._link_moments()
        found = {}
        for name, parameter in self.learning.items():
            for kind in MOMENTS:
                value = safe_get_full_optimizer_state(parameter, kind)
                if first and value is not None:
                    found[f"{kind}/{name}"] = value.detach().cpu().clone().contiguous()
        steps = [state[STEP] for state in self.optimizer.state.values() if STEP in state]
        return found | ({f"{STEP}/{name}": steps[0].detach().cpu().clone() for name in self.learning} if first else {})

    def load(self, path: Path, step: int) -> None:
        if self.train.zero_stage == 0:
            super().load(path, step)
            return
        self._set_schedule(step)
        zero: Any = self.engine.optimizer
        third = self.train.zero_stage == 3
        flat = zero.fp32_partitioned_groups_flat if third else zero.single_partition_of_fp32_groups
        for part in flat:
            self.optimizer.state[part] = {kind: torch.zeros_like(part) for kind in MOMENTS}
            self.optimizer.state[part][STEP] = torch.tensor(float(step))
        self._link_moments()
        with safe_open(str(path), framework="pt") as file:
            known = set(file.keys())
            for name, parameter in self.learning.items():
                for kind in MOMENTS:
                    if (key := f"{kind}/{name}") in known:
                        _set_moment(parameter, file.get_tensor(key).to(parameter.device), kind)

    def _link_moments(self) -> None:
        # ZeRO 1 and 2 link each parameter to its part of the state, but do so after the first step of the first group
        # of parameters, when the others have no state yet.
        if self.train.zero_stage in (1, 2):
            zero: Any = self.engine.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def deepspeed_config(train: Train) -> dict[str, Any]:
    """Returns DeepSpeed's configuration of this run: what follows from `train`, overridden by `train.deepspeed`."""
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    own = {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    return _merged(own, train.deepspeed)


def _merged(own: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = {**own, **more}
    return {
        key: _merged(own[key], value) if isinstance(value, dict) and isinstance(own.get(key), dict) else value
        for key, value in both.items()
    }


def _set_moment(parameter: Any, value: Tensor, kind: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_tensor"):
        safe_set_full_optimizer_state(parameter, value, kind)
        return
    # ZeRO 3 pads a parameter to equal parts, which DeepSpeed's own function for whole values forgets.
    rank, _, world = world_from_environment()
    size = parameter.ds_tensor.numel()
    padded = F.pad(value.flatten(), (0, size * world - value.numel()))
    safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], kind)


def _register_direct_readers(loss: TrainingLoss) -> None:
    import deepspeed

    # ZeRO 3 gathers weights when their module runs, but these are read without running it. The loss needs them for its
    # backward pass, the model for a forward pass without the loss, as in validation.
    head = loss.model.seg_head
    read = [module.weight for module in head.modules() if isinstance(module, nn.Embedding)]
    for parameter in [*read, *head.mask_decoder.output_upscaling.parameters()]:
        for reader in (loss, loss.model):
            deepspeed.zero.register_external_parameter(reader, parameter)
