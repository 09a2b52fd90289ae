"""A subset by caps: a maximum number of targets per category, the same ones for a seed whatever their order."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from medisee.foundation.errors import InputError, nearest
from medisee.foundation.files import fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """How many targets to take."""

    cap: int | None = None  # maximum number of targets per category; None takes all
    caps: Mapping[str, int] = field(default_factory=dict)  # categories with another maximum; 0 leaves one out
    seed: int = 0  # of the choice

    def cap_of(self, category: str) -> int | None:
        """Returns the maximum of a category, None for no maximum."""
        return self.caps.get(category, self.cap)


def parse_subset(words: Sequence[str], seed: int) -> Subset:
    """Reads a subset as it is written in a command: `500 liver=2000 'left kidney=0'`."""
    problems: list[str] = []
    caps: dict[str, int] = {}
    for word in words:
        category, equals, number = word.rpartition("=")
        if (equals and not category) or not number.isdecimal():
            problems.append(
                f"--subset {word!r}: expected a number such as 500, or CATEGORY=NUMBER such as liver=2000; correct it."
            )
        elif category in caps:
            problems.append(
                f"--subset {word!r}: is a second cap of {repr(category) if category else 'all categories'}; remove one."
            )
        else:
            caps[category] = int(number)
    if problems:
        raise InputError(problems)
    return Subset(cap=caps.pop("", None), caps=caps, seed=seed)


def check_categories(subset: Subset, known: Collection[str]) -> None:
    """Checks that the categories in `caps` exist."""
    if unknown := sorted(set(subset.caps) - set(known)):
        raise InputError(
            f"--subset {category}={subset.caps[category]}: expected a category of the chosen data sets, found none of "
            f"this name.{nearest(category, known) or ' Remove it.'}"
            for category in unknown
        )


class Chosen:
    """The targets of a subset, chosen in one pass.

    A target's rank is a hash of the seed and its name. Of each category the targets of the lowest ranks are chosen, so
    their order does not matter, and only the ranks of the chosen ones are kept.
    """

    def __init__(self, subset: Subset) -> None:
        self._subset = subset
        # Negative ranks: the first of a heap is its smallest, and the highest rank is the one to drop.
        self._ranks: dict[str, list[int]] = {}

    def wants(self, category: str, name: str) -> bool:
        """Returns whether a target would be chosen among those added so far, if it is usable."""
        cap = self._subset.cap_of(category)
        ranks = self._ranks.get(category, [])
        return cap is None or len(ranks) < cap or (cap > 0 and self._rank(name) <= -ranks[0])

    def add(self, category: str, name: str) -> None:
        """Adds a usable target, at most once."""
        cap = self._subset.cap_of(category)
        if not cap:
            return
        ranks = self._ranks.setdefault(category, [])
        heapq.heappush(ranks, -self._rank(name))
        if len(ranks) > cap:
            heapq.heappop(ranks)

    def _rank(self, name: str) -> int:
        return fingerprint(f"{self._subset.seed}:{name}")
