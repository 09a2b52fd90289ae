"""A model without its weights: built on torch's meta device, in seconds, with no memory, weights file or network.

A language model that is not on this machine is taken to have Mistral 7B's sizes and 16 bits, as LLaVA-Med has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medisee.config.model import LanguageSize, Mllm, Model
from medisee.foundation.errors import InputError
from medisee.foundation.hardware import to_training_precision
from medisee.models.medisee import MediSee
from medisee.weights.gguf import find_gguf, gguf_folder
from medisee.weights.llava_format import is_original
from medisee.weights.shards import CONFIG, read_json
from medisee.weights.tokenizer import IMAGE_TOKEN, SPECIAL, add_candidate_tokens

VOCABULARY = 32000
"""Tokens of Mistral's, Llama's and Vicuna's tokenizers."""
BYTES_OF_BITS = {8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes a weight of bitsandbytes: LLM.int8(), and NF4 with an 8-bit scale a block of 64, whose own scales are 32-bit."""

_LAYERS = "mllm.model.language_model"
_PARTS = {
    "mllm.model.language_model.embed_tokens": "embedding",
    "mllm.model.language_model": "language model",
    "mllm.lm_head": "output layer",
    "mllm.model.vision_tower": "vision tower",
    "mllm.model.multi_modal_projector": "projector",
    "seg_router": "routers",
    "box_router": "routers",
    "box_decoder": "box decoder",
    "text_projection": "text projection",
    "seg_head.image_encoder": "image encoder",
    "seg_head.prompt_encoder": "prompt encoder",
    "seg_head.mask_decoder": "mask decoder",
}
LORA = "LoRA"


@dataclass(frozen=True, slots=True)
class PartCount:
    """Parameters of one part of the model.

    Attributes:
        part: its name; `LoRA` is the language model's, an image encoder's own belongs to it.
        total: all parameters.
        trainable: those that learn.
        stored: bytes of all as training stores them.
    """

    part: str
    total: int
    trainable: int
    stored: int


def meta_model(config: Model, *, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> MediSee:
    """Builds a model without weights, stored as training stores it.

    Args:
        config: of the model; `mllm.source` may be missing.
        dtype: what the run computes in.
        layers: layers of the language model; None: all. They attend with SDPA where the run has flex attention, which
            runs on no such tensors, does not more arithmetic and keeps no mask.

    Raises:
        InputError: sizes that do not go together; a language model whose config.json cannot be read.
    """
    planned = _described(config.mllm)
    mllm = planned.mllm
    if mllm.attention == "flex":
        mllm = mllm.model_copy(update={"attention": "sdpa"})
    if layers is not None:
        mllm = mllm.model_copy(update={"size": mllm.size.model_copy(update={"layers": layers})})
    tokenizer = stand_in_tokenizer(config)
    with _default_dtype(planned.dtype), torch.device("meta"):
        model = MediSee(config.model_copy(update={"mllm": mllm}), tokenizer, weights=False)
    for name, part in model.named_children():
        if name != "mllm":
            part.float()
    to_training_precision(model, dtype)
    return model


def stand_in_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    """Makes a tokenizer with as many entries as the model's own, for which every word is one token."""
    planned = _described(config.mllm)
    words = max(planned.tokens, planned.rows - len({*config.candidate_tokens, IMAGE_TOKEN}))
    vocabulary = {name: number for number, name in enumerate(SPECIAL)}
    vocabulary |= {f"word{number}": number for number in range(len(SPECIAL), words)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    add_candidate_tokens(result, config.candidate_tokens)
    return result


def language_layers(config: Model) -> int:
    """Returns the number of the language model's layers."""
    return _described(config.mllm).mllm.size.layers


def parameter_counts(config: Model, *, dtype: torch.dtype = torch.bfloat16) -> list[PartCount]:
    """Counts the parameters of each part, in the order of the data flow; what a model lacks is left out.

    Raises:
        InputError: see `meta_model`.
    """
    return count_parts(meta_model(config, dtype=dtype))


def count_parts(model: MediSee) -> list[PartCount]:
    """Counts the parameters of each part of a model, on the meta device or not."""
    order = dict.fromkeys([_PARTS["mllm.model.language_model"], LORA, *_PARTS.values()])
    found: dict[str, list[nn.Parameter]] = {part: [] for part in order}
    for name, parameter in model.named_parameters():
        found[_part(name)].append(parameter)
    return [
        PartCount(
            part,
            sum(one.numel() for one in own),
            sum(one.numel() for one in own if one.requires_grad),
            sum(one.numel() * one.element_size() for one in own),
        )
        for part, own in found.items()
        if own
    ]


def quantised_weights(model: MediSee) -> int:
    """Counts the weights that 4 or 8 bits hold: the frozen linear layers inside the language model."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(f"{_LAYERS}.layers.") and parameter.ndim == 2 and not parameter.requires_grad
    )


def _part(name: str) -> str:
    if name.startswith(_LAYERS) and ".lora_" in name:
        return LORA
    return next(part for prefix, part in _PARTS.items() if name.startswith(f"{prefix}."))


@dataclass(frozen=True, slots=True)
class _Described:
    """A language model built from sizes in place of one that would be loaded; `rows` of its embedding."""

    mllm: Mllm
    tokens: int
    rows: int
    dtype: torch.dtype


def _described(config: Mllm) -> _Described:
    if config.source is None:
        return _Described(config, config.vocabulary, 0, torch.float32)
    at_random = config.image_tokens == "seg_head"
    changes: dict[str, Any] = {
        "source": None,
        "train_projector": at_random if config.train_projector is None else config.train_projector,
    }
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    here = config.is_gguf and find_gguf(config.source) is not None
    path = (gguf_folder(config) if here else Path(config.source)) / CONFIG
    if not path.is_file():
        return _Described(config.model_copy(update={**changes, "size": LanguageSize()}), VOCABULARY, 0, dtype)
    settings = read_json(path)
    text = settings if is_original(settings) else _settings_of(path)
    size = LanguageSize(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        intermediate=text["intermediate_size"],
    )
    if config.dtype == "auto" and "float32" in (settings.get("dtype"), settings.get("torch_dtype")):
        dtype = torch.float32
    rows = text["vocab_size"]
    tokens = min(rows, settings.get("image_token_index") or rows)
    vision = text.get("vision", {})
    return _Described(config.model_copy(update={**changes, **vision, "size": size}), tokens, rows, dtype)


def _settings_of(path: Path) -> dict[str, Any]:
    try:
        settings: Any = AutoConfig.from_pretrained(path.parent)
        text, vision = settings.text_config, settings.vision_config
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: describes no transformers Llava ({error}); fetch it again.") from error
    own = {
        "vision_hidden": vision.hidden_size,
        "vision_layers": vision.num_hidden_layers,
        "vision_size": vision.image_size,
        "vision_patch": vision.patch_size,
        "vision_heads": vision.num_attention_heads,
        "vision_intermediate": vision.intermediate_size,
    }
    return {**text.to_dict(), "vision": own}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
