"""What this installation is and can do, as `medisee info` prints it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from medisee.config.model import SegHeadConfig
from medisee.records.images import FORMATS

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "segment-anything", "bitsandbytes")


def facts(commands: Sequence[str]) -> dict[str, Any]:
    """Returns versions, devices and capabilities in plain JSON types; imports torch only if there may be a GPU."""
    return {
        "medisee": _version("medisee"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "seg_heads": list(get_args(SegHeadConfig.model_fields["kind"].annotation)),
        "modalities": ["any: each record names its own, such as ct or mri_t1"],
        "language_models": ["built from sizes", "transformers Llava", "original LLaVA or LLaVA-Med", "GGUF file"],
        "reads": {
            "images": list(FORMATS),
            "masks": [*FORMATS, "COCO RLE", "COCO polygons"],
            "records": ["JSON Lines manifest", "SA-Med2D-20M", "MLMR-SD as JSON or Parquet"],
            "weights": ["checkpoint folder or hub id", "safetensors", ".pth", ".bin", "GGUF"],
        },
        "writes": {
            "answers": ["mask.png", "overlay.png", "prediction.json"],
            "evaluation": ["predictions.jsonl", "scores.csv", "summary.json", "table.md", "table.tex", "gallery.html"],
            "weights": ["checkpoint folder (safetensors)", "transformers SamModel"],
        },
        "commands": list(commands),
    }


def to_text(found: dict[str, Any]) -> str:
    """Returns the facts for people, one a line."""
    lines = [f"medisee {found['medisee']}, Python {found['python']}, {found['system']}", "packages"]
    lines += [f"  {name:<18}{number or 'not installed'}" for name, number in found["packages"].items()]
    lines += ["devices", *(f"  {one['device']:<18}{one['name']}" for one in found["devices"])]
    for title in ("seg_heads", "modalities", "language_models", "commands"):
        lines.append(f"{title.replace('_', ' ')}: {', '.join(found[title])}")
    for title in ("reads", "writes"):
        lines += [title, *(f"  {kind:<18}{', '.join(names)}" for kind, names in found[title].items())]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices = [{"device": "cpu", "name": f"{platform.machine()}, {os.cpu_count()} cores"}]
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    if shutil.which("nvidia-smi") or any(Path(path).exists() for path in drivers):
        import torch

        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            devices.append({"device": f"cuda:{index}", "name": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"})
    return devices
