"""Signals that end a command: SIGTERM and SIGHUP, like Ctrl-C, raise an exception, so that temporary files go."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a process by default, Ctrl-C's apart; Windows has no SIGHUP."""


class Interrupted(KeyboardInterrupt):
    """A signal came that ends the process with the exit code `code`, 128 + the signal."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__(f"interrupted by {signal.Signals(number).name}")


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raises Interrupted where SIGTERM or SIGHUP would end the process; a signal that is ignored (nohup) stays so."""
    owner = os.getpid()

    def interrupt(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child, which its parent ends with a signal
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        notice("")
        raise Interrupted(number)

    in_main = threading.current_thread() is threading.main_thread()  # Python sets handlers only there
    own = [number for number in ENDING if in_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in own:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, signal.SIG_DFL)


def notice(message: str) -> None:
    """Writes to stderr from a signal handler; where the terminal is gone, what is written later goes nowhere."""
    try:
        os.write(2, f"\n{message}".encode())  # not print: the signal may have come in the middle of one
    except OSError:
        with suppress(OSError):
            lost = [stream for stream in (1, 2) if os.fstat(stream).st_rdev == os.fstat(2).st_rdev]
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in lost:
                os.dup2(null, stream)
