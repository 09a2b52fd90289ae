"""A mixture of sources: the n-th draw follows from the seed alone, for any number of ranks and workers."""

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
    """Draws from sources by weight; a source repeats a record only after all of its records have come.

    A source may join later; before its first draw the others share the draws by their weights.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[int],
        seed: int,
        *,
        first_draws: Sequence[int] | None = None,
        unseeded: bool = False,
    ) -> None:
        """`lengths`, `weights` and `first_draws` are each source's number of records, share and first draw.

        `unseeded`: every call draws independently, differently in every run (release).
        """
        self.lengths, self.seed = tuple(lengths), seed
        joins = list(first_draws) if first_draws is not None else [0] * len(lengths)
        self.stages = []
        for start in sorted({0, *joins}):
            shares = [weight if join <= start else 0 for weight, join in zip(weights, joins, strict=True)]
            self.stages.append(_Stage(start, np.repeat(np.arange(len(shares)), np.array(shares) // gcd(*shares))))
        self._unseeded = np.random.default_rng() if unseeded else None
        self._order = lru_cache(maxsize=4 * len(lengths))(self._permutation)

    def draw(self, number: int) -> Draw:
        """Returns the draw with this number (0, 1, ...)."""
        current = max(index for index, stage in enumerate(self.stages) if stage.start <= number)
        stage = self.stages[current]
        if self._unseeded is not None:
            source = int(self._unseeded.choice(stage.cycle))
            return Draw(number, source, int(self._unseeded.integers(self.lengths[source])))
        source = int(self._turn(stage, number)[(number - stage.start) % len(stage.cycle)])
        ends = [later.start for later in self.stages[1 : current + 1]] + [number]
        before = sum(self._count(part, end, source) for part, end in zip(self.stages, ends, strict=False))
        epoch, position = divmod(before, self.lengths[source])
        return Draw(number, source, int(self._order(source, epoch)[position]))

    def _turn(self, stage: _Stage, number: int) -> np.ndarray:
        turn = (number - stage.start) // len(stage.cycle)
        return np.random.default_rng((self.seed, 1, stage.start, turn)).permutation(stage.cycle)

    def _count(self, stage: _Stage, end: int, source: int) -> int:
        """Counts a source's draws from the stage's start up to `end`."""
        turns, rest = divmod(end - stage.start, len(stage.cycle))
        return turns * int((stage.cycle == source).sum()) + int((self._turn(stage, end)[:rest] == source).sum())

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 2, source, epoch)).permutation(self.lengths[source])


@dataclass(frozen=True, slots=True)
class _Stage:
    start: int
    cycle: np.ndarray
