"""What a run will need, before it is started: parameters, memory of each GPU, arithmetic, days, and what is missing.

  python scripts/train.py --config configs/medisee_7b.yaml --plan --gpu a6000 --gpus 4
  python scripts/inference.py --config configs/medisee_7b.yaml --plan --gpu rtx4090

Needs no weights, no data and no GPU. Memory and arithmetic are measured on tensors without memory (cost.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from medisee.config import Config, Train
from medisee.config.load import config_from
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.planning.cost import StepCost, cost_on_line, query_cost, training_cost
from medisee.planning.gpus import GPUS as KNOWN_GPUS
from medisee.planning.gpus import USABLE, Gpu, find_gpu
from medisee.planning.parameters import (
    BYTES_OF_BITS,
    PartCount,
    count_parts,
    language_layers,
    meta_model,
    quantised_weights,
)
from medisee.planning.workload import (
    CACHED,
    OURS,
    REASONING_QUERY,
    RELEASE,
    TEMPLATE_TOKENS,
    ComputeMode,
    Workload,
    training_workload,
)
from medisee.training.optimization import describe_batch, split_batch
from medisee.weights.checkpoints import read_description
from medisee.weights.missing import Missing, missing_files, missing_weights
from medisee.weights.shards import CONFIG

GPU, GPUS = "a6000", 4  # what is planned for unless the command line says otherwise
UTILISATION = 0.35
"""Share of a GPU's dense peak that training reaches. Published runs of large models report 0.21 (GPT-3), 0.30 (MT-NLG),
0.33 (Gopher) and 0.46 (PaLM; all in table 3 of its paper): 0.35 is between them."""
SECONDS_PER_DAY = 86400
STAGES = (0, 1, 2, 3)
ADAMW = 8  # bytes per trainable parameter of AdamW's two float32 moments
MASTER = 4  # bytes of the float32 copy that DeepSpeed's ZeRO updates
BUCKET = 5 * 10**8  # elements of DeepSpeed's reduce_bucket_size, which ZeRO allocates as a whole
LIVE = 10**9  # most parameters that ZeRO 3 gathers at a time: DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on each GPU under one ZeRO stage, without activations."""

    weights: float
    gradients: float
    optimizer: float  # AdamW's moments, and ZeRO's copy of the trainable weights
    buffers: float  # ZeRO's bucket for gradients, and the weights that ZeRO 3 gathers
    host: float  # offloaded to the CPU's memory, per process; not part of the total

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True, slots=True)
class ModeCost:
    """One compute mode."""

    mode: ComputeMode
    cost: StepCost  # of a micro-batch
    days: float  # of the whole run


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """A planned training run; sizes in bytes."""

    config: Config  # with the accumulation that this number of GPUs needs
    gpu: Gpu
    gpus: int
    dtype: torch.dtype
    workload: Workload
    parts: tuple[PartCount, ...]
    memory: tuple[Memory, ...]  # for each ZeRO stage
    stored: dict[int, float]  # see _stored
    kept_all: float  # activations' peak with those of every layer kept
    recomputed: float  # the same with every layer recomputed
    recompute: float  # share of layers recomputed in the modes: as configured, or all where the GPU is too small
    modes: tuple[ModeCost, ...]  # the release's compute mode and ours
    missing: tuple[Missing, ...]

    @property
    def peak(self) -> float:
        """Bytes on each GPU at the configured stage."""
        activations = self.kept_all + self.recompute * (self.recomputed - self.kept_all)
        return self.memory[self.config.train.zero_stage].total + activations


@dataclass(frozen=True, slots=True, kw_only=True)
class InferencePlan:
    """Planned inference, one query at a time."""

    gpu: Gpu
    parts: tuple[PartCount, ...]
    stored: dict[int, float]
    cache: float  # bytes of the language model's keys and values for the longest answer
    read: StepCost  # of the image, the question and the decoders
    token_flops: float  # operations of each further token of the answer
    max_new_tokens: int
    missing: tuple[Missing, ...]


def plan_training(config: Config, *, gpu: str = GPU, gpus: int = GPUS) -> TrainingPlan:
    """Plans a training run under DeepSpeed, whose files may be missing."""
    problems = [] if gpus >= 1 else [f"--gpus {gpus}: expected 1 or more; a plan needs a GPU."]
    try:
        device = find_gpu(gpu)
    except InputError as error:
        raise InputError([*error.problems, *problems]) from error
    if problems:
        raise InputError(problems)
    config = config.model_copy(update={"train": split_batch(config.train, gpus)})
    train = config.train
    dtype = torch.float32 if train.dtype == "float32" else torch.bfloat16
    model = meta_model(config.model, dtype=dtype)
    parts, stored = tuple(count_parts(model)), _stored(model, config)
    weights = stored[config.model.mllm.bits or 16]
    memory = tuple(stage_memory(parts, train, stage=stage, gpus=gpus, weights=weights) for stage in STAGES)
    workload = training_workload(config)
    measure = partial(training_cost, config, workload, dtype=dtype)
    ours = replace(OURS, cached=config.data.cache is not None)
    with tqdm(total=3, desc="planning", disable=None, leave=False) as progress:  # on a terminal only
        kept_all = measure(ours)
        progress.update()
        recomputed = measure(ours, recompute=True)
        progress.update()
        layers, count = language_layers(config.model), train.recompute_layers
        share = 1.0 if count is True else min(count, layers) / layers
        share = share or float(memory[train.zero_stage].total + kept_all.peak > device.usable)
        if 0 < share < 1:
            release = cost_on_line(measure(RELEASE), measure(RELEASE, recompute=True), share)
        else:
            release = measure(RELEASE, recompute=share == 1)
    costs = {RELEASE: release, ours: cost_on_line(kept_all, recomputed, share)}
    if not ours.cached and config.model.seg_head.lora is None:
        # Reading features costs no arithmetic; the rest of the step stays.
        costs[CACHED] = replace(costs[ours], image_encoder=0.0)
    flops_per_day = UTILISATION * device.tflops(dtype) * 1e12 * SECONDS_PER_DAY
    micro_batches = train.steps * train.accumulation
    return TrainingPlan(
        config=config,
        gpu=device,
        gpus=gpus,
        dtype=dtype,
        workload=workload,
        parts=parts,
        memory=memory,
        stored=stored,
        kept_all=kept_all.peak,
        recomputed=recomputed.peak,
        recompute=share,
        modes=tuple(ModeCost(mode, cost, micro_batches * cost.flops / flops_per_day) for mode, cost in costs.items()),
        missing=tuple(missing_files(config)),
    )


def stage_memory(parts: Sequence[PartCount], train: Train, *, stage: int, gpus: int, weights: float) -> Memory:
    """Returns what each GPU holds under a ZeRO stage (Rajbhandari et al. 2020): 1 cuts optimizer state, 2 gradients, 3 weights.

    Stage 0 is also plain torch; `weights` are the bytes of all weights.
    """
    learning, everything = sum(part.trainable for part in parts), sum(part.total for part in parts)
    share = [gpus if stage >= first else 1 for first in (1, 2, 3)]
    optimizer = (ADAMW + MASTER * (stage > 0)) * learning / share[0]
    own_weights = weights / share[2]
    zero = train.deepspeed.get("zero_optimization", {})
    buffers = 4 * zero.get("reduce_bucket_size", BUCKET) * (stage > 0)
    if stage == 3:
        buffers += weights / everything * min(zero.get("stage3_max_live_parameters", LIVE), everything)
    moved_state = optimizer * (train.offload != "none" and stage > 0)
    moved_weights = own_weights * (train.offload == "parameters" and stage == 3)
    return Memory(
        weights=own_weights - moved_weights,
        gradients=4 * learning / share[1],
        optimizer=optimizer - moved_state,
        buffers=buffers,
        host=moved_state + moved_weights,
    )


def plan_inference(config: Config, *, gpu: str = GPU) -> InferencePlan:
    """Plans inference with one query at a time."""
    device = find_gpu(gpu)
    dtype = torch.float32 if config.model.mllm.dtype == "float32" else torch.bfloat16
    model = meta_model(config.model, dtype=dtype)
    parts = tuple(count_parts(model))
    few = config.model_copy(update={"train": config.train.model_copy(update={"masks_per_image": None})})
    settings = model.mllm.config.get_text_config()
    tokens = model.processor.image_tokens + REASONING_QUERY.question + TEMPLATE_TOKENS + config.eval.max_new_tokens
    numbers = 2 * settings.num_hidden_layers * settings.num_key_value_heads * settings.head_dim
    used = sum(part.total for part in parts if part.part in ("language model", "LoRA", "output layer"))
    return InferencePlan(
        gpu=device,
        parts=parts,
        stored=_stored(model, config),
        cache=float(numbers * tokens * dtype.itemsize),
        read=query_cost(few, Workload(((REASONING_QUERY,),), measured=False), dtype=dtype),
        token_flops=2.0 * used,
        max_new_tokens=config.eval.max_new_tokens,
        missing=tuple(missing_weights(config.model)),
    )


def checkpoint_config(folder: Path) -> Config:
    """Returns the configuration of a checkpoint's model."""
    return config_from({"model": read_description(folder).model}, where=str(folder / CONFIG))


def _stored(model: MediSee, config: Config) -> dict[int, float]:
    """Returns the bytes of all weights, with the language model's layers unchanged (16) and, if published, in 8 and 4 bits."""
    whole = float(sum(parameter.nbytes for parameter in model.parameters()))
    if config.model.mllm.source is None:
        return {16: whole}
    count = quantised_weights(model)
    width = next(iter(model.mllm.model.language_model.layers.parameters())).element_size()
    return {16: whole} | {bits: whole + (one - width) * count for bits, one in BYTES_OF_BITS.items()}


_FLOPS = {
    "language_model": "language model's layers",
    "lm_head": "output layer",
    "vision_tower": "vision tower, projector",
    "image_encoder": "image encoder",
    "decoders": "routers, box and mask decoder",
    "flops": "together",
}


def render_plan(plan: TrainingPlan) -> str:
    """Returns a training plan as text; its tables have at most 110 columns."""
    train = plan.config.train
    name = "float32" if plan.dtype == torch.float32 else "bfloat16"
    source = "read" if plan.workload.measured else "assumed"
    queries = sum(map(len, plan.workload.images)) / len(plan.workload.images)
    lines = [
        f"Plan: {train.steps} steps on {plan.gpus} x {plan.gpu.name} ({plan.gpu.memory:g} GiB), {name}",
        f"{describe_batch(train, plan.gpus)}, {queries:.2g} questions an image ({source})",
        _counts(plan.parts),
        _memory(plan),
        _verdict(plan),
        _modes(plan),
        f"Time: the arithmetic at {UTILISATION:.0%} of the GPU's dense peak, without validation and waiting for files.",
        _missing(plan.missing),
    ]
    return "\n".join(lines) + "\n"


def render_inference_plan(plan: InferencePlan) -> str:
    """Returns an inference plan as text; its table has at most 110 columns."""
    total = {bits: weights + plan.read.peak + plan.cache for bits, weights in plan.stored.items()}
    table = _table("Memory, GiB, by the bits of the language model's layers", *map(str, total))
    table.add_row("weights", *map(_gib, plan.stored.values()))
    table.add_row("one image and its question, at the peak", *[_gib(plan.read.peak)] * len(total))
    table.add_row("keys and values of the answer", *[_gib(plan.cache)] * len(total))
    table.add_row("together", *map(_gib, total.values()))
    verdict = "; ".join(f"{bits} bits: {'yes' if value <= plan.gpu.usable else 'no'}" for bits, value in total.items())
    fitting = {bits: [gpu for gpu in KNOWN_GPUS if KNOWN_GPUS[gpu].usable >= value] for bits, value in total.items()}
    words = plan.max_new_tokens * plan.token_flops
    lines = [
        "Plan: inference, one question about one image at a time",
        _counts(plan.parts),
        _text(table),
        f"Fits on {plan.gpu.name} ({plan.gpu.memory:g} GiB): {verdict}.",
        *(f"  {bits} bits fit on: {', '.join(gpus) or 'none'}" for bits, gpus in fitting.items()),
        f"Arithmetic: {_tera(plan.read.flops)} TFLOP to read image and question (of it "
        f"{_tera(plan.read.image_encoder)} for the image encoder), then {plan.token_flops / 1e12:.3f} a token "
        f"of the answer, {_tera(words)} for {plan.max_new_tokens}.",
        _missing(plan.missing),
    ]
    return "\n".join(lines) + "\n"


def _counts(parts: Sequence[PartCount]) -> str:
    table = _table("Parameters, million", "all", "learning")
    together = PartCount("together", sum(p.total for p in parts), sum(p.trainable for p in parts), 0)
    for one in (*parts, together):
        table.add_row(one.part, f"{one.total / 1e6:,.2f}", f"{one.trainable / 1e6:,.2f}")
    return _text(table)


def _memory(plan: TrainingPlan) -> str:
    chosen = plan.config.train.zero_stage
    titles = [f"ZeRO {stage}{' (set)' if stage == chosen else ''}" for stage in STAGES]
    table = _table("Memory of each GPU, GiB", *titles)
    rows = {
        "weights": [memory.weights for memory in plan.memory],
        "gradients": [memory.gradients for memory in plan.memory],
        "AdamW's state": [memory.optimizer for memory in plan.memory],
        "DeepSpeed's buffers": [memory.buffers for memory in plan.memory],
        "activations, all layers kept": [plan.kept_all for _ in plan.memory],
        "activations, layers recomputed": [plan.recomputed for _ in plan.memory],
        "together, all layers kept": [memory.total + plan.kept_all for memory in plan.memory],
        "together, layers recomputed": [memory.total + plan.recomputed for memory in plan.memory],
    }
    if any(memory.host for memory in plan.memory):
        rows["offloaded to the CPU's memory"] = [memory.host for memory in plan.memory]
    for name, values in rows.items():
        table.add_row(name, *map(_gib, values))
    stored = ", ".join(f"{_gib(value)} in {bits} bits" for bits, value in plan.stored.items() if len(plan.stored) > 1)
    return _text(table) + (f"\nAll weights with the language model's layers: {stored}." if stored else "")


def _verdict(plan: TrainingPlan) -> str:
    train, room = plan.config.train, plan.gpu.usable
    usable = f"{room / 2**30:.1f} GiB ({USABLE:.0%} of {plan.gpu.name}'s)"
    if plan.peak <= room:
        advice = ", but only with train.recompute_layers=true" if plan.recompute and not train.recompute_layers else ""
        return f"It fits: {_gib(plan.peak)} of {usable}{advice}."
    rest = plan.memory[train.zero_stage].total
    images = int(train.batch_size * max(0.0, room - rest) / (plan.peak - rest))
    if plan.recompute < 1 and rest + plan.recomputed <= room:
        advice = "train.recompute_layers=true would fit"
    elif images:
        advice = f"train.batch_size={images} train.recompute_layers=true would fit"
    else:
        advice = "even one image does not fit: raise train.zero_stage, set model.mllm.bits, or take larger GPUs"
    return f"It does not fit: {_gib(plan.peak)} of {usable} with {plan.recompute:.0%} of layers recomputed; {advice}."


def _modes(plan: TrainingPlan) -> str:
    layers = {0.0: "layers kept", 1.0: "layers recomputed"}.get(plan.recompute, f"{plan.recompute:.0%} recomputed")
    table = _table(f"TFLOP of one step on each GPU ({layers})", *(one.mode.name for one in plan.modes))
    for part, name in _FLOPS.items():
        per_step = (plan.config.train.accumulation * getattr(one.cost, part) for one in plan.modes)
        table.add_row(name, *map(_tera, per_step))
    table.add_row("activations at their peak, GiB", *(_gib(one.cost.peak) for one in plan.modes))
    machine = f"{plan.gpus} x {plan.gpu.name}"
    table.add_row(f"{plan.config.train.steps} steps on {machine}", *(_time(one.days) for one in plan.modes))
    return _text(table)


def _missing(missing: Sequence[Missing]) -> str:
    if not missing:
        return "Missing: nothing."
    return "\n".join(["Missing:", *(f"  {one.setting}: {one.path} <- {one.source}" for one in missing)])


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(Text(title))
    for column in columns:
        table.add_column(Text(column), justify="right")
    return table


def _text(table: Table) -> str:
    console = Console(width=110, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _gib(value: float) -> str:
    return f"{value / 2**30:.1f}" if value >= 2**30 or value == 0 else f"{value / 2**30:.2f}"


def _tera(value: float) -> str:
    return f"{value / 1e12:,.1f}" if value >= 1e12 or value == 0 else f"{value / 1e12:.3f}"


def _time(days: float) -> str:
    for size, name in ((1, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= size:
            return f"{days / size:.1f} {name}"
    return f"{days * SECONDS_PER_DAY:.1f} seconds"
