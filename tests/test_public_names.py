"""`import medisee` offers every public name, at the cost of none."""

from __future__ import annotations

import subprocess
import sys

import pytest

import medisee


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_medisee_imports_nothing_heavy() -> None:
    heavy = "torch", "transformers", "numpy", "pydantic", "PIL", "importlib.metadata"
    assert run(f"import sys, medisee; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_light_names_come_without_torch() -> None:
    names = "Config, load_config, Manifest, Record, Target, QA, Prediction, read_image, overlay, __version__"
    assert run(f"import sys; from medisee import {names}; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("name", medisee.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(medisee, name)
    assert name in dir(medisee)


def test_names_are_those_of_their_modules() -> None:
    from medisee.inference import ask
    from medisee.models.medisee import MediSee

    assert medisee.ask is ask
    assert medisee.MediSee is MediSee


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MedSee'"):
        medisee.MedSee  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        exec("from medisee import MedSee")


def test_a_tree_that_is_not_installed_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert medisee.__version__ == "0+unknown"
