"""What an original LLaVA(-Med) checkpoint means in transformers' Llava: names, sizes, tokenizer.

An original checkpoint was written by LLaVA's own code: config.json names `LlavaMistralForCausalLM` or
`LlavaLlamaForCausalLM`, tensors have LLaVA's names, and tokenizer.model is often the only tokenizer. Its code is never
run. llava_convert.py writes it in transformers' format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AddedToken,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from medisee.foundation.errors import InputError, library_errors
from medisee.foundation.json_files import read_json
from medisee.weights.shards import CONFIG, TensorFacts, some
from medisee.weights.tokenizer import as_legacy, read_tokenizer, sentencepiece_tokenizer

LLAVA_NAMES = (
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("lm_head.", "lm_head."),
)
"""Beginnings of tensor names in an original checkpoint, and in transformers' Llava."""
LLAVA_DROPPED = re.compile(r".*\.rotary_emb\.inv_freq|.*vision_model\.embeddings\.position_ids")
"""Buffers that older versions saved and that are computed from the sizes."""
CLIP_NAMES = (
    ("vision_model.", "model.vision_tower."),
    *((f"{part}.", f"model.vision_tower.{part}.") for part in ("embeddings", "pre_layrnorm", "encoder")),
    ("post_layernorm.", "model.vision_tower.post_layernorm."),
)
CLIP_DROPPED = re.compile(
    r"text_model\..*|(text|visual)_projection\.weight|logit_scale|(vision_model\.)?embeddings\.position_ids"
)
"""CLIP's text side, which no Llava has."""

_LANGUAGE = {"llava_mistral": "mistral", "llava_llama": "llama", "llava": "llama"}
_ARCHITECTURES = {"LlavaMistralForCausalLM": "mistral", "LlavaLlamaForCausalLM": "llama"}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def renamed(name: str, beginnings: Iterable[tuple[str, str]]) -> str | None:
    """Replaces the beginning of a name by that of the first pair (old, new) that fits; None where none does."""
    return next((new + name[len(old) :] for old, new in beginnings if name.startswith(old)), None)


def named_back(name: str, beginnings: Iterable[tuple[str, str]]) -> str:
    """Undoes `renamed`; a name that no pair fits is returned unchanged."""
    return renamed(name, [(new, old) for old, new in beginnings]) or name


def is_original(settings: Mapping[str, Any]) -> bool:
    """Tells whether a config.json is that of an original LLaVA checkpoint."""
    return _language(settings) is not None


def _language(settings: Mapping[str, Any]) -> str | None:
    listed = settings.get("architectures")
    for name in listed if isinstance(listed, list) else ():
        if str(name) in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    # transformers calls its own Llava "llava" too, and nests the language model's sizes.
    if "text_config" in settings or "mm_vision_tower" not in settings:
        return None
    return _LANGUAGE.get(str(settings.get("model_type")))


def llava_config(path: Path, settings: Mapping[str, Any], vision: CLIPVisionConfig) -> LlavaConfig:
    """Translates the content of an original config.json, which is at `path`.

    The sliding window is None, as in LLaVA-Med's training, whatever the file says; the base of the rotary code is the
    file's, or 1e6 for Mistral and 1e4 for Llama. Values whose defaults differ between versions of transformers are
    written out.
    """
    language = _language(settings)
    problems = [
        f"{path}: {key} is {settings.get(key, 'missing')!r:.50}, expected a whole number above 0; fetch it again."
        for key in _SIZES
        if type(settings.get(key)) is not int or settings[key] < 1
    ]
    refused = {
        "mm_projector_type": settings.get("mm_projector_type") != "mlp2x_gelu",
        "mm_use_im_start_end": bool(settings.get("mm_use_im_start_end")),
        "tie_word_embeddings": bool(settings.get("tie_word_embeddings")),
        # cls_patch adds a class token before the patches, for which prompts have no place.
        "mm_vision_select_feature": settings.get("mm_vision_select_feature", "patch") != "patch",
    }
    problems += [
        f"{path}: {key} = {settings.get(key)!r} is not supported; give LLaVA-Med v1.5 or LLaVA v1.5."
        for key, wrong in refused.items()
        if wrong
    ]
    if problems:
        raise InputError(problems)
    with library_errors(path, "does not describe a LLaVA", "fetch it again"):
        return _llava_config(settings, language, vision)


def _llava_config(settings: Mapping[str, Any], language: str | None, vision: CLIPVisionConfig) -> LlavaConfig:
    theta = settings.get("rope_theta") or (1e6 if language == "mistral" else 1e4)
    scaling = dict(settings.get("rope_scaling") or {})
    # Older configurations call the kind "type".
    older = scaling.pop("type", None)
    kind = scaling.get("rope_type") or older
    scaling = scaling | {"rope_type": kind} if kind else {}
    common: dict[str, Any] = {key: settings[key] for key in _SIZES}
    common |= {
        "num_key_value_heads": settings.get("num_key_value_heads") or settings["num_attention_heads"],
        "head_dim": settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"],
        "hidden_act": settings.get("hidden_act", "silu"),
        "max_position_embeddings": settings.get("max_position_embeddings", 32768 if language == "mistral" else 4096),
        "rms_norm_eps": settings.get("rms_norm_eps", 1e-5),
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": float(theta)},
        "attention_dropout": 0.0,
        "bos_token_id": settings.get("bos_token_id", 1),
        "eos_token_id": settings.get("eos_token_id", 2),
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    text = MistralConfig(**common, sliding_window=None) if language == "mistral" else LlamaConfig(**common)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=settings["vocab_size"],
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,  # type: ignore[operator]
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
    )


def vision_config(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, TensorFacts], described: Path | None
) -> CLIPVisionConfig:
    """Reads the vision tower's sizes from its tensors, and its heads from CLIP's config.json (OpenAI's are 64 wide).

    Args:
        folder: the checkpoint, for messages.
        settings: its config.json.
        tensors: all tensors under transformers' names.
        described: folder with CLIP's config.json, if there is one.
    """
    tower = "model.vision_tower."
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
    first = "encoder.layers.0.mlp.fc1.weight"
    dimensions = dict.fromkeys((*needed, first), 2) | {needed[0]: 4}
    facts = {name: tensors.get(tower + name) for name in dimensions}
    if lacking := {name for name, one in facts.items() if one is None or len(one.shape) != dimensions[name]}:
        raise InputError(f"{folder}: the vision tower lacks {some(lacking)}; fetch the checkpoint again.")
    patches, positions = (tensors[tower + name].shape for name in needed)
    layers = {name.split(".")[4] for name in tensors if name.startswith(f"{tower}encoder.layers.")}
    width, patch = patches[0], patches[-1]
    side = round((positions[0] - 1) ** 0.5)
    name = str(settings.get("mm_vision_tower", ""))
    if described is None and "openai" not in name.lower():
        raise InputError(
            f"{folder / CONFIG}: the number of attention heads of mm_vision_tower = {name!r} is unknown; "
            "set model.mllm.vision_source to its hub id or folder."
        )
    own = read_json(described / CONFIG, "CLIP's settings") if described is not None else {}
    where = described / CONFIG if described is not None else folder
    with library_errors(where, "does not describe a CLIP", "fetch it again"):
        own = own.get("vision_config", own)
        return CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=tensors[tower + first].shape[0],
            num_hidden_layers=len(layers),
            num_attention_heads=own.get("num_attention_heads", max(1, width // 64)),
            image_size=side * patch,
            patch_size=patch,
            hidden_act=own.get("hidden_act", "quick_gelu"),
            layer_norm_eps=own.get("layer_norm_eps", 1e-5),
        )


def original_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Builds the tokenizer of an original checkpoint from tokenizer.model, or else from tokenizer.json."""
    model, described = folder / "tokenizer.model", folder / "tokenizer_config.json"
    settings = read_json(described, "a tokenizer's settings") if described.exists() else {}
    if not model.exists():
        if not (folder / "tokenizer.json").exists():
            raise InputError(f"{folder}: holds neither tokenizer.model nor tokenizer.json; fetch the checkpoint again.")
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        file = str(folder / "tokenizer.json")
        return as_legacy(read_tokenizer(folder, lambda: PreTrainedTokenizerFast(tokenizer_file=file, **special)))
    tokenizer = sentencepiece_tokenizer(model, legacy=settings.get("legacy") is not False)
    extra = folder / "added_tokens.json"
    named = read_json(extra, "added tokens and their ids") if extra.exists() else {}
    with library_errors(folder, "its added tokens are not texts with ids", "copy the tokenizer again"):
        added = {int(number): str(token) for token, number in named.items()}
        for number, token in settings.get("added_tokens_decoder", {}).items():
            added.setdefault(int(number), str(token["content"]))
    for number in sorted(number for number in added if number >= len(tokenizer)):
        if number != len(tokenizer):
            raise InputError(
                f"{folder}: added token {added[number]!r} has id {number}, which leaves a gap; fetch it again."
            )
        tokenizer.add_tokens([AddedToken(added[number], normalized=False, special=True)])
    return tokenizer
