"""The training benchmark at a tiny size: that all modes compute the same, not how fast anything is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_train.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_all_modes_compute_the_same() -> None:
    done = run("--size", "small", "--repeats", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.splitlines()
    assert "one sequence per query" in text[0]
    found = json.loads(last)
    assert (found["size"], found["dtype"], found["days"]) == ("small", "float32", {})
    ways = found["ways"]
    assert list(ways) == ["release", "packed", "supervised", "cached", "bounded"]
    for key, way in ways.items():
        # Mask losses at another resolution are other losses.
        for name in ("text_loss",) if key == "bounded" else ("total_loss", "text_loss", "gradient_norm"):
            assert way[name] == pytest.approx(ways["release"][name], rel=1e-5, abs=1e-5), (way["way"], name)
        assert 0 < way["head_s"] < way["lm_s"]
        assert min(way["step_s"], way["encoders_s"], way["memory"]) > 0
    assert ways["packed"]["positions"] == ways["supervised"]["positions"] < ways["release"]["positions"]
    for name in (
        "step_ratio",
        "step_ratio_without_cache",
        "lm_ratio",
        "memory_ratio",
        "memory_ratio_without_cache",
        "step_ratio_bounded",
        "memory_ratio_bounded",
    ):
        assert math.isfinite(found[name]) and found[name] > 0
    assert found["step_ratio"] == pytest.approx(ways["release"]["step_s"] / ways["cached"]["step_s"])
    assert found["lm_ratio"] == pytest.approx(ways["release"]["lm_s"] / ways["supervised"]["lm_s"])
    assert found["memory_ratio"] == pytest.approx(ways["cached"]["memory"] / ways["release"]["memory"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "middles"), "error: --size middles: unknown; expected middle or small. Did you mean 'middle'?"),
        (("--size", "small", "--repeats", "0"), "error: --repeats and --threads: expected 1 or more"),
        (("--way", "x"), "invalid choice: 'x'"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
