"""Stopping a run early and cleanly: SIGTERM, SIGHUP, Ctrl-C or a file named `stop` in its folder, heeded between steps
and between the batches of a validation."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from medisee.foundation.signals import ENDING, notice
from medisee.training.ranks import Place, largest

BY_FILE = 1


class Stopped(Exception):
    """A run was stopped before its end, and its state is saved; `code` is the exit code: 0, or 128 + the signal."""

    def __init__(self, step: int, folder: Path, request: int) -> None:
        self.code = 0 if request == BY_FILE else request
        super().__init__(f"stopped after step {step}, which is saved in {folder}; continue with --resume.")


class StopRequest:
    """While it is entered, the first signal is noted instead of obeyed; a second Ctrl-C stops at once.

    A signal that was ignored before, as SIGHUP under nohup, stays ignored. The file serves launchers, which kill their
    ranks half a minute after a signal: too soon for a step and a save.
    """

    def __init__(self, out: Path) -> None:
        self.file = out / "stop"
        self.noted = 0

    def __enter__(self) -> StopRequest:
        heeded = [number for number in (*ENDING, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def remove_file(self) -> None:
        """Removes the file of an earlier request, if there is one."""
        if self.file.is_file():
            self.file.unlink(missing_ok=True)

    def request(self, place: Place) -> int:
        """Returns what every rank must do now: 0 to go on, BY_FILE or 128 + a signal to stop; all ranks call it."""
        by_file = BY_FILE if place.rank == 0 and self.file.is_file() else 0
        request = largest(self.noted or by_file, place)
        if request:
            self.noted = request
            if place.rank == 0:
                self.remove_file()
        return request

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.noted == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = 128 + number
        notice("stopping after this step; its state will be saved (Ctrl-C again: stop at once)\n")
