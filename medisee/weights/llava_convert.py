"""Original LLaVA(-Med) checkpoints -> folders of transformers' Llava, converted once, shard by shard, and kept.

All names, shapes and types are compared with the model before a byte is written, memory holds one shard at a time, and
the converted folder appears only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from medisee.config.model import Mllm
from medisee.foundation.errors import InputError
from medisee.foundation.files import atomic_path, write_json
from medisee.weights.hub import fetch
from medisee.weights.llava_format import (
    CLIP_DROPPED,
    CLIP_NAMES,
    CONFIG,
    LLAVA_DROPPED,
    LLAVA_NAMES,
    Source,
    llava_config,
    original_tokenizer,
    vision_config,
)
from medisee.weights.shards import (
    SAFETENSORS_INDEX,
    Shard,
    TensorFacts,
    index_problems,
    open_shard,
    read_json,
    shard_paths,
    some,
    weight_map,
    write_shard,
)

FORMAT = 1
PADDED_ROWS = 64
"""Embeddings are padded to a multiple of this at most; more rows than that belong to another tokenizer."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_EMBEDDING = "model.language_model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Planned:
    """A shard to convert: its tensors by their new names."""

    path: Path
    tensors: dict[str, TensorFacts]
    old_names: dict[str, str]


def converted(folder: Path, config: Mllm) -> Path:
    """Returns the transformers-format folder of an original checkpoint, which is written when it is not there yet.

    It is kept under the sizes and times of the weights and the content of all other files, so that another checkpoint
    never takes its place.

    Args:
        folder: an original checkpoint.
        config: `source` names the result; `vision_source` and `converted` as described there.

    Raises:
        InputError: all that is missing, left over, misshapen or unreadable; no vision tower; no room.
    """
    settings = read_json(folder / CONFIG)
    vision = None if _has_vision(folder) else _vision_name(folder, settings, config)
    name = f"{Path(config.source or folder).name}-{_fingerprint(folder, vision, config.vision_source)}"

    def convert(target: Path) -> None:
        _convert(folder, vision, config, settings=settings, target=target)

    return convert_once(name, config, convert)


def convert_once(name: str, config: Mllm, convert: Callable[[Path], None]) -> Path:
    """Returns the folder of this name among the converted checkpoints, which `convert` writes if it is not there yet.

    One process converts while others that were started with it wait.

    Raises:
        InputError: the folder cannot be written.
    """
    home = Path(config.converted) if config.converted else Path(HF_HOME) / "medisee"
    target = home / name
    if target.is_dir():
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{name}.lock"):
            for left in home.glob(f".{name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            if not target.is_dir():
                convert(target)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror or error}); set model.mllm.converted to another folder."
        ) from error
    return target


def _has_vision(folder: Path) -> bool:
    names = weight_map(folder)
    if not names:
        with open_shard(shard_paths(folder)[0]) as shard:
            names = dict.fromkeys(shard.tensors, "")
    return any(name.startswith("model.vision_tower.") for name in names)


def _vision_name(folder: Path, settings: Mapping[str, Any], config: Mllm) -> str:
    name = config.vision_source or settings.get("mm_vision_tower")
    if not name:
        raise InputError(
            f"{folder / CONFIG}: the checkpoint has no vision tower and names none; "
            "set model.mllm.vision_source to a CLIP model, such as openai/clip-vit-large-patch14-336."
        )
    return str(name)


def _fingerprint(folder: Path, vision: str | None, vision_source: str | None) -> str:
    described = [Path(name) for name in (vision or vision_source,) if name and Path(name).is_dir()]
    texts = [path for place in (folder, *described) for path in sorted(place.iterdir()) if _is_text(path)]
    weights = [path for place in (folder, *(described if vision else ())) for path in shard_paths(place)]
    facts = {
        "format": FORMAT,
        "vision": vision or vision_source,
        "texts": [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in texts],
        "weights": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _is_text(path: Path) -> bool:
    return path.suffix == ".json" or path.name == "tokenizer.model"


def _convert(folder: Path, vision: str | None, config: Mllm, *, settings: dict[str, Any], target: Path) -> None:
    sources = [Source(folder, LLAVA_NAMES, LLAVA_DROPPED)]
    if vision is not None:
        sources.append(Source(_vision_folder(vision, weights=True), CLIP_NAMES, CLIP_DROPPED))
    planned, problems = _plan(sources)
    if problems:
        raise InputError(problems)
    tensors = {name: facts for one in planned for name, facts in one.tensors.items()}
    described = sources[-1].folder if vision else None
    if config.vision_source and not vision:
        described = _vision_folder(config.vision_source, weights=False)
    llava = llava_config(folder / CONFIG, settings, vision_config(folder, settings, tensors, described))
    tokenizer = original_tokenizer(folder)
    problems = _differences(sources[0], planned, llava)
    if _EMBEDDING in tensors:
        rows = tensors[_EMBEDDING].shape[0]
        problems += vocabulary_problems(folder, rows=rows, stated=settings["vocab_size"], tokens=len(tokenizer))
    if problems:
        raise InputError(problems)
    llava.dtype = tensors[_EMBEDDING].dtype
    _check_room(target.parent, sum(facts.bytes for facts in tensors.values()), folder)
    _write(planned, target, llava, tokenizer)


def _check_room(home: Path, size: int, folder: Path) -> None:
    free = shutil.disk_usage(home).free
    if free < size:
        raise InputError(
            f"{home}: {folder} takes {size / 1e9:.1f} GB when converted, and {free / 1e9:.1f} GB are free; "
            "make room, or set model.mllm.converted to another folder."
        )


def _vision_folder(name: str, *, weights: bool) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return fetch(name, weights=weights)
    except InputError as error:
        raise InputError(
            f"{name}: the checkpoint needs this vision tower ({error.problems[0].split(': ', 1)[-1].rstrip('.')}); "
            f"run python scripts/download_weights.py clip and set model.mllm.vision_source to the folder."
        ) from error


def _plan(sources: list[Source]) -> tuple[list[Planned], list[str]]:
    planned: list[Planned] = []
    problems: list[str] = []
    seen: set[str] = set()
    for source in sources:
        places = weight_map(source.folder)
        for path in shard_paths(source.folder):
            try:
                with open_shard(path) as shard:
                    problems += index_problems(shard, places)
                    facts = dict(shard.tensors)
            except InputError as error:
                problems += error.problems
                continue
            kept = {name: source.renamed(name) for name in facts if not source.dropped.fullmatch(name)}
            if unknown := {name for name, new in kept.items() if new is None}:
                problems.append(f"{path}: holds {some(unknown)}, which this format does not have; fetch it again.")
            old_names = {new: name for name, new in kept.items() if new is not None}
            odd = {f"{name} ({facts[name].dtype})" for name in old_names.values() if facts[name].dtype not in _FLOATS}
            if odd:
                problems.append(f"{path}: holds {some(odd)}; give the checkpoint without quantization.")
            if twice := seen & set(old_names):
                problems.append(f"{path}: holds {some(twice)} once more; fetch it again.")
            seen |= set(old_names)
            planned.append(Planned(path, {new: facts[old] for new, old in old_names.items()}, old_names))
    return planned, problems


def _differences(source: Source, planned: list[Planned], llava: LlavaConfig) -> list[str]:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = []
    for one in planned:
        if extra := {one.old_names[name] for name in one.tensors if name not in expected}:
            problems.append(f"{one.path}: holds {some(extra)}, for which config.json has no place; fetch it again.")
        wrong = [
            f"{one.old_names[name]} of {facts.shape} instead of {expected[name]}"
            for name, facts in one.tensors.items()
            if name in expected and facts.shape != expected[name]
        ]
        if wrong:
            problems.append(f"{one.path}: holds {some(wrong)}, which config.json asks for; fetch both again.")
    found = {name for one in planned for name in one.tensors}
    if lacking := {source.original(name) for name in expected if name not in found}:
        problems.append(f"{source.folder}: lacks {some(lacking)}; fetch the checkpoint again.")
    return problems


def vocabulary_problems(where: Path, *, rows: int, stated: int, tokens: int) -> list[str]:
    """Compares the rows of the embedding with what config.json states and with the tokenizer's length."""
    problems = []
    if rows != stated:
        problems.append(
            f"{where / CONFIG}: vocab_size is {stated}, but the embedding has {rows} rows; fetch both again."
        )
    if tokens > rows or rows - tokens > PADDED_ROWS:
        problems.append(
            f"{where}: the tokenizer has {tokens} tokens, but the embedding has {rows} rows; copy the tokenizer that "
            "belongs to the checkpoint."
        )
    return problems


def _write(planned: list[Planned], target: Path, llava: LlavaConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    full = [one for one in planned if one.tensors]
    with atomic_path(target) as temporary:
        temporary.mkdir()
        places: dict[str, str] = {}
        for number, one in enumerate(tqdm(full, desc="converting", unit="shard"), start=1):
            name = f"model-{number:05d}-of-{len(full):05d}.safetensors"
            with open_shard(one.path) as shard:
                write_shard(temporary / name, one.tensors, _reader(shard, one))
            places |= dict.fromkeys(one.tensors, name)
        size = sum(facts.bytes for one in full for facts in one.tensors.values())
        write_json(temporary / SAFETENSORS_INDEX, {"metadata": {"total_size": size}, "weight_map": places})
        tokenizer.save_pretrained(temporary)
        llava.save_pretrained(temporary)


def _reader(shard: Shard, planned: Planned) -> Callable[[str], Tensor]:
    return lambda name: shard.read(planned.old_names[name])
