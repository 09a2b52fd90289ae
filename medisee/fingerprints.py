"""Finds names that are there twice among millions, in eight bytes a name."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np


class Fingerprints:
    """64-bit hashes of names, in the order in which they were added."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, name: str) -> None:
        """Adds a name."""
        self._hashes.append(fingerprint(name))

    def repeated(self) -> frozenset[int]:
        """Returns the fingerprints that were added twice or more.

        Two names may share one, so the names that have one of these are to be compared: a second look at a few.
        """
        ranked = np.sort(np.frombuffer(self._hashes, np.uint64))
        return frozenset(ranked[1:][ranked[1:] == ranked[:-1]].tolist())


def fingerprint(name: str) -> int:
    """Returns the 64-bit hash of a name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
