"""What one micro-batch costs, measured and not estimated: the model itself runs on tensors that have shapes but no memory.

torch's fake tensors take the same operators as real ones, so the live memory at any moment and the floating-point
operations are exact, whatever the model has become. Only what kernels allocate internally is not seen. The language
model's layers are alike: models with one and with two of them are measured and extrapolated linearly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from medisee.config import Config
from medisee.models.losses import end_to_end_loss
from medisee.models.medisee import MediSee
from medisee.models.processing import Batch
from medisee.planning.parameters import language_layers, meta_model
from medisee.planning.workload import ComputeMode, Workload, add_pixels, make_batch
from medisee.training.layers import recompute_layers

_FEW = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One micro-batch: floating-point operations of each part, forward and backward (a multiplication and its addition
    count as two), and bytes besides weights, gradients and optimizer state.
    """

    language_model: float
    lm_head: float
    vision_tower: float
    image_encoder: float
    decoders: float
    kept: float  # bytes between the forward and the backward pass: the batch, and what the backward pass needs
    early: float  # the most bytes alive at any time before the language model
    late: float  # the same from the language model on

    @property
    def flops(self) -> float:
        return self.language_model + self.lm_head + self.vision_tower + self.image_encoder + self.decoders

    @property
    def peak(self) -> float:
        return max(self.early, self.late)


def cost_on_line(at_0: StepCost, at_1: StepCost, place: float) -> StepCost:
    """Returns the cost at a place of the line through two costs: every layer costs and saves the same."""
    low, high = ({field.name: getattr(cost, field.name) for field in fields(cost)} for cost in (at_0, at_1))
    return StepCost(**{name: value + place * (high[name] - value) for name, value in low.items()})


def training_cost(
    config: Config, workload: Workload, mode: ComputeMode, *, dtype: torch.dtype, recompute: bool = False
) -> StepCost:
    """Measures a micro-batch's forward and backward pass; with `recompute` the layers keep only their inputs."""

    def measure(model: MediSee) -> StepCost:
        if recompute:
            recompute_layers(model.mllm)
        rehearsal = _Rehearsal(model, config, dtype)
        return rehearsal.training(rehearsal.batch(workload, mode))

    return _for_all_layers(config, dtype, measure)


def query_cost(config: Config, workload: Workload, *, dtype: torch.dtype) -> StepCost:
    """Measures reading one micro-batch with its answers, without gradients; `kept` is what is left at its end."""

    def measure(model: MediSee) -> StepCost:
        rehearsal = _Rehearsal(model.eval(), config, dtype)
        return rehearsal.reading(rehearsal.batch(workload, ComputeMode("query")))

    return _for_all_layers(config, dtype, measure)


def _for_all_layers(config: Config, dtype: torch.dtype, measure: Callable[[MediSee], StepCost]) -> StepCost:
    layers = language_layers(config.model)
    if layers <= _FEW[-1]:
        return measure(meta_model(config.model, dtype=dtype).train())
    few, more = (measure(meta_model(config.model, dtype=dtype, layers=number).train()) for number in _FEW)
    return cost_on_line(few, more, (layers - _FEW[0]) / (_FEW[1] - _FEW[0]))


class _Rehearsal:
    """Turns a model on the meta device into fake tensors on the CPU, and runs it while counting.

    The CPU represents any device: it has the fused attention that GPUs have and the meta device lacks.
    """

    def __init__(self, model: MediSee, config: Config, dtype: torch.dtype) -> None:
        self.model, self.config, self.dtype = model, config, dtype
        self.mode, self.tally = FakeTensorMode(allow_non_fake_inputs=True), Tally()
        self.forward: dict[str, float] = dict.fromkeys(
            ("language_model", "lm_head", "vision_tower", "image_encoder"), 0.0
        )
        self.backward: dict[str, float] = {}
        self.early = 0

    def batch(self, workload: Workload, mode: ComputeMode) -> Batch:
        """Returns the batch as fake tensors, and turns the model's tensors into fake ones."""
        batch = make_batch(self.model, workload, self.config, mode)
        with self.mode:
            for module in self.model.modules():
                for name, value in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(torch.empty_like(value, device="cpu"), value.requires_grad))
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))
            return add_pixels(batch, self.model, mode)

    def training(self, batch: Batch) -> StepCost:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # All micro-batches of a step but the first add to gradients that exist.
                parameter.grad = torch.zeros_like(parameter)
        with self._counting(batch):
            loss = self._loss(batch)
            kept = self.tally.now
            loss.backward()
        total = self.tally.flops
        # Gradients pass the heads first, then the language model, then what precedes it.
        heads, language = self.backward.get("heads", total), self.backward.get("language", total)
        lm_head = self.forward["lm_head"] * (1 + _learns(self.model.mllm.lm_head))
        before, encoder_learns = total - language, _learns(self.model.seg_head.image_encoder)
        return StepCost(
            language_model=self.forward["language_model"] + language - heads,
            lm_head=self.forward["lm_head"] + lm_head,
            vision_tower=self.forward["vision_tower"] + before * (not encoder_learns),
            image_encoder=self.forward["image_encoder"] + before * encoder_learns,
            decoders=heads - sum(self.forward.values()) - lm_head,
            kept=kept,
            early=self.early,
            late=self.tally.peak,
        )

    def _loss(self, batch: Batch) -> Tensor:
        with self._autocast():
            output = self.model(batch)
            # The box loss selects boxes by value, which fake ones lack: it sees the true ones.
            known = output if batch.boxes_I4 is None else replace(output, boxes_I4=batch.boxes_I4)
            return (
                end_to_end_loss(known, batch, self.config.loss, release=self.config.release).total
                + output.boxes_I4.sum()
            )

    def reading(self, batch: Batch) -> StepCost:
        with torch.no_grad(), self._counting(batch), self._autocast():
            output = self.model(batch)
        kept = self.tally.now
        del output
        decoders = self.tally.flops - sum(self.forward.values())
        return StepCost(**self.forward, decoders=decoders, kept=kept, early=self.early, late=self.tally.peak)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def _counting(self, batch: Batch) -> Iterator[None]:
        """Notes what the modules compute forward, and when gradients arrive at the language model and leave it."""
        held: list[Tensor] = [*self.model.parameters(), *self.model.buffers()]
        self.tally.ignore([*held, *(value.grad for value in held if value.grad is not None)])
        own = [getattr(batch, field.name) for field in fields(batch)]
        self.tally.add([value for value in tree_leaves([*own, list(batch.masks)]) if isinstance(value, Tensor)])
        llava: Any = self.model.mllm
        language = llava.model.language_model
        parts = {
            "language_model": [language],
            "lm_head": [llava.lm_head],
            "vision_tower": [llava.model.vision_tower, llava.model.multi_modal_projector],
            "image_encoder": [self.model.seg_head.image_encoder],
        }
        handles = [handle for name, modules in parts.items() for one in modules for handle in self._count(one, name)]

        def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.early, self.tally.peak = self.tally.peak, self.tally.now
            self._note(kwargs["inputs_embeds"], "language")

        def ends(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._note(output.last_hidden_state, "heads")

        handles.append(language.register_forward_pre_hook(begins, with_kwargs=True))
        handles.append(language.register_forward_hook(ends))
        try:
            with self.tally:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, module: nn.Module, name: str) -> list[Any]:
        def add(sign: int) -> None:
            self.forward[name] += sign * self.tally.flops

        return [
            module.register_forward_pre_hook(lambda *_: add(-1)),
            module.register_forward_hook(lambda *_: add(1)),
        ]

    def _note(self, tensor: Tensor, name: str) -> None:
        def note(gradient: Tensor) -> None:
            self.backward[name] = self.tally.flops

        if tensor.requires_grad:
            tensor.register_hook(note)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class Tally(TorchDispatchMode):
    """Counts, operator by operator: bytes that live `now` and are not ignored, their `peak`, and `flops` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.flops = 0, 0, 0.0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._ignored: list[Any] = []

    def ignore(self, tensors: list[Tensor]) -> None:
        self._ignored = [tensor.untyped_storage() for tensor in tensors]
        self._known.update(self._ignored)

    def add(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = func._overloadpacket
        if operator in _FLOPS:
            self.flops += _FLOPS[operator](*args, **kwargs, out_val=result)
        self.add([value for value in tree_leaves(result) if isinstance(value, Tensor)])
        return result


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# torch counts the fused attention of GPUs only.
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
