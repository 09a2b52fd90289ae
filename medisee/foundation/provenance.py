"""run.json: how a result was made - configuration, commit, versions, device, seed, time. No patient data, no keys.

Only the program's name is kept of the command line: names of folders and images can be patient data.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("medisee", "torch", "transformers", "peft", "deepspeed", "segment-anything", "numpy", "pycocotools")


def run_facts(settings: dict[str, Any], seed: int, device: torch.device | str) -> dict[str, Any]:
    """Returns the facts to write beside a result; `settings` is the resolved configuration."""
    device = torch.device(device)
    is_gpu = device.type == "cuda"
    return {
        "command": Path(sys.argv[0]).name,
        "settings": settings,
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
