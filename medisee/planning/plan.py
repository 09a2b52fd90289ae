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
from tqdm import tqdm

from medisee.config import Config, Train
from medisee.config.load import config_from
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.planning.cost import StepCost, cost_on_line, query_cost, training_cost
from medisee.planning.gpus import Gpu, find_gpu
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
from medisee.training.optimization import split_batch
from medisee.weights.missing import Missing, missing_files, missing_weights
from medisee.weights.shards import CONFIG, read_json

GPU = "a6000"
GPUS = 4
UTILISATION = 0.35
"""Share of a GPU's dense peak that training reaches. Published runs of large models report 0.21 (GPT-3), 0.30 (MT-NLG),
0.33 (Gopher) and 0.46 (PaLM; all in table 3 of its paper): 0.35 is between them. Code that is less tuned than theirs
loses what a small model without parallel layers gains."""
SECONDS_PER_DAY = 86400
STAGES = (0, 1, 2, 3)
ADAMW = 8
"""Bytes per trainable parameter of AdamW's two float32 moments."""
MASTER = 4
"""Bytes of the copy that DeepSpeed's ZeRO updates, in float32, as trainable parameters already are."""
BUCKET = 5 * 10**8
"""Elements of DeepSpeed's reduce_bucket_size, which ZeRO allocates as a whole."""
LIVE = 10**9
"""Most parameters that ZeRO 3 gathers at a time: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on each GPU under one ZeRO stage, without activations.

    Attributes:
        optimizer: AdamW's moments, and ZeRO's copy of the trainable weights.
        buffers: ZeRO's bucket for gradients, and the weights that ZeRO 3 gathers.
        host: what is offloaded to the CPU's memory, per process; not part of the total.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    host: float

    @property
    def total(self) -> float:
        """On the GPU."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True, slots=True)
class ModeCost:
    """One compute mode: a micro-batch's cost, and how long the whole run takes."""

    mode: ComputeMode
    cost: StepCost
    days: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """A planned training run.

    Attributes:
        config: of the run, with the accumulation that this number of GPUs needs.
        memory: for each ZeRO stage.
        stored: bytes of all weights with the language model's layers unchanged (16), and in 8 and 4 bits.
        kept_all, recomputed: activations' peak in bytes with every layer's kept, and with every layer recomputed.
        recompute: share of the layers that are recomputed in the modes below: as configured, or all where the GPU is
            too small otherwise.
        modes: the release's compute mode and ours.
    """

    config: Config
    gpu: Gpu
    gpus: int
    dtype: torch.dtype
    workload: Workload
    parts: tuple[PartCount, ...]
    memory: tuple[Memory, ...]
    stored: dict[int, float]
    kept_all: float
    recomputed: float
    recompute: float
    modes: tuple[ModeCost, ...]
    missing: tuple[Missing, ...]

    @property
    def peak(self) -> float:
        """Bytes on each GPU at the configured stage."""
        activations = self.kept_all + self.recompute * (self.recomputed - self.kept_all)
        return self.memory[self.config.train.zero_stage].total + activations


@dataclass(frozen=True, slots=True, kw_only=True)
class InferencePlan:
    """Planned inference, one query at a time.

    Attributes:
        cache: bytes of the language model's keys and values for the longest answer, of `max_new_tokens`.
        read: cost of the image, the question and the decoders.
        token_flops: floating-point operations of each further token of the answer.
    """

    gpu: Gpu
    parts: tuple[PartCount, ...]
    stored: dict[int, float]
    cache: float
    read: StepCost
    token_flops: float
    max_new_tokens: int
    missing: tuple[Missing, ...]


def plan_training(config: Config, *, gpu: str = GPU, gpus: int = GPUS) -> TrainingPlan:
    """Plans a training run under DeepSpeed, whose files may be missing.

    Raises:
        InputError: an unknown GPU or none; sizes that do not fit together; a manifest that cannot be read.
    """
    device = _checked(gpu, gpus)
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
    """Plans inference with one query at a time.

    Raises:
        InputError: see `plan_training`.
    """
    device = _checked(gpu, 1)
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
    """Returns the configuration of a checkpoint's model.

    Raises:
        InputError: the folder holds no checkpoint.
    """
    path = folder / CONFIG
    content = read_json(path) if path.is_file() else {}
    if "model" not in content:
        raise InputError(
            f"--checkpoint {folder}: holds no checkpoint; give the folder that training wrote, or --config."
        )
    return config_from({"model": content["model"]}, where=str(path))


def _checked(gpu: str, gpus: int) -> Gpu:
    problems = [] if gpus >= 1 else [f"--gpus {gpus}: expected 1 or more; a plan needs a GPU."]
    try:
        device = find_gpu(gpu)
    except InputError as error:
        raise InputError([*error.problems, *problems]) from error
    if problems:
        raise InputError(problems)
    return device


def _stored(model: MediSee, config: Config) -> dict[int, float]:
    """Returns the bytes of all weights, with the language model's layers unchanged (16) and, if published, in 8 and 4 bits."""
    whole = float(sum(parameter.nbytes for parameter in model.parameters()))
    if config.model.mllm.source is None:
        return {16: whole}
    count = quantised_weights(model)
    width = next(iter(model.mllm.model.language_model.layers.parameters())).element_size()
    return {16: whole} | {bits: whole + (one - width) * count for bits, one in BYTES_OF_BITS.items()}
