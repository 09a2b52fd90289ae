"""What one micro-batch costs, measured and not estimated: the model itself runs on tensors that have shapes but no memory.

torch's fake tensors take the same operators as real ones, so the memory that lives at any moment and the floating-point
operations are exact, whatever the model has become. Only what kernels need inside themselves is not seen. The language
model's layers are alike: two and three of them are measured, and the rest follows on a straight line.
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
_COUNTED = ("language_model", "lm_head", "vision_tower", "image_encoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Floating-point operations of one micro-batch by part, forward and backward; a product and its sum are two."""

    language_model: float
    lm_head: float
    vision_tower: float
    image_encoder: float
    decoders: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One micro-batch.

    Attributes:
        flops: by part.
        kept: bytes that live between the forward and the backward pass: the batch, and what the backward pass needs.
        peak: the most bytes that live at any time, beside weights, gradients and optimizer state.
    """

    flops: Flops
    kept: float
    peak: float


def cost_between(kept: StepCost, recomputed: StepCost, share: float) -> StepCost:
    """Returns the cost where a share of the layers, in [0, 1], compute again: each layer saves and costs the same."""

    def between(one: float, other: float) -> float:
        return one + share * (other - one)

    names = [field.name for field in fields(Flops)]
    flops = Flops(**{name: between(getattr(kept.flops, name), getattr(recomputed.flops, name)) for name in names})
    return StepCost(flops=flops, kept=between(kept.kept, recomputed.kept), peak=between(kept.peak, recomputed.peak))


def training_cost(
    config: Config, workload: Workload, way: ComputeMode, *, dtype: torch.dtype, recompute: bool = False
) -> StepCost:
    """Measures a micro-batch's forward and backward pass.

    Args:
        config: of the run.
        workload: its questions.
        way: how it computes.
        dtype: what it computes in.
        recompute: the language model's layers keep their inputs only.
    """

    def measure(model: MediSee) -> _Measured:
        if recompute:
            recompute_layers(model.mllm)
        batch = make_batch(model, workload, config, way)
        rehearsal = _Rehearsal(model)
        with rehearsal.mode:
            batch = add_pixels(batch, model, way)
        return rehearsal.training(batch, config, dtype)

    return _for_all_layers(config, dtype, measure)


def query_cost(config: Config, workload: Workload, *, dtype: torch.dtype) -> StepCost:
    """Measures reading one micro-batch with its answers, without gradients; `kept` is what is left at its end."""

    def measure(model: MediSee) -> _Measured:
        way = ComputeMode("query")
        batch = make_batch(model.eval(), workload, config, way)
        rehearsal = _Rehearsal(model)
        with rehearsal.mode:
            batch = add_pixels(batch, model, way)
        return rehearsal.reading(batch, dtype)

    return _for_all_layers(config, dtype, measure)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """A micro-batch of a model with few layers; `early` is the peak before the language model, `late` from there on."""

    language_model: float
    lm_head: float
    vision_tower: float
    image_encoder: float
    decoders: float
    kept: float
    early: float
    late: float


def _for_all_layers(config: Config, dtype: torch.dtype, measure: Callable[[MediSee], _Measured]) -> StepCost:
    layers = language_layers(config.model)
    if layers <= _FEW[-1]:
        values = _values(measure(meta_model(config.model, dtype=dtype).train()))
    else:
        # Each value is a straight line in the number of layers: the peaks before and after the encoders apart.
        low, high = (_values(measure(meta_model(config.model, dtype=dtype, layers=n).train())) for n in _FEW)
        values = {name: low[name] + (high[name] - low[name]) * (layers - _FEW[0]) for name in low}
    flops = Flops(**{field.name: values[field.name] for field in fields(Flops)})
    return StepCost(flops=flops, kept=values["kept"], peak=max(values["early"], values["late"]))


def _values(measured: _Measured) -> dict[str, float]:
    return {field.name: getattr(measured, field.name) for field in fields(measured)}


class _Rehearsal:
    """Turns a model on the meta device into fake tensors on the CPU, and runs it while counting.

    The CPU stands for any device: it has the fused attention that GPUs have and the meta device lacks.
    """

    def __init__(self, model: MediSee) -> None:
        self.model, self.mode, self.tally = model, FakeTensorMode(allow_non_fake_inputs=True), Tally()
        self.forward: dict[str, float] = dict.fromkeys(_COUNTED, 0.0)
        self.backward: dict[str, float] = {}
        self.early = 0
        _pretend(model, self.mode)

    def training(self, batch: Batch, config: Config, dtype: torch.dtype) -> _Measured:
        """Runs forward and backward."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # All micro-batches of a step but the first add to gradients that are there.
                parameter.grad = torch.zeros_like(parameter)
        self._start(batch)
        with self.tally, self._watching():
            loss = self._loss(batch, config, dtype)
            kept = self.tally.now
            loss.backward()
        total = self.tally.flops
        # Gradients pass the heads first, then the language model, then what stands before it.
        heads, language = self.backward.get("heads", total), self.backward.get("language", total)
        lm_head = self.forward["lm_head"] * (1 + _learns(self.model.mllm.lm_head))
        before, encoder_learns = total - language, _learns(self.model.seg_head.image_encoder)
        return _Measured(
            language_model=self.forward["language_model"] + language - heads,
            lm_head=self.forward["lm_head"] + lm_head,
            vision_tower=self.forward["vision_tower"] + before * (not encoder_learns),
            image_encoder=self.forward["image_encoder"] + before * encoder_learns,
            decoders=heads - sum(self.forward.values()) - lm_head,
            kept=kept,
            early=self.early,
            late=self.tally.peak,
        )

    def _loss(self, batch: Batch, config: Config, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = self.model(batch)
            # The box loss picks out boxes by value, which fake ones lack: it sees the true ones.
            known = output if batch.boxes_I4 is None else replace(output, boxes_I4=batch.boxes_I4)
            return end_to_end_loss(known, batch, config.loss, release=config.release).total + output.boxes_I4.sum()

    def reading(self, batch: Batch, dtype: torch.dtype) -> _Measured:
        """Runs forward alone."""
        self._start(batch)
        with torch.no_grad(), self.tally, self._watching():
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                output = self.model(batch)
            kept = self.tally.now
        del output
        decoders = self.tally.flops - sum(self.forward.values())
        return _Measured(**self.forward, decoders=decoders, kept=kept, early=self.early, late=self.tally.peak)

    def _start(self, batch: Batch) -> None:
        held: list[Tensor] = [*self.model.parameters(), *self.model.buffers()]
        self.tally.ignore([*held, *(value.grad for value in held if value.grad is not None)])
        own = [getattr(batch, field.name) for field in fields(batch)]
        self.tally.add([value for value in tree_leaves([*own, list(batch.masks)]) if isinstance(value, Tensor)])

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Notes what the modules compute forward, and when gradients arrive at the language model and leave it."""
        llava: Any = self.model.mllm
        language = llava.model.language_model
        places = {
            "language_model": [language],
            "lm_head": [llava.lm_head],
            "vision_tower": [llava.model.vision_tower, llava.model.multi_modal_projector],
            "image_encoder": [self.model.seg_head.image_encoder],
        }
        handles = [
            handle for name, modules in places.items() for module in modules for handle in self._count(module, name)
        ]

        def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.early, self.tally.peak = self.tally.peak, self.tally.now
            self._note(kwargs["inputs_embeds"], "language")

        def ends(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._note(output.last_hidden_state, "heads")

        handles.append(language.register_forward_pre_hook(begins, with_kwargs=True))
        handles.append(language.register_forward_hook(ends))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, module: nn.Module, name: str) -> list[Any]:
        def begins(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.forward[name] -= self.tally.flops

        def ends(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.forward[name] += self.tally.flops

        return [module.register_forward_pre_hook(begins), module.register_forward_hook(ends)]

    def _note(self, tensor: Tensor, name: str) -> None:
        def note(gradient: Tensor) -> None:
            self.backward[name] = self.tally.flops

        if tensor.requires_grad:
            tensor.register_hook(note)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _pretend(model: nn.Module, mode: FakeTensorMode) -> None:
    with mode:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty_like(buffer, device="cpu"))


class Tally(TorchDispatchMode):
    """Counts, operator by operator.

    Attributes:
        now: bytes of all storages that live and are not ignored.
        peak: the most of them so far.
        flops: floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.flops = 0, 0, 0.0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._ignored: list[Any] = []

    def ignore(self, tensors: list[Tensor]) -> None:
        """Leaves tensors out, and all views of them."""
        self._ignored = [tensor.untyped_storage() for tensor in tensors]
        for storage in self._ignored:
            self._known.add(storage)

    def add(self, tensors: list[Tensor]) -> None:
        """Counts tensors for as long as they live."""
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
