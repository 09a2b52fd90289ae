"""Command lines: overrides and options in any order, paths as a shell or a person writes them."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from medisee.foundation.errors import InputError

_OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)*=.*", re.DOTALL)


def parse_words(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, more: str | None = None
) -> argparse.Namespace:
    """Parses a command's words; those of the positional list `more` may come anywhere among the options."""
    words = list(sys.argv[1:] if argv is None else argv)
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise InputError(f"argument {word!r:.100}: is not UTF-8 text; write it as such, or rename the file.")
    return _parsed(parser, words, more)


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str], more: str | None) -> argparse.Namespace:
    given, rest = parser.parse_known_args(words)
    if rest and more is not None and hasattr(given, more) and not any(word.startswith("-") for word in rest):
        setattr(given, more, [*getattr(given, more), *rest])
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return given


def a_path(text: str) -> Path:
    """The type of options that are paths: ~ is the home folder, also where the shell leaves it (--out=~/x)."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(os.path.expanduser(text))


def path_or_override(text: str) -> Path | str:
    """The type of an option that takes several paths, and therefore also takes the overrides that follow them."""
    return text if _OVERRIDE.fullmatch(text) and not Path(text).exists() else a_path(text)
