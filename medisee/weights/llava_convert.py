"""Original LLaVA(-Med) checkpoints -> folders of transformers' Llava, converted once, shard by shard, and kept.

All names, shapes and types are compared with the model before a byte is written, memory holds one shard at a time, and
the converted folder appears only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from transformers import LlavaConfig, LlavaForConditionalGeneration

from medisee.config.model import Mllm
from medisee.foundation.errors import InputError, library_errors, shortened
from medisee.foundation.files import atomic_path
from medisee.foundation.json_files import read_json
from medisee.weights.hub import fetch
from medisee.weights.llava_format import (
    CLIP_DROPPED,
    CLIP_NAMES,
    LLAVA_DROPPED,
    LLAVA_NAMES,
    llava_config,
    named_back,
    original_tokenizer,
    renamed,
    vision_config,
)
from medisee.weights.shards import (
    CONFIG,
    Shard,
    ShardPlan,
    TensorFacts,
    facts_of,
    misfits,
    open_shard,
    plan_shards,
    shard_paths,
    some,
    weight_map,
    write_shards,
)

FORMAT = 1
PADDED_ROWS = 64
"""Embeddings are padded to a multiple of this at most; more rows belong to another tokenizer."""

_EMBEDDING = "model.language_model.embed_tokens.weight"


def converted(folder: Path, config: Mllm) -> Path:
    """Returns the transformers-format folder of an original checkpoint, which is converted first if need be.

    Its name depends on sizes and times of the weights and on the content of all other files, so that it is never taken
    for another checkpoint's.
    """
    settings = read_json(folder / CONFIG, "a LLaVA's settings")
    names = weight_map(folder)
    if not names:
        with open_shard(shard_paths(folder)[0]) as shard:
            names = dict.fromkeys(shard.tensors, "")
    vision = None
    if not any(name.startswith("model.vision_tower.") for name in names):
        vision = config.vision_source or settings.get("mm_vision_tower")
        if not vision:
            raise InputError(
                f"{folder / CONFIG}: the checkpoint has no vision tower and names none; "
                "set model.mllm.vision_source to a CLIP model, such as openai/clip-vit-large-patch14-336."
            )
    name = f"{Path(config.source or folder).name}-{_fingerprint(folder, vision, config.vision_source)}"
    return convert_once(name, config, lambda target: _convert(folder, vision, config, settings=settings, target=target))


def convert_once(name: str, config: Mllm, convert: Callable[[Path], None]) -> Path:
    """Returns the folder of this name among the converted checkpoints, which `convert` writes if it is not there yet.

    One process converts while others that were started with it wait.
    """
    home = Path(config.converted) if config.converted else Path(HF_HOME) / "medisee"
    target, lock = home / name, home / f".{name}.lock"
    if target.is_dir():
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            for left in home.glob(f".{name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            try:
                if not target.is_dir():
                    convert(target)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror or error}); set model.mllm.converted to another folder."
        ) from error
    return target


def _fingerprint(folder: Path, vision: str | None, vision_source: str | None) -> str:
    described = [Path(name) for name in (vision or vision_source,) if name and Path(name).is_dir()]
    weights = [path for place in (folder, *(described if vision else ())) for path in shard_paths(place)]
    texts = [path for place in (folder, *described) for path in sorted(place.iterdir())]
    texts = [path for path in texts if path.suffix == ".json" or path.name == "tokenizer.model"]
    facts = {
        "format": FORMAT,
        "vision": vision or vision_source,
        "texts": [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in texts],
        "weights": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _convert(folder: Path, vision: str | None, config: Mllm, *, settings: dict[str, Any], target: Path) -> None:
    plans, problems = plan_shards(folder, lambda shard: _plan(shard, LLAVA_NAMES, LLAVA_DROPPED))
    described = None
    if vision is not None:
        described = _vision_folder(vision, weights=True)
        more, found = plan_shards(described, lambda shard: _plan(shard, CLIP_NAMES, CLIP_DROPPED))
        plans, problems = plans + more, problems + found
    if problems:
        raise InputError(problems)
    if config.vision_source and vision is None:
        described = _vision_folder(config.vision_source, weights=False)
    tensors = {name: facts for one in plans for name, facts in one.tensors.items()}
    llava = llava_config(folder / CONFIG, settings, vision_config(folder, settings, tensors, described))
    tokenizer = original_tokenizer(folder)
    problems = _differences(folder, plans, llava)
    if _EMBEDDING in tensors:
        rows = tensors[_EMBEDDING].shape[0]
        problems += vocabulary_problems(folder, rows=rows, stated=settings["vocab_size"], tokens=len(tokenizer))
    if problems:
        raise InputError(problems)
    size, free = sum(facts.bytes for facts in tensors.values()), shutil.disk_usage(target.parent).free
    if free < size:
        raise InputError(
            f"{target.parent}: the converted {folder.name} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "make room, or set model.mllm.converted to another folder."
        )
    llava.dtype = tensors[_EMBEDDING].dtype
    with atomic_path(target) as temporary:
        temporary.mkdir()
        write_shards(plans, temporary, lambda _, values: values)
        tokenizer.save_pretrained(temporary)
        llava.save_pretrained(temporary)


def _vision_folder(name: str, *, weights: bool) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return fetch(name, weights=weights)
    except InputError as error:
        raise InputError(
            f"{name}: the checkpoint needs this vision tower ({error.problems[0].split(': ', 1)[-1].rstrip('.')}); "
            "run python scripts/download_weights.py clip and set model.mllm.vision_source to the folder."
        ) from error


def _plan(shard: Shard, names: Iterable[tuple[str, str]], dropped: re.Pattern[str]) -> ShardPlan:
    new_names = {old: renamed(old, names) for old in shard.tensors if not dropped.fullmatch(old)}
    old_names = {new: old for old, new in new_names.items() if new is not None}
    if unknown := [old for old, new in new_names.items() if new is None]:
        raise InputError(f"{shard.path}: holds {some(unknown)}, which this format does not have; fetch it again.")
    tensors = {new: shard.tensors[old] for new, old in old_names.items()}
    return ShardPlan(shard.path, tensors, old_names)


def _differences(folder: Path, plans: Iterable[ShardPlan], llava: LlavaConfig) -> list[str]:
    found = {name: facts for one in plans for name, facts in one.tensors.items()}
    old = {new: name for one in plans for new, name in one.old_names.items()}
    model = described_model(lambda: LlavaForConditionalGeneration(llava), llava, [*found.values()], folder / CONFIG)
    own, found = (
        {old.get(name, named_back(name, LLAVA_NAMES)): facts for name, facts in one.items()}
        for one in (facts_of(model.state_dict()), found)
    )
    return shortened(misfits(own, found, folder, "fetch it and its config.json again"), str(folder))


def described_model(build: Callable[[], Any], config: Any, held: Sequence[TensorFacts], where: Path) -> Any:
    """Builds the model that `config`, read from `where`, describes, without memory for its weights.

    Refuses one that cannot be built, or is so large that it cannot be the one whose tensors are `held`: a wrong number
    in a config.json must not take all memory.
    """
    with library_errors(where, "does not describe the model of these weights", "fetch both again"):
        parts = (getattr(config, "text_config", config), getattr(config, "vision_config", None))
        layers = sum(part.num_hidden_layers for part in parts if part is not None)
        count = sum(torch.Size(one.shape).numel() for one in held)
        if layers > len(held):
            raise ValueError(f"{layers:,} layers, but the files hold {len(held):,} tensors")
        with torch.device("meta"):
            model = build()
        described = sum(value.numel() for value in model.parameters())
        if described > 2 * count:
            raise ValueError(f"{described:,} weights, but the files hold {count:,}")
    return model


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
