"""What a user did wrong, reported once: InputError carries every problem found, commands print it and exit with 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence

from medisee.foundation.signals import Interrupted, interrupted_by_signals


class InputError(Exception):
    """Bad input from the user, never a bug of ours.

    Each problem is one sentence that names the file (and line), the value found, what was expected and the fix.
    Readers collect all problems of a file before they raise.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the error's type where there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shortened(problems: Sequence[str], where: str, most: int = 8) -> list[str]:
    """Returns the first problems and how many more there are."""
    more = [f"{where}: and {len(problems) - most} more"] if len(problems) > most else []
    return [*problems[:most], *more]


def nearest(value: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest known name, or an empty string when none is close."""
    match = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def exit_code(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Runs a command's main and returns its exit status.

    It is 0 on success, 2 for bad input, with one line per problem on stderr, 130 after Ctrl-C, 143 after SIGTERM, 129
    after SIGHUP.
    """
    try:
        with interrupted_by_signals():
            main(argv)
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"{error}; nothing is half-written: start it again.", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
