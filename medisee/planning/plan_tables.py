"""A plan as text for a terminal or a file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medisee.planning.gpus import GPUS, USABLE
from medisee.planning.parameters import PartCount
from medisee.planning.plan import SECONDS_PER_DAY, STAGES, UTILISATION, InferencePlan, TrainingPlan
from medisee.training.optimization import describe_batch
from medisee.weights.missing import Missing

WIDTH = 110

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
    fitting = {bits: [gpu for gpu in GPUS if GPUS[gpu].usable >= value] for bits, value in total.items()}
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
    for part in parts:
        table.add_row(part.part, _million(part.total), _million(part.trainable))
    table.add_row("together", _million(sum(p.total for p in parts)), _million(sum(p.trainable for p in parts)))
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
    console = Console(width=WIDTH, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _gib(value: float) -> str:
    return f"{value / 2**30:.1f}" if value >= 2**30 or value == 0 else f"{value / 2**30:.2f}"


def _tera(value: float) -> str:
    return f"{value / 1e12:,.1f}" if value >= 1e12 or value == 0 else f"{value / 1e12:.3f}"


def _million(value: float) -> str:
    return f"{value / 1e6:,.2f}"


def _time(days: float) -> str:
    for size, name in ((1, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= size:
            return f"{days / size:.1f} {name}"
    return f"{days * SECONDS_PER_DAY:.1f} seconds"
