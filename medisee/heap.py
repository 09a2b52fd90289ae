"""The C library's heap: on a CPU a third of a step's time can go into pages that are given back and asked for again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3)
_LARGEST_BLOCKS = (1 << 30, 1 << 25)  # bytes; glibc before 2.35 takes no more than the second
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
    blocks = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST_BLOCKS)
    return bool(mallopt(_TRIM_THRESHOLD, _MOST_FREE)) and blocks
