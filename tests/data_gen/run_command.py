"""The command `run` against a made-up server: its options, and how it ends."""

from __future__ import annotations

from pathlib import Path

from fake_server import FakeServer

from data_gen import run
from medisee.foundation.errors import exit_code


def options(path: Path, server: FakeServer, ledger: Path, *more: str) -> list[str]:
    """Returns the options of a run; `more` come last."""
    common = [
        "--records",
        str(path),
        "--ledger",
        str(ledger),
        "--base-url",
        server.url,
        "--model",
        "m",
        "--variants",
        "1",
    ]
    return [*common, *(["--free"] if "--prices" not in more else []), *more]


def ends(argv: list[str]) -> int | str | None:
    """Runs and returns the exit code."""
    try:
        return exit_code(run.main, argv)
    except SystemExit as error:
        return error.code
