"""The one place that makes an output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from medisee.foundation.errors import InputError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds an output folder for this process, so that two runs never write into one; a missing folder is made.

    The lock ends with the process, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{folder}: another run is writing here; wait until it ends, or choose another folder."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
