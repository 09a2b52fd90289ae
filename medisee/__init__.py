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
    "config": ("Config", "load_config"),
    "evaluation.drawing": ("overlay",),
    "inference": ("Answer", "ask", "ask_all"),
    "models.medisee": ("MediSee",),
    "records.images": ("read_image",),
    "records.manifest": ("Manifest",),
    "records.records": ("QA", "Prediction", "Record", "Target"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("medisee")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"medisee.{module}"), name)
            return value
    raise AttributeError(f"module 'medisee' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
