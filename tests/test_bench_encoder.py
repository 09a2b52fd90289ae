"""The encoder's benchmark at a tiny size: what it prints, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_encoder.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--vit", "micro", "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_compares_the_same_encoders() -> None:
    done = run("--size", "96", "--batch", "2", "--repeats", "2")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert [line.split()[0] for line in table] == ["dtype", "float32", "bfloat16"]
    found = json.loads(last)
    assert (found["vit"], found["size"], found["batch"], found["threads"]) == ("micro", 96, 2, 1)
    exact, halved = found["timings"]
    assert exact["difference"] < 1e-5 < halved["difference"] < 0.1
    for timing in (exact, halved):
        assert min(timing["package_s"], timing["ours_s"], timing["ratio"], timing["cpu_ratio"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "100"), "error: --size 100: SAM's patches are 16 pixels"),
        (("--size", "0"), "error: --size 0"),
        (("--repeats", "0"), "error: --batch, --repeats and --threads: expected 1 or more"),
        (("--vit", "x"), "invalid choice: 'x'"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
