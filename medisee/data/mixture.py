"""A deterministic mixture: which record is the n-th draw is a pure function of the seed, whatever ranks and workers do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np


@dataclass(frozen=True, slots=True)
class Draw:
    """The n-th example of a training run: a record of a source."""

    number: int
    source: int
    index: int


class Mixture:
    """Draws from sources by weight; every record of a source comes once before one comes again."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[int], seed: int) -> None:
        """Args: number of records and share of each source; seed of all orders."""
        self.lengths, self.seed = tuple(lengths), seed
        divisor = gcd(*weights)
        self.cycle = np.repeat(np.arange(len(weights)), [weight // divisor for weight in weights])
        self._order = lru_cache(maxsize=4 * len(lengths))(self._permutation)

    def draw(self, number: int) -> Draw:
        """Returns the draw with this number (0, 1, ...)."""
        turn, place = divmod(number, len(self.cycle))
        order = np.random.default_rng((self.seed, 1, turn)).permutation(self.cycle)
        source = int(order[place])
        before = turn * int((self.cycle == source).sum()) + int((order[:place] == source).sum())
        epoch, position = divmod(before, self.lengths[source])
        return Draw(number, source, int(self._order(source, epoch)[position]))

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 2, source, epoch)).permutation(self.lengths[source])
