"""Two hundred damaged states: each is found to be damaged and the one before is used, or it still says what it said."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from medisee.models.medisee import MediSee
from medisee.training.resume import FILES, OPTIMIZER, PROGRESS, find_last, read_state
from medisee.weights.checkpoints import load_checkpoint

MUTATIONS = 200
VALUES: tuple[Any, ...] = (None, True, -1, 0, 2, 0.5, 1e400, "x", "", [], {}, [[]], {"a": 1})


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A run's folder with the states of steps 1 and 2; the older one is a copy of the newer."""
    for step in (1, 2):
        shutil.copytree(tiny_checkpoint.parent / "last-00000002", tmp_path / f"last-0000000{step}")
    older = tmp_path / "last-00000001"
    write_fitting(older, {**json.loads((older / PROGRESS).read_text()), "step": 1})
    return tmp_path


def write_fitting(folder: Path, progress: Any) -> None:
    """Writes progress.json and its size and SHA-256 into files.json."""
    content = json.dumps(progress).encode()
    (folder / PROGRESS).write_bytes(content)
    files = json.loads((folder / FILES).read_text())
    files[PROGRESS] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / FILES).write_text(json.dumps(files))


def mutate_bytes(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    start, length = rng.randrange(len(content)), rng.randrange(1, 64)
    how = rng.choice(("flip", "cut", "zeros", "twice", "gone", "folder"))
    if how == "flip":
        content[start] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[start:]
    elif how == "zeros":
        content[start : start + length] = bytes(length)
    elif how == "twice":
        content[start:start] = content[start : start + length]
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(content)


def mutate_value(rng: random.Random, value: Any) -> Any:
    """Drops or replaces a value somewhere in a JSON value."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.3:
        return rng.choice(VALUES)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    if rng.random() < 0.3:
        del copy[key]
    else:
        copy[key] = mutate_value(rng, copy[key])
    return copy


def test_two_hundred_mutated_states(run: Path) -> None:
    rng = random.Random(0)
    newer, older = run / "last-00000002", run / "last-00000001"
    whole, sound = shutil.copytree(newer, run / "whole"), read_state(newer)
    names = sorted(path.name for path in whole.iterdir())
    outcomes = {"older": 0, "as it was": 0, "other values": 0}
    for number in range(MUTATIONS):
        fits = number % 4 == 0
        if fits:
            write_fitting(newer, mutate_value(rng, json.loads((newer / PROGRESS).read_text())))
        elif number % 4 == 1:
            (newer / FILES).write_text(json.dumps(mutate_value(rng, json.loads((newer / FILES).read_text()))))
        else:
            mutate_bytes(rng, newer / rng.choice(names))
        found = find_last(run)
        if found.folder == older:
            outcomes["older"] += 1
        else:
            assert fits or found == sound
            outcomes["as it was" if found == sound else "other values"] += 1
            assert found.progress.step == 2 and -1 <= found.progress.best <= 1 and found.progress.skipped >= 0
            load_checkpoint(newer, MediSee)
            with safe_open(str(newer / OPTIMIZER), framework="pt") as file:
                assert file.keys()
        shutil.rmtree(newer)
        shutil.copytree(whole, newer)
    assert outcomes["older"] > MUTATIONS // 2, outcomes
