"""Published language models: found, checked, converted if need be, and loaded completely or not at all.

transformers fills what a checkpoint lacks with random weights and only logs it; here that is an error.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_max_memory
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from medisee.config.model import Mllm
from medisee.foundation.errors import InputError, library_errors
from medisee.foundation.json_files import read_json
from medisee.weights.gguf import gguf_folder
from medisee.weights.hub import fetch, is_hub_id
from medisee.weights.llava_convert import converted, described_model, vocabulary_problems
from medisee.weights.llava_format import is_original, original_tokenizer
from medisee.weights.shards import CONFIG, WEIGHT_TYPES, check_finite, check_shards, shard_paths, some
from medisee.weights.tokenizer import as_legacy, read_tokenizer, token_count

_EXPECTED = "the settings of a LLaVA"
SKIPPED = ("lm_head", "model.multi_modal_projector", "model.vision_tower")
"""What stays in 16 or 32 bits beside a language model of 4 or 8; transformers compares the beginnings of names."""
DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A loaded Llava and the number of tokens that it was trained with; later rows of its embedding are padding."""

    llava: LlavaForConditionalGeneration
    vocabulary: int


def pretrained_tokenizer(config: Mllm) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of `config.source`: original, transformers' or a GGUF file's."""
    folder = _source_folder(config, weights=False)
    if is_original(read_json(folder / CONFIG, _EXPECTED)):
        return original_tokenizer(folder)
    llava_settings(folder)  # transformers reads it too, and would call its faults the tokenizer's
    return as_legacy(read_tokenizer(folder))


def load_pretrained(config: Mllm) -> Pretrained:
    """Loads the Llava of `config.source`; an original checkpoint or a GGUF file is converted first."""
    if config.bits is not None:
        _check_bits(config.bits)
    folder = _source_folder(config, weights=True)
    settings = read_json(folder / CONFIG, _EXPECTED)
    if is_original(settings):
        folder = converted(folder, config)
    described = llava_settings(folder)
    if others := [path.name for path in shard_paths(folder) if path.suffix != ".safetensors"]:
        raise InputError(
            f"{folder}: holds a transformers Llava as {some(others)}; expected .safetensors files, which run no code; "
            "fetch a revision that has them, or write them with transformers' save_pretrained."
        )
    held = check_shards(folder)
    # Older files hold a buffer of positions. Quantized ones hold whole numbers, which transformers unpacks.
    odd = [name for name, facts in held.items() if facts.dtype not in WEIGHT_TYPES and "position_ids" not in name]
    if odd and "quantization_config" not in settings:
        raise InputError(f"{folder}: {some(odd)} holds whole numbers, which cannot be weights; fetch it again.")
    described_model(lambda: LlavaForConditionalGeneration(described), described, [*held.values()], folder / CONFIG)
    check_finite(folder)
    llava = _load(folder, config)
    embedding: Any = llava.get_input_embeddings()
    tokens = token_count(read_tokenizer(folder))
    stated = llava.config.get_text_config().vocab_size
    if problems := vocabulary_problems(folder, rows=embedding.num_embeddings, stated=stated, tokens=tokens):
        raise InputError(problems)
    return Pretrained(llava, tokens)


def llava_settings(folder: Path) -> Any:
    """Reads the config.json of a transformers Llava; code that it names is never run."""
    path = folder / CONFIG
    if (kind := read_json(path, _EXPECTED).get("model_type")) != "llava":
        raise InputError(
            f"{path}: describes {kind!r}, which is not a Llava; give a transformers Llava or an original LLaVA(-Med) "
            "checkpoint."
        )
    with library_errors(path, "does not describe a transformers Llava", "fetch it again"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _load(folder: Path, config: Mllm) -> LlavaForConditionalGeneration:
    placing: dict[str, Any] = {}
    if config.bits is not None:
        placing = {"quantization_config": quantization_config(config), "device_map": {"": torch.cuda.current_device()}}
    if config.device_map is not None:
        placing = {"device_map": layer_devices(folder, config), "offload_folder": config.offload_folder}
    with library_errors(f"model.mllm.source = {config.source!r}", "cannot be loaded", "fetch it again"):
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            folder,
            dtype=DTYPES[config.dtype],
            trust_remote_code=False,
            attn_implementation=general_kernel(config),
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **placing,
        )
    llava, report = loaded
    problems = []
    if lacking := report["missing_keys"]:
        problems.append(f"{folder}: lacks {some(lacking)}; fetch the checkpoint again.")
    if extra := report["unexpected_keys"]:
        problems.append(f"{folder}: holds {some(extra)}, for which config.json has no place; fetch it again.")
    if wrong := [f"{name} of {tuple(own)} instead of {tuple(ours)}" for name, own, ours in report["mismatched_keys"]]:
        problems.append(f"{folder}: holds {some(wrong)} as in config.json; fetch both again.")
    problems += [f"{folder}: {message}; fetch it again." for message in report["error_msgs"]]
    if problems:
        raise InputError(problems)
    if placing:
        # accelerate has put every part where it belongs; moving the whole model must leave it there.
        llava._apply = lambda *_, **__: llava
    return llava


def general_kernel(config: Mllm) -> str:
    """Returns transformers' attention kernel for all parts; packing.py sets flex attention in the layers."""
    return "sdpa" if config.attention == "flex" else config.attention


def _source_folder(config: Mllm, *, weights: bool) -> Path:
    source = config.source or ""
    if config.is_gguf:
        return gguf_folder(config)
    folder = Path(source)
    if (folder / CONFIG).is_file():
        return folder
    if folder.is_dir():
        raise InputError(f"model.mllm.source = {source!r}: holds no {CONFIG}; give the folder of a Llava, or a hub id.")
    if not is_hub_id(source):
        raise InputError(f"model.mllm.source = {source!r}: neither a folder nor a hub id; give one of them.")
    try:
        return fetch(source, config.revision, weights=weights)
    except InputError as error:
        raise InputError(f"model.mllm.source = {error.problems[0]}") from error


def _check_bits(bits: int) -> None:
    problems = []
    if not torch.cuda.is_available():
        problems.append(f"model.mllm.bits = {bits}: needs an NVIDIA GPU, and torch sees none; set it to null.")
    if importlib.util.find_spec("bitsandbytes") is None:
        problems.append(f"model.mllm.bits = {bits}: run pip install bitsandbytes, or set it to null.")
    if problems:
        raise InputError(problems)


def quantization_config(config: Mllm) -> BitsAndBytesConfig:
    """Returns how the language model's linear layers are held in 4 bits (NF4, as in QLoRA) or 8 (LLM.int8())."""
    return BitsAndBytesConfig(
        load_in_4bit=config.bits == 4,
        load_in_8bit=config.bits == 8,
        llm_int8_skip_modules=list(SKIPPED),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.dtype == "auto" else DTYPES[config.dtype],
    )


def layer_devices(folder: Path, config: Mllm) -> dict[str, int | str]:
    """Spreads the language model's layers over the devices; all else goes to the first one.

    So what learns, and what the seg head and the routers read, stays on their device.
    """
    settings = llava_settings(folder)
    assumed = {"auto": settings.dtype or torch.float32}.get(config.dtype, DTYPES[config.dtype])
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(settings)
    memory = _memory(config)
    first = next(iter(memory))
    language: Any = llava.model.language_model
    layers = language.layers
    inside = {id(parameter) for parameter in layers.parameters()}
    # The embedding and the output layer learn in float32.
    memory[first] -= sum(4 * value.numel() for value in llava.parameters() if id(value) not in inside)
    if memory[first] < 0:
        raise InputError(
            f"model.mllm.max_memory: device {first} is too small for the parts outside the language model's layers; "
            "raise it, or set model.mllm.bits to 4."
        )
    found = infer_auto_device_map(
        layers, max_memory=memory, no_split_module_classes=[type(layers[0]).__name__], dtype=assumed
    )
    if "disk" in found.values() and config.offload_folder is None:
        raise InputError(
            "model.mllm.device_map = 'auto': the layers do not fit into memory; set model.mllm.offload_folder to a "
            "folder with room for them, or model.mllm.bits to 4."
        )
    places: dict[str, Any] = {
        f"model.language_model.layers.{n}": found.get(str(n), found.get("")) for n in range(len(layers))
    }
    outside = (f"language_model.{name}" for name, _ in language.named_children() if name != "layers")
    rest = ("vision_tower", "multi_modal_projector", *outside)
    return {**{f"model.{part}": first for part in rest}, "lm_head": first, **places}


def _memory(config: Mllm) -> dict[Any, Any]:
    most: dict[Any, Any] = {
        int(key) if key.isdigit() else key: value for key, value in (config.max_memory or {}).items()
    }
    known = [*range(torch.cuda.device_count()), "cpu"]
    if unknown := [str(key) for key in most if key not in known]:
        raise InputError(
            f"model.mllm.max_memory: no device {some(unknown)} here; write one of {', '.join(map(str, known))}."
        )
    try:
        return get_max_memory(most or None)
    except ValueError as error:
        raise InputError(
            f"model.mllm.max_memory = {config.max_memory}: {error}; write a size such as 20GiB, or bytes."
        ) from error


def pinned_device(llava: LlavaForConditionalGeneration) -> torch.device | None:
    """Returns the input device of a language model that cannot be moved (4 or 8 bits, or spread over devices)."""
    return next(llava.get_input_embeddings().parameters()).device if "_apply" in vars(llava) else None
