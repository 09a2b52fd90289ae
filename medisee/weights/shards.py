"""Tensors of a checkpoint on disk: read shard by shard without running any code, written one tensor at a time.

A 7B model is as large as a laptop's memory, so nothing here holds more than one shard.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from medisee.foundation.errors import InputError, first_line
from medisee.foundation.files import write_json
from medisee.foundation.json_files import read_json
from medisee.weights.hub import foreign_content

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (SAFETENSORS_INDEX, SAFETENSORS, "pytorch_model.bin.index.json", "pytorch_model.bin")
"""Where weights may be, safetensors first."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FILE_NAME = re.compile(r"[^/\\\0]{1,255}")
_REFUSED = re.compile(r"GLOBAL (\S+)")  # what torch names when a pickle wants to call something


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Shape and type of a tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


@dataclass(frozen=True, slots=True)
class Shard:
    """An open file of tensors: shape and type of each, and a function that reads one."""

    path: Path
    tensors: Mapping[str, TensorFacts]
    read: Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A file to convert: for each new name, shape and type of the tensor to write, and its old name."""

    path: Path
    tensors: dict[str, TensorFacts]
    old_names: dict[str, str]


def shard_paths(folder: Path) -> list[Path]:
    """Lists the weight files of a checkpoint: those that its index names, or the only one."""
    first = _first(folder)
    if first is None:
        raise InputError(f"{folder}: holds no weights; expected one of {', '.join(WEIGHT_FILES)}; fetch it again.")
    if first.suffix != ".json":
        return [first]
    files = sorted(set(weight_map(folder).values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise InputError(f"{first}: names {some(missing)}, which is not there; fetch the checkpoint again.")
    return [folder / file for file in files]


def weight_map(folder: Path) -> dict[str, str]:
    """Returns which file holds each tensor according to the index; empty for a single file."""
    path = _first(folder)
    if path is None or path.suffix != ".json":
        return {}
    content = read_json(path, "an index of weight files").get("weight_map")
    # A path to another folder has no business in an index.
    if not isinstance(content, dict) or not all(
        isinstance(file, str) and _FILE_NAME.fullmatch(file) and file.strip(".") for file in content.values()
    ):
        raise InputError(f"{path}: has no weight_map from tensors to files beside it; fetch it again.")
    return content


def _first(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)


@contextmanager
def open_shard(path: Path) -> Iterator[Shard]:
    """Opens a .safetensors or .bin file, whose tensors are read on demand and stay mapped until it is closed."""
    if path.suffix != ".safetensors":
        tensors = read_pickled(path)
        if not isinstance(tensors, dict) or not is_state(tensors):
            raise InputError(f"{path}: expected names and tensors, found {type(tensors).__name__}; fetch it again.")
        facts = facts_of(tensors)
        _check_types(path, {name: one.dtype for name, one in facts.items()}, _CODES)
        yield Shard(path, facts, tensors.__getitem__)
        return
    try:
        handle = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; copy the whole folder.") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {_reason(path, error, 'a safetensors file')}; fetch it again.") from error
    with handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (it is not a mapping)
        types = {name: piece.get_dtype() for name, piece in slices.items()}
        _check_types(path, types, _DTYPES)
        facts = {name: TensorFacts(tuple(piece.get_shape()), _DTYPES[types[name]]) for name, piece in slices.items()}
        yield Shard(path, facts, handle.get_tensor)


def read_pickled(path: Path) -> Any:
    """Reads a torch file, .bin or .pth: data only, never code."""
    try:
        # Only zip archives can be mapped; files of torch before 1.6 are not.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types for truncated, foreign and code-carrying files
        if refused := _REFUSED.search(str(error)):
            raise InputError(
                f"{path}: reading it needs {refused[1]}, which could run code; none of it was executed. Save the tensors "
                "alone, with torch.save(model.state_dict(), ...), or fetch another copy."
            ) from error
        raise InputError(f"{path}: {_reason(path, error, 'a file of tensors')}; fetch it again.") from error


def _check_types(path: Path, types: Mapping[str, Any], known: Mapping[Any, Any]) -> None:
    if odd := [f"{name} ({kind})" for name, kind in types.items() if kind not in known]:
        raise InputError(f"{path}: holds {some(odd)}; give weights in 16, 32 or 64 bits, without quantization.")


def is_state(content: Mapping[Any, Any]) -> bool:
    """Tells whether all of a mapping's values are ordinary tensors with names."""
    return all(
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        for name, value in content.items()
    )


def facts_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorFacts]:
    """Returns shape and type of each tensor."""
    return {name: TensorFacts(tuple(value.shape), value.dtype) for name, value in tensors.items()}


def misfits(own: Mapping[str, TensorFacts], found: Mapping[str, TensorFacts], where: Path | str, fix: str) -> list[str]:
    """Compares the tensors of a file with those of the model: names, shapes, and types that can be its weights."""
    both = [(name, facts, found[name]) for name, facts in own.items() if name in found]
    return [
        *(f"{where}: missing tensor {name}; {fix}" for name in own if name not in found),
        *(f"{where}: left-over tensor {name}; {fix}" for name in found if name not in own),
        *(
            f"{where}: {name} has shape {theirs.shape}, expected {ours.shape}; {fix}"
            for name, ours, theirs in both
            if theirs.shape != ours.shape
        ),
        *(
            f"{where}: {name} holds {str(theirs.dtype).removeprefix('torch.')} numbers, which cannot be weights; fetch "
            "it again, without quantization."
            for name, ours, theirs in both
            if ours.dtype.is_floating_point and theirs.dtype not in WEIGHT_TYPES
        ),
    ]


def not_finite(tensors: Iterable[tuple[str, Tensor]], where: Path | str) -> list[str]:
    """Names the tensors that hold NaN or infinite numbers, with which a model would only seem to answer."""
    # The extremes of a tensor with NaN are NaN. They need no memory, unlike a flag for each number.
    odd = [
        name
        for name, value in tensors
        if value.is_floating_point() and value.numel() and not torch.stack(value.aminmax()).isfinite().all()
    ]
    return [f"{where}: {some(odd)} holds NaN or infinite numbers; use another copy or an earlier state."] if odd else []


def _reason(path: Path, error: Exception, expected: str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    # What torch says of a pickle is advice to run its code.
    more = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
    return foreign_content(path) or f"truncated or not {expected}{more}"


def shards_digest(folder: Path) -> str | None:
    """Returns the SHA-256 of config.json and of each weight file's name, size and safetensors header.

    It is fast and tells models and their versions apart, but does not notice other values in the same places.
    None where a file is missing.
    """
    digest = hashlib.sha256()
    try:
        digest.update((folder / CONFIG).read_bytes())
        for path in shard_paths(folder):
            digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
            if path.suffix == ".safetensors":
                with path.open("rb") as handle:
                    # A broken file may state any length; no header is longer than this.
                    length = min(int.from_bytes(handle.read(8), "little"), 100_000_000)
                    digest.update(handle.read(length))
    except (OSError, InputError):
        return None
    return digest.hexdigest()


def check_shards(folder: Path) -> dict[str, TensorFacts]:
    """Opens every file of a checkpoint, compares it with the index, and returns shape and type of all tensors.

    No tensor is read.
    """
    plans, problems = plan_shards(
        folder, lambda s: ShardPlan(s.path, dict(s.tensors), {name: name for name in s.tensors})
    )
    if problems:
        raise InputError(problems)
    return {name: facts for plan in plans for name, facts in plan.tensors.items()}


def check_finite(folder: Path) -> None:
    """Reads every tensor of a checkpoint and refuses NaN and infinite numbers: a pass over the files, 7B in seconds."""
    for path in shard_paths(folder):
        with open_shard(path) as shard:
            _check_finite(shard)


def _check_finite(shard: Shard) -> None:
    if problems := not_finite(((name, shard.read(name)) for name in shard.tensors), shard.path):
        raise InputError(problems)


def plan_shards(folder: Path, plan: Callable[[Shard], ShardPlan]) -> tuple[list[ShardPlan], list[str]]:
    """Plans the conversion of a checkpoint from its headers; returns the plans of its files and every problem found.

    `plan` plans one file; the problems of an InputError that it raises are collected.
    """
    places = weight_map(folder)
    plans: list[ShardPlan] = []
    problems: list[str] = []
    seen: set[str] = set()
    for path in shard_paths(folder):
        try:
            with open_shard(path) as shard:
                problems += _index_problems(shard, places)
                found = plan(shard)
        except InputError as error:
            problems += error.problems
            continue
        if twice := {found.old_names[name] for name in found.tensors if name in seen}:
            problems.append(f"{path}: holds {some(twice)}, which another file holds too; fetch it again.")
        seen |= found.tensors.keys()
        plans.append(found)
    return plans, problems


def _index_problems(shard: Shard, places: Mapping[str, str]) -> list[str]:
    if not places:
        return []
    named = {name for name, file in places.items() if file == shard.path.name}
    problems = []
    if absent := named - set(shard.tensors):
        problems.append(f"{shard.path}: lacks {some(absent)}, which the index places in it; fetch it again.")
    if extra := set(shard.tensors) - named:
        problems.append(f"{shard.path}: holds {some(extra)}, which the index does not place in it; fetch it again.")
    return problems


def write_shards(plans: Sequence[ShardPlan], folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Writes planned files as model.safetensors, or as several files with an index; a file without tensors is left out.

    `change` returns the values to write, given a tensor's new name and its values in the old file.
    """
    plans = [one for one in plans if one.tensors]
    places: dict[str, str] = {}
    for number, one in enumerate(tqdm(plans, desc="converting", unit="file"), start=1):
        name = SAFETENSORS if len(plans) == 1 else f"model-{number:05d}-of-{len(plans):05d}.safetensors"
        _convert_shard(one, folder / name, change)
        places |= dict.fromkeys(one.tensors, name)
    if len(plans) > 1:
        size = sum(facts.bytes for one in plans for facts in one.tensors.values())
        write_json(folder / SAFETENSORS_INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _convert_shard(plan: ShardPlan, path: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    with open_shard(plan.path) as shard:
        _check_finite(shard)
        write_shard(path, plan.tensors, lambda name: change(name, shard.read(plan.old_names[name])))


def write_shard(path: Path, tensors: Mapping[str, TensorFacts], read: Callable[[str], Tensor]) -> None:
    """Writes a new .safetensors file, holding one tensor at a time; `read` returns a tensor by its name.

    Older versions of the safetensors package build the whole file in memory, and all refuse tensors that share memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest types first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        facts, start = tensors[name], end
        end += facts.bytes
        header[name] = {"dtype": _CODES[facts.dtype], "shape": list(facts.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            handle.write(read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def some(names: Iterable[str]) -> str:
    """Lists the first four names in order and counts the others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(ordered[:4]) + more
