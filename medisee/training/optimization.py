"""How a loss becomes a step: plain torch on one device, or DeepSpeed under its launcher. Same AdamW, same schedule.

What learns is stored in float32 in both, and autocast computes: DeepSpeed's own 16-bit mode would round the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

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
from medisee.training.ranks import Place, world_from_environment
from medisee.weights.checkpoints import trained_state

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class TrainingLoss(nn.Module):
    """Model and loss as one module: DeepSpeed's hooks need the tensor from which the backward pass starts."""

    def __init__(self, model: MediSee, weights: Loss, *, dtype: torch.dtype, world: int, release: bool = False) -> None:
        """Args: the model; lambda of every term; what it computes in; number of ranks; see `end_to_end_loss`."""
        super().__init__()
        self.model, self.weights, self.dtype, self.world, self.release = model, weights, dtype, world, release

    def forward(self, batch: Batch, *, masks: MaskDetail) -> tuple[Tensor, ...]:
        """Returns the values of Terms in their order; only the total has a graph."""
        with torch.autocast(batch.input_ids_SL.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(batch, masks=masks)
            terms = end_to_end_loss(output, batch, self.weights, world=self.world, release=self.release)
        others = terms.detach()
        return tuple(getattr(terms if field.name == "total" else others, field.name) for field in fields(Terms))


class Optimization(Protocol):
    """Forward, backward, accumulate, clip, step, schedule; and its own state for an exact resume.

    Under several ranks each calls every method.
    """

    def losses(self, batch: Batch, *, masks: MaskDetail) -> Terms:
        """Runs model and loss on one micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's loss."""
        ...

    def step(self) -> float:
        """Takes the optimizer step that ends an accumulation; returns the gradient norm before clipping."""
        ...

    def whole_parameters(self) -> Any:
        """Returns a context in which the parameters that a checkpoint holds are whole, though ZeRO 3 cuts them."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """Returns AdamW's state as `<kind>/<parameter>` on the CPU; on other ranks than the first it is empty."""
        ...

    def load(self, path: Path, step: int) -> None:
        """Reads what `moments` returned out of a safetensors file, and puts the schedule after `step` steps."""
        ...


def split_batch(train: Train, world: int) -> Train:
    """Returns the settings with the accumulation that gives `global_batch` on this number of ranks.

    Raises:
        InputError: the ranks' micro-batches do not divide it; names the nearest numbers that work.
    """
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
        f"train.global_batch = {whole}: {_ranks(world)} x {train.batch_size} images (train.batch_size) do not divide it; "
        f"set {batches}{more}."
    )


def effective_batch(train: Train, world: int) -> int:
    """Returns the images of one optimizer step over all ranks."""
    return world * train.batch_size * train.accumulation


def describe_batch(train: Train, world: int) -> str:
    """Says how the effective batch comes about."""
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


class TorchOptimization:
    """One device, no launcher."""

    def __init__(self, loss: TrainingLoss, train: Train) -> None:
        self.loss, self.train = loss, train
        self.learning = _learning(loss.model)
        self.optimizer, self.schedule = _optimizer(loss.model, train)

    def losses(self, batch: Batch, *, masks: MaskDetail) -> Terms:
        """See Optimization."""
        return Terms(*self.loss(batch, masks=masks))

    def backward(self, loss: Tensor) -> None:
        """See Optimization."""
        (loss / self.train.accumulation).backward()

    def step(self) -> float:
        """See Optimization."""
        norm = torch.nn.utils.clip_grad_norm_(self.learning.values(), self.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return float(norm)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """See Optimization."""
        yield

    def moments(self) -> dict[str, Tensor]:
        """See Optimization."""
        return _moments(self.optimizer, self.learning)

    def load(self, path: Path, step: int) -> None:
        """See Optimization."""
        _load_moments(self.optimizer, self.learning, path)
        _set_schedule(self.schedule, self.train, step)


class DeepSpeedOptimization:
    """Any number of ranks under DeepSpeed's launcher: ZeRO, gradient averaging, offloading."""

    def __init__(self, loss: TrainingLoss, train: Train) -> None:
        import deepspeed  # heavy, and not needed on one device

        self.train, self.model = train, loss.model
        self.learning = _learning(loss.model)
        self.optimizer, self.schedule = _optimizer(loss.model, train)
        schedule: Any = self.schedule
        self.engine, *_ = deepspeed.initialize(
            model=loss, optimizer=self.optimizer, lr_scheduler=schedule, config=deepspeed_config(train)
        )
        if train.zero_stage == 3:
            _name_direct_readers(loss)

    def losses(self, batch: Batch, *, masks: MaskDetail) -> Terms:
        """See Optimization."""
        return Terms(*self.engine(batch, masks=masks))

    def backward(self, loss: Tensor) -> None:
        """See Optimization."""
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self) -> float:
        """See Optimization."""
        # ZeRO keeps the norm that it clips with; without ZeRO the gradients are whole, and clipped by the step.
        gradients = [one.grad for one in self.learning.values() if one.grad is not None]
        whole = float(torch.nn.utils.get_total_norm(gradients)) if self.train.zero_stage == 0 else None
        self.engine.step()
        return whole if whole is not None else float(self.engine.get_global_grad_norm() or 0.0)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """See Optimization."""
        import deepspeed

        names = trained_state(self.model).keys()
        cut = [value for name, value in self.model.named_parameters() if name in names and hasattr(value, "ds_id")]
        with deepspeed.zero.GatheredParameters(cut, enabled=bool(cut)):
            yield

    def moments(self) -> dict[str, Tensor]:
        """See Optimization."""
        from deepspeed.utils import safe_get_full_optimizer_state

        first = world_from_environment()[0] == 0
        if self.train.zero_stage == 0:
            return _moments(self.optimizer, self.learning) if first else {}
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
        """See Optimization."""
        _set_schedule(self.schedule, self.train, step)
        if self.train.zero_stage == 0:
            _load_moments(self.optimizer, self.learning, path)
            return
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
    """Returns DeepSpeed's configuration of this run: what follows from `train`, and `train.deepspeed` over it."""
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


def make_optimization(
    model: MediSee,
    weights: Loss,
    train: Train,
    *,
    dtype: torch.dtype,
    place: Place,
    launched: bool,
    release: bool = False,
) -> Optimization:
    """Returns DeepSpeed's optimization under a launcher, and torch's own without one."""
    loss = TrainingLoss(model, weights, dtype=dtype, world=place.world, release=release)
    return DeepSpeedOptimization(loss, train) if launched else TorchOptimization(loss, train)


def _merged(own: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = {**own, **more}
    return {
        key: _merged(own[key], value) if isinstance(value, dict) and isinstance(own.get(key), dict) else value
        for key, value in both.items()
    }


def _learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer(model: nn.Module, train: Train) -> tuple[AdamW, LambdaLR]:
    groups = parameter_groups(model, train)
    optimizer = AdamW(groups, betas=train.betas, weight_decay=train.weight_decay, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: warmup_decay(train, step))


def _set_schedule(schedule: LambdaLR, train: Train, step: int) -> None:
    schedule.last_epoch = step
    for group, base in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = base * warmup_decay(train, step)


def _moments(optimizer: AdamW, learning: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": optimizer.state[parameter][kind].detach().cpu().clone().contiguous()
        for name, parameter in learning.items()
        if parameter in optimizer.state
        for kind in (*MOMENTS, STEP)
    }


def _load_moments(optimizer: AdamW, learning: Mapping[str, nn.Parameter], path: Path) -> None:
    with safe_open(str(path), framework="pt") as file:
        known = set(file.keys())
        for name, parameter in learning.items():
            # A parameter that has had no gradient yet has no state.
            if f"{STEP}/{name}" in known:
                moments = {kind: file.get_tensor(f"{kind}/{name}").to(parameter.device) for kind in MOMENTS}
                optimizer.state[parameter] = {**moments, STEP: file.get_tensor(f"{STEP}/{name}")}


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


def _name_direct_readers(loss: TrainingLoss) -> None:
    """Tells ZeRO 3 which weights are read without running their module: it gathers weights when a module runs.

    The loss needs them for its backward pass, the model for a forward pass of its own.
    """
    import deepspeed

    head = loss.model.seg_head
    read = [module.weight for module in head.modules() if isinstance(module, nn.Embedding)]
    for parameter in [*read, *head.mask_decoder.output_upscaling.parameters()]:
        for reader in (loss, loss.model):
            deepspeed.zero.register_external_parameter(reader, parameter)
