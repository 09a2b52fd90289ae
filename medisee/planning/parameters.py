"""A model without its weights: built on torch's meta device, in seconds, with no memory, weights file or network.

A language model that is not on this machine is taken to have Mistral 7B's sizes and 16 bits, as LLaVA-Med has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medisee.config.model import LanguageSize, Mllm, Model
from medisee.foundation.errors import InputError
from medisee.foundation.hardware import to_training_precision
from medisee.foundation.json_files import read_json
from medisee.models.medisee import MediSee
from medisee.weights.gguf import find_gguf, gguf_folder
from medisee.weights.llava import llava_settings
from medisee.weights.llava_format import is_original
from medisee.weights.shards import CONFIG
from medisee.weights.tokenizer import IMAGE_TOKEN, SPECIAL, add_candidate_tokens

VOCABULARY = 32000  # tokens of Mistral's, Llama's and Vicuna's tokenizers
# Of bitsandbytes: LLM.int8(), and NF4 with an 8-bit scale per block of 64, whose own scales are 32-bit.
BYTES_OF_BITS = {8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
_LAYERS = "mllm.model.language_model"
_PARTS = {
    f"{_LAYERS}.embed_tokens": "embedding",
    _LAYERS: "language model",
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


@dataclass(frozen=True, slots=True)
class PartCount:
    """Parameters of one part of the model."""

    part: str  # `LoRA` is the language model's; an image encoder's counts as part of the encoder
    total: int
    trainable: int
    stored: int  # bytes of all as training stores them


def meta_model(config: Model, *, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> MediSee:
    """Builds a model without weights, stored as training stores it.

    `config.mllm.source` may be missing. Flex attention is replaced by SDPA, since it does not run on tensors without
    memory. The language model has its first `layers` only, if given.
    """
    planned = _described(config.mllm)
    mllm = planned.mllm
    if mllm.attention == "flex":
        mllm = mllm.model_copy(update={"attention": "sdpa"})
    if layers is not None:
        mllm = mllm.model_copy(update={"size": mllm.size.model_copy(update={"layers": layers})})
    # The language model adapts what trains to the type that it is built in, so casting it afterwards is not the same.
    before = torch.get_default_dtype()
    torch.set_default_dtype(planned.dtype)
    try:
        with torch.device("meta"):
            model = MediSee(config.model_copy(update={"mllm": mllm}), stand_in_tokenizer(config), weights=False)
    finally:
        torch.set_default_dtype(before)
    for name, part in model.named_children():
        if name != "mllm":
            part.float()
    to_training_precision(model, dtype)
    return model


def stand_in_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    """Makes a tokenizer with as many entries as the model's own, for which every word is one token."""
    planned = _described(config.mllm)
    words = max(planned.tokens, planned.rows - len({*config.candidate_tokens, IMAGE_TOKEN}))
    return word_tokenizer(words, config.candidate_tokens)


def word_tokenizer(words: int, candidate_tokens: tuple[str, ...]) -> PreTrainedTokenizerBase:
    """Makes a tokenizer of `words` entries, for which every word is one token, and adds the candidate tokens."""
    vocabulary = {name: number for number, name in enumerate(SPECIAL)}
    vocabulary |= {f"word{number}": number for number in range(len(SPECIAL), words)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    add_candidate_tokens(result, candidate_tokens)
    return result


def language_layers(config: Model) -> int:
    """Returns the number of the language model's layers."""
    return _described(config.mllm).mllm.size.layers


def count_parts(model: MediSee) -> list[PartCount]:
    """Counts the parameters of each part of a model, on the meta device or not; parts that a model lacks are left out."""
    found: dict[str, list[nn.Parameter]] = {part: [] for part in ("language model", "LoRA", *_PARTS.values())}
    for name, parameter in model.named_parameters():
        lora = name.startswith(_LAYERS) and ".lora_" in name
        part = "LoRA" if lora else next(part for prefix, part in _PARTS.items() if name.startswith(f"{prefix}."))
        found[part].append(parameter)
    return [
        PartCount(
            part,
            sum(one.numel() for one in own),
            sum(one.numel() for one in own if one.requires_grad),
            sum(one.nbytes for one in own),
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
    settings = read_json(path, "the settings of a LLaVA")
    text = settings
    if not is_original(settings):
        llava = llava_settings(path.parent)
        text, vision = llava.text_config.to_dict(), llava.vision_config
        changes |= {
            "vision_hidden": vision.hidden_size,
            "vision_layers": vision.num_hidden_layers,
            "vision_size": vision.image_size,
            "vision_patch": vision.patch_size,
            "vision_heads": vision.num_attention_heads,
            "vision_intermediate": vision.intermediate_size,
        }
    try:
        changes["size"] = LanguageSize(
            hidden=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            intermediate=text["intermediate_size"],
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: its sizes fit no language model ({error!r:.200}); fetch it again.") from error
    if config.dtype == "auto" and "float32" in (settings.get("dtype"), settings.get("torch_dtype")):
        dtype = torch.float32
    rows = text["vocab_size"]
    tokens = min(rows, settings.get("image_token_index") or rows)
    return _Described(config.model_copy(update=changes), tokens, rows, dtype)
