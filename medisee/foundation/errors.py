"""What a user did wrong, reported once: InputError carries every problem found, commands print it and exit with 2."""

from __future__ import annotations

import difflib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medisee.foundation.signals import Interrupted, interrupted_by_signals

_OF_DISK = ("EACCES", "EDQUOT", "EFBIG", "EIO", "ELOOP", "ENAMETOOLONG", "ENOSPC", "ENOTDIR", "EROFS")
"""Errors that a check before the work cannot rule out; any other is a bug of ours."""


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


@contextmanager
def library_errors(where: Path | str, what: str, fix: str) -> Iterator[None]:
    """Turns whatever a library raises when it reads a file of others, which may be of any type, into an InputError."""
    try:
        yield
    except (InputError, ImportError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: {what} ({reason}); {fix}.") from error


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

    It is 0 on success, 2 for bad input or a full disk, with one line per problem on stderr, 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP, and 141 when the reader of stdout, such as `head`, has gone.
    """
    _make_writable()
    try:
        try:
            with interrupted_by_signals():
                main(argv)
        except InputError as error:
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
            return 2
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) not in _OF_DISK:
                raise
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror}; mend this, or choose another place.", file=sys.stderr)
            return 2
        except Interrupted as error:
            print(f"{error}; nothing is half-written: start it again.", file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # it was another pipe
        # Python writes what is left once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _make_writable() -> None:
    """Lets stdout and stderr take any text: nowhere if they are closed, escaped if their encoding lacks a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
