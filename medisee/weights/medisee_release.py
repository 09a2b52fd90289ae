"""The authors' checkpoint, tensor by tensor: names, the order of the routers' inputs, the vocabulary.

It differs from ours in three ways:
- LoRA's base weights are called `q_proj.weight` (peft 0.4) or `q_proj.base_layer.weight` (later);
- the routers read and weigh the states in the order [BBOX], [SEG], ours in that of `Model.candidate_tokens`;
- it marks the image by the id -200 and has no row for `<image>`; ours is added with zeros. Its embedding is always
  replaced by image states, and `MediSee.text_logits` never lets it be a next token.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medisee.config.model import Model
from medisee.foundation.errors import InputError, shortened
from medisee.weights.llava_format import LLAVA_DROPPED, LLAVA_NAMES, named_back, renamed
from medisee.weights.shards import WEIGHT_TYPES, Shard, ShardPlan, TensorFacts

RELEASE_TOKENS = ("[BBOX]", "[SEG]")
"""The candidate tokens in the order of the release's routers; its vocabulary has them in reverse order."""

PARTS = {
    "language model": "mllm.model.language_model.",
    "output layer": "mllm.lm_head.",
    "projector": "mllm.model.multi_modal_projector.",
    "vision tower": "mllm.model.vision_tower.",
    "seg head": "seg_head.",
    "routers": ("seg_router.", "box_router."),
    "box decoder": "box_decoder.",
    "text projection": "text_projection.",
}
"""Our model's parts and the beginnings of their tensors' names."""

_NAMES = (
    *((old, f"mllm.{new}") for old, new in LLAVA_NAMES),
    ("model.visual_model.", "seg_head."),
    ("model.router_seg.", "seg_router."),
    ("model.router_box.", "box_router."),
    ("model.bbox_decoder.layers.0.", "box_decoder.layers.0."),
    ("model.bbox_decoder.layers.1.", "box_decoder.layers.2."),
    ("model.bbox_decoder.layers.2.", "box_decoder.layers.4."),
    ("model.text_hidden_fcs.0.", "text_projection."),
)
_PEFT = "base_model.model."
_SAM_CONSTANTS = re.compile(r"model\.visual_model\.pixel_(mean|std)")
_ADAPTED = re.compile(
    r"(mllm\.model\.language_model\.layers\.\d+\.self_attn\.[qv]_proj)\.(?:base_layer\.)?(weight|bias)"
)
_VOCABULARY = ("mllm.model.language_model.embed_tokens.weight", "mllm.lm_head.weight")


@dataclass(slots=True)
class Report:
    """What was converted.

    Attributes:
        placed: number of tensors of each part.
        parameters: number of values of each part, as read.
        dropped: keys that are left out, and why.
        dtypes: number of tensors of each type.
    """

    placed: Counter[str] = field(default_factory=Counter)
    parameters: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, str] = field(default_factory=dict)
    dtypes: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Returns the report as the lines of a table."""
        lines = [f"{part:<16} {self.placed[part]:>5} tensors {self.parameters[part]:>14,} values" for part in PARTS]
        lines += [f"left out: {key} ({reason})" for key, reason in self.dropped.items()]
        return [*lines, "stored as " + ", ".join(f"{name}: {count}" for name, count in sorted(self.dtypes.items()))]


def our_name(key: str, *, lora: bool) -> str | None:
    """Returns our name of a tensor of the release, with or without peft's prefix; None for an unknown key.

    If our language model has LoRA, its base weights are called `base_layer`.
    """
    name = renamed(key.removeprefix(_PEFT), _NAMES)
    return name and _ADAPTED.sub(rf"\1.{'base_layer.' if lora else ''}\2", name)


def release_key(name: str) -> str:
    """Returns the release's key of one of our tensors, in the spelling of peft 0.4."""
    return _PEFT + named_back(_ADAPTED.sub(r"\1.\2", name), _NAMES)


def why_dropped(key: str) -> str | None:
    """Returns the reason why a key of the release has no place in our model, None when it should have one."""
    key = key.removeprefix(_PEFT)
    if LLAVA_DROPPED.fullmatch(key):
        return "computed from the sizes"
    return "a constant of SAM" if _SAM_CONSTANTS.fullmatch(key) else None


def our_values(name: str, values: Tensor, candidate_tokens: tuple[str, ...]) -> Tensor:
    """Converts a tensor of the release, or its gradient, to our order and vocabulary; `name` is ours.

    `candidate_tokens` are RELEASE_TOKENS in our order. A tensor for another number of tokens is returned unchanged.
    """
    order = [RELEASE_TOKENS.index(token) for token in candidate_tokens]
    if name.endswith("_router.gate.0.weight") and values.ndim == 2 and values.shape[1] % len(order) == 0:
        return values.unflatten(1, (len(order), -1))[:, order].flatten(1)
    if name.endswith(("_router.gate.2.weight", "_router.gate.2.bias")) and len(values) == len(order):
        return values[order]
    if name in _VOCABULARY and values.ndim == 2:
        return torch.cat([values, values.new_zeros(1, values.shape[1])])
    return values


def place(shard: Shard, *, expected: Mapping[str, torch.Size], config: Model, report: Report) -> ShardPlan:
    """Finds the place of one file's tensors in our model and adds them to the report; nothing is read yet.

    `expected` are names and shapes of all tensors of our model, which `config` describes.
    """
    plan = ShardPlan(shard.path, {}, {})
    problems: list[str] = []
    for key, facts in shard.tensors.items():
        if reason := why_dropped(key):
            report.dropped[key] = reason
            continue
        name = our_name(key, lora=config.mllm.train == "lora")
        if name is None or name not in expected:
            fix = "expected the authors' checkpoint of the model that the configuration describes."
            if ".lora_" in key and config.mllm.train != "lora":
                fix = "the weights have LoRA, so set model.mllm.train=lora."
            problems.append(f"{shard.path}: unknown tensor {key}; {fix}")
            continue
        # The meta device computes shapes without values.
        shape = our_values(name, torch.empty(facts.shape, device="meta"), config.candidate_tokens).shape
        if shape != expected[name] and name in _VOCABULARY and len(facts.shape) == 2:
            rows, width = expected[name]
            problems.append(
                f"{shard.path}: {key} has {facts.shape[0]} rows of {facts.shape[1]}, but the tokenizer has {rows - 1} "
                f"tokens beside <image>, and the configuration has width {width}; give its own tokenizer and sizes."
            )
        elif facts.dtype not in WEIGHT_TYPES:
            problems.append(
                f"{shard.path}: {key} holds {facts.dtype} numbers, which cannot be weights; fetch it again."
            )
        elif shape != expected[name]:
            problems.append(
                f"{shard.path}: {key} has shape {facts.shape}, the configuration expects {tuple(expected[name])}; "
                "correct the sizes in the configuration."
            )
        else:
            plan.tensors[name], plan.old_names[name] = TensorFacts(tuple(shape), facts.dtype), key
            part = next(part for part, begins in PARTS.items() if name.startswith(begins))
            report.placed[part] += 1
            report.parameters[part] += torch.Size(facts.shape).numel()
            report.dtypes[str(facts.dtype).removeprefix("torch.")] += 1
    if problems:
        raise InputError(shortened(problems, str(shard.path)))
    return plan
