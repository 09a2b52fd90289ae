"""Configurations that were damaged at random: each loads, or is refused in sentences."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from medisee.config import Config, load_config
from medisee.foundation.errors import InputError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("**/*.yaml"))
PIECES = [
    "{",
    "[",
    "- ",
    ": ",
    "&a ",
    "*a",
    "!!",
    "null",
    "no",
    "010",
    "1:30",
    ".nan",
    "-1",
    "~",
    '"',
    "'",
    "\t",
    "---\n",
]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, drops, doubles or puts in a few bytes, lines or pieces of YAML."""
    for _ in range(rng.randint(1, 3)):
        place, lines = rng.randrange(len(content) + 1), content.splitlines(keepends=True) or [b""]
        line = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        elif kind == 1:
            content = content[:place]
        elif kind == 2:
            content = b"".join(lines[:line] + lines[line + 1 :])
        elif kind == 3:
            content = b"".join([*lines[: line + 1], *lines[line:]])
        elif kind == 4:
            content = content[:place] + rng.choice(PIECES).encode() + content[place:]
        else:
            content = content.replace(rng.choice(b"0123456789:").to_bytes(1, "big"), rng.choice(PIECES).encode(), 1)
    return content


@pytest.mark.parametrize("seed", range(200))
def test_a_damaged_configuration_loads_or_is_refused(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    source, path = CONFIGS[seed % len(CONFIGS)], tmp_path / "run.yaml"
    content = source.read_bytes().replace(b"base: ", f"base: {source.parent}/".encode())
    path.write_bytes(damaged(content, rng))
    try:
        assert isinstance(load_config(path), Config)
    except InputError as error:
        assert error.problems
        for problem in error.problems:
            assert ".yaml" in problem
            assert "\n" not in problem and len(problem) < 1000
