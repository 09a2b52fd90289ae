"""The C library's heap: on a CPU a third of a step's time can go into pages that are given back and asked for again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3)
_LARGEST_BLOCK = 1 << 30  # bytes
_MOST_FREE = (1 << 31) - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that tensors have freed, for the next ones.

    glibc returns large blocks to the system at once, which clears every page before it hands it out again. Affects CPU
    tensors only. Does nothing where the C library has no such setting (macOS, Windows, musl).

    Returns:
        Whether it is set.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _MOST_FREE))
