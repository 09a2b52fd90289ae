"""Times a training step in the release's compute mode and in ours: the same model, images and questions in one run.

  python scripts/bench_train.py                                          the middle size, float32: minutes
  python scripts/bench_train.py --size small --repeats 1                 seconds

A step is forward, backward, clipping and AdamW. Each mode runs in a separate process, whose peak memory is measured above
what the process holds once the model is built. Prints a table, and as the last line the same as JSON. `step_ratio` and
`lm_ratio` above 1 mean that ours is faster, a `memory_ratio` below 1 that ours needs less.

Shapes: S sequences, L sequence length, D hidden width, N supervised positions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compute_modes import (
    MASK_RESOLUTION,
    MODES,
    ModeLoss,
    all_labels,
    all_logits,
    input_states,
    language_states,
    make_batch,
    use_package,
)

from medisee.config import Config
from medisee.config.load import config_from, load_config
from medisee.foundation.errors import InputError, exit_code, nearest
from medisee.foundation.hardware import keep_freed_memory
from medisee.models.losses import Terms, text_loss
from medisee.models.medisee import MediSee
from medisee.models.processing import Batch, Example, Query
from medisee.planning.parameters import word_tokenizer
from medisee.planning.plan import plan_training
from medisee.planning.workload import TEMPLATE_TOKENS, ComputeMode, Lengths, training_workload
from medisee.records.prompts import CANDIDATE_TOKENS, candidate_text
from medisee.training.optimization import Optimization
from medisee.weights.tokenizer import SPECIAL

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMAGES = 4
PAPER = Path(__file__).parents[1] / "configs" / "medisee_7b.yaml"
COMPARED = (
    "release's mode: one sequence per query, padded; the vision tower per query; segment-anything's own encoder; logits at "
    "every position. Ours: one packed sequence per image, unpadded; the vision tower per image; logits where supervised."
)


@dataclass(frozen=True, slots=True)
class Size:
    """What is timed: a model of the configuration, on square images of `image` pixels a side."""

    model: dict[str, Any]
    vocabulary: int  # words of the tokenizer, without candidate tokens and `<image>`
    image: int


_LANGUAGE = {"train_projector": False, "lora": {"dropout": 0.0}}
_MIDDLE = {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 8, "intermediate": 2048}
_MIDDLE_ENCODER = {"width": 192, "depth": 4, "heads": 3, "global_attention": (1, 3)}
_SMALL = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64, "initial_std": 0.2}
SIZES = {
    "middle": Size(
        {
            "mllm": {"size": _MIDDLE, "vision_hidden": 256, "vision_layers": 6, **_LANGUAGE},
            "seg_head": {"size": 1024, "sizes": _MIDDLE_ENCODER},
        },
        vocabulary=32000,
        image=512,
    ),
    "small": Size(
        {
            "mllm": {"size": _SMALL, "vision_hidden": 32, "vision_layers": 2, "vision_size": 56, **_LANGUAGE},
            "seg_head": {"vit": "micro", "size": 64},
            "router_hidden": 16,
            "box_hidden": 16,
        },
        vocabulary=400,
        image=48,
    ),
}


@dataclass(frozen=True, slots=True)
class Figures:
    """What one compute mode takes: median seconds, and the losses of the first step, before it changes anything."""

    way: str  # name of the mode
    step_s: float
    lm_s: float  # the language model alone: layers, logits and cross-entropy, forward and backward
    head_s: float  # the part of `lm_s` that logits and cross-entropy take
    encoders_s: float  # both image encoders, which compute forward only
    memory: int  # bytes at the steps' peak above the built model
    positions: int  # computed by the language model, padding included
    total_loss: float
    text_loss: float
    gradient_norm: float


def random_examples(config: Config, size: Size) -> list[Example]:
    """Makes random images with questions of random words, as many and as long as a plan assumes for the paper's run."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"word{number}" for number in rng.integers(len(SPECIAL), size.vocabulary, count))

    def query(image: int, place: int, lengths: Lengths) -> Query:
        tokens = candidate_text(CANDIDATE_TOKENS)
        answer = f"{words(max(1, lengths.answer - len(tokens.split()) - 1))} {tokens} "
        mask = np.zeros((size.image, size.image), dtype=bool)
        top, left = rng.integers(0, size.image // 2, 2)
        mask[top : top + size.image // 3, left : left + size.image // 4] = True
        question = words(lengths.question + TEMPLATE_TOKENS - 2)
        return Query(record=f"image{image}", target=f"target{place}", question=question, answer=answer, mask=mask)

    examples = []
    for image, lengths in enumerate(training_workload(config).images):
        pixels = rng.integers(0, 256, (size.image, size.image, 3), dtype=np.uint8)
        queries = tuple(query(image, place, one) for place, one in enumerate(lengths))
        examples.append(Example(pixels, size.image, size.image, queries))
    return examples


def time_parts(model: MediSee, batch: Batch, mode: ComputeMode, dtype: torch.dtype) -> tuple[float, float, float]:
    """Returns the seconds of the image encoders, of the language model on ready inputs, and of logits and loss in it."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        started = time.perf_counter()
        with torch.no_grad():
            inputs_SLD = input_states(model, batch, model.embed_images(batch))
        encoders = time.perf_counter() - started
        inputs_SLD.requires_grad_()  # the embedding learns
        started = time.perf_counter()
        hidden_SLD = language_states(model, inputs_SLD, batch, mode)
        head_started = time.perf_counter()
        states_SLD = hidden_SLD.detach().requires_grad_()
        if mode.all_logits:
            values_N = text_loss(all_logits(model, states_SLD), all_labels(batch))
        else:
            states_ND = states_SLD[batch.supervised_N2[:, 0], batch.supervised_N2[:, 1]]
            values_N = text_loss(model.text_logits(states_ND), batch.labels_N)
        loss = values_N.sum() / len(batch.labels_N)
    loss.backward()
    head = time.perf_counter() - head_started
    hidden_SLD.backward(states_SLD.grad)
    lm = time.perf_counter() - started
    model.zero_grad()
    return encoders, lm, head


def measure(size: Size, name: str, *, repeats: int, dtype: torch.dtype) -> Figures:
    """Takes one warm-up step and `repeats` timed ones in a mode, then times the parts as often."""
    mode, masks = MODES[name], MASK_RESOLUTION.get(name)
    config = config_from(
        {
            "model": size.model,
            "loss": {"mask_resolution": masks} if masks else {},
            "train": {"batch_size": IMAGES, "accumulation": 1, "lr": 1e-6, "warmup": 0},
        },
        where=str(Path(__file__).name),
    )
    torch.manual_seed(0)
    model = MediSee(config.model, word_tokenizer(size.vocabulary, CANDIDATE_TOKENS), weights=False).train()
    if name == "release":
        use_package(model)
    model.unpadded = mode.packed
    batch = make_batch(model, random_examples(config, size), mode, config.loss)
    optimization = Optimization(ModeLoss(model, config.loss, mode, dtype=dtype), config.train)
    base = _resident()
    # Not earlier: memory that the features took would be kept, and be missing from the peak.
    keep_freed_memory()
    terms, norm = _step(optimization, batch)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        _step(optimization, batch)
        seconds.append(time.perf_counter() - started)
    memory = _resident(peak=True) - base
    parts = [time_parts(model, batch, mode, dtype) for _ in range(repeats)]
    encoders, lm, head = (statistics.median(values) for values in zip(*parts, strict=True))
    return Figures(
        way=mode.name,
        step_s=statistics.median(seconds),
        lm_s=lm,
        head_s=head,
        encoders_s=encoders,
        memory=memory,
        positions=sum(batch.lengths) if mode.packed else batch.input_ids_SL.numel(),
        total_loss=float(terms.total),
        text_loss=float(terms.text),
        gradient_norm=norm,
    )


def _step(optimization: Optimization, batch: Batch) -> tuple[Terms, float]:
    terms = optimization.losses(batch, masks="full")
    optimization.backward(terms.total)
    return terms.detach(), optimization.step()


def _resident(*, peak: bool = False) -> int:
    """Returns this process's resident bytes: now, which also resets the peak, or at the peak."""
    # getrusage would include the process that started this one.
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _compare(arguments: argparse.Namespace) -> None:
    print(COMPARED, flush=True)
    names = ("step s", "lm s", "head s", "encoders s", "peak GiB", "positions", "text loss")
    print(f"{'':<28}" + "".join(f"{name:>12}" for name in names), flush=True)
    options = [f"--{key}={getattr(arguments, key)}" for key in ("size", "repeats", "threads", "dtype")]
    figures: dict[str, Figures] = {}
    for name in MODES:
        done = subprocess.run([sys.executable, __file__, "--way", name, *options], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise InputError(f"--way {name}: its process ended with code {done.returncode}; use less memory.")
        one = figures[name] = Figures(**json.loads(done.stdout.splitlines()[-1]))
        values = (one.step_s, one.lm_s, one.head_s, one.encoders_s, one.memory / 2**30)
        print(f"{one.way:<28}" + "".join(f"{v:>12.3f}" for v in values) + f"{one.positions:>12}{one.text_loss:>12.6f}")
    theirs, plain, cached, bounded = (figures[name] for name in ("release", "supervised", "cached", "bounded"))
    # Projecting the paper's run takes a minute or more.
    planned = plan_training(load_config(PAPER)).modes if arguments.size == "middle" else ()
    days = {one.mode.name: one.days for one in planned}
    for mode, value in days.items():
        print(f"the paper's run on 4 x A6000 by --plan's cost model, {mode}: {value:.2f} days")
    result = {
        **{key: getattr(arguments, key) for key in ("size", "dtype", "repeats", "threads")},
        "torch": torch.__version__,
        "ways": {name: asdict(one) for name, one in figures.items()},
        "days": days,
        "step_ratio": theirs.step_s / cached.step_s,
        "step_ratio_without_cache": theirs.step_s / plain.step_s,
        "step_ratio_bounded": theirs.step_s / bounded.step_s,
        "lm_ratio": theirs.lm_s / plain.lm_s,
        "memory_ratio": cached.memory / theirs.memory,
        "memory_ratio_without_cache": plain.memory / theirs.memory,
        "memory_ratio_bounded": bounded.memory / theirs.memory,
    }
    print(
        f"a step is {result['step_ratio']:.2f}x faster with cached features, {result['step_ratio_without_cache']:.2f}x "
        f"without, {result['step_ratio_bounded']:.2f}x with both cached features and small mask losses; the language model "
        f"alone {result['lm_ratio']:.2f}x; peak memory {result['memory_ratio']:.2f}x with cached features, "
        f"{result['memory_ratio_without_cache']:.2f}x without, {result['memory_ratio_bounded']:.2f}x with both"
    )
    print(json.dumps(result))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures from the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="middle", help=f"model size: {' or '.join(SIZES)}")
    parser.add_argument("--way", choices=list(MODES), help="measure one compute mode in this process")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each mode")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="compute precision")
    arguments = parser.parse_args(argv)
    if arguments.size not in SIZES:
        hint = nearest(arguments.size, SIZES)
        raise InputError(f"--size {arguments.size}: unknown; expected {' or '.join(SIZES)}.{hint}")
    if min(arguments.repeats, arguments.threads) < 1:
        raise InputError("--repeats and --threads: expected 1 or more each.")
    torch.set_num_threads(arguments.threads)
    if arguments.way is None:
        _compare(arguments)
        return
    figures = measure(SIZES[arguments.size], arguments.way, repeats=arguments.repeats, dtype=DTYPES[arguments.dtype])
    print(json.dumps(asdict(figures)))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
