"""A small demo data set, made once for all tests of this folder."""

from pathlib import Path

import pytest

from medisee.sources.brain import Brain, load_brain, source_files
from medisee.sources.demo import prepare_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slices for each plane and split, with one augmented copy of each training slice."""
    out = tmp_path_factory.mktemp("demo") / "set"
    prepare_demo(out, copies=1, limit=3)
    return out


@pytest.fixture(scope="session")
def brain() -> Brain:
    """The brain that the demo data set is cut from."""
    return load_brain(*source_files())
