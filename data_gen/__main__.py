"""The engine that makes MLMR-SD: question-answer pairs from masks and labels. Run it as

  python -m data_gen plan ...     calls, tokens and cost of a run, before its first call
  python -m data_gen run ...      captions, descriptions, questions and answers, into a ledger
  python -m data_gen review ...   people screen the pairs on a local page
  python -m data_gen export ...   records for training, the release's formats, a datasets folder with a card
  python -m data_gen stats ...    word clouds, frequencies, lengths, perspectives

Each command has its own --help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from medisee.foundation.errors import InputError, exit_code, nearest

COMMANDS: dict[str, tuple[str, ...]] = {  # and what each needs of the extra `engine`
    "plan": ("openai", "aiohttp"),
    "run": ("openai", "aiohttp"),
    "review": ("starlette", "uvicorn"),
    "export": ("datasets",),
    "stats": ("wordcloud",),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that comes first on the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"] and words[1:]:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(__doc__)
        return
    command = words[0]
    if command not in COMMANDS:
        raise InputError(
            f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}.{nearest(command, COMMANDS)} "
            "See python -m data_gen --help."
        )
    if missing := ", ".join(name for name in COMMANDS[command] if find_spec(name) is None):
        raise InputError(f"python -m data_gen {command}: needs {missing}; install with `pip install -e '.[engine]'`.")
    import_module(f"data_gen.{command}").main(words[1:])


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
