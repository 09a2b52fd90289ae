"""MediSee: medical reasoning segmentation and detection, from an image and a query to text, mask and box.

Names are imported when they are first used, so that `import medisee` is instant and free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medisee.config import Config, load_config
    from medisee.evaluation.drawing import overlay
    from medisee.inference import Answer, ask, ask_all
    from medisee.models.medisee import MediSee
    from medisee.records.images import read_image
    from medisee.records.manifest import Manifest
    from medisee.records.records import QA, Prediction, Record, Target

    __version__: str

__all__ = [
    "QA",
    "Answer",
    "Config",
    "Manifest",
    "MediSee",
    "Prediction",
    "Record",
    "Target",
    "__version__",
    "ask",
    "ask_all",
    "load_config",
    "overlay",
    "read_image",
]

_MODULES = {
    "QA": "records.records",
    "Answer": "inference",
    "Config": "config",
    "Manifest": "records.manifest",
    "MediSee": "models.medisee",
    "Prediction": "records.records",
    "Record": "records.records",
    "Target": "records.records",
    "ask": "inference",
    "ask_all": "inference",
    "load_config": "config",
    "overlay": "evaluation.drawing",
    "read_image": "records.images",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module 'medisee' has no attribute {name!r}")
    value = getattr(import_module(f"medisee.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("medisee")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
