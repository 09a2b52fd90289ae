"""A subset by caps: at most so many targets of each category, the same ones for a seed in whatever order they come."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from medisee.foundation.errors import InputError, nearest
from medisee.foundation.files import fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """How many targets to take.

    Attributes:
        cap: most targets of each category; None takes all.
        caps: categories that have a cap of their own; 0 leaves one out.
        seed: of the choice.
    """

    cap: int | None = None
    caps: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0

    def cap_of(self, category: str) -> int | None:
        """Returns the most targets of a category, None for no cap."""
        return self.caps.get(category, self.cap)


def parse_subset(words: Sequence[str], seed: int) -> Subset:
    """Reads a subset as it is written in a command: `500 liver=2000 'left kidney=0'`.

    Raises:
        InputError: words are neither a number nor CATEGORY=NUMBER, or something is said twice.
    """
    problems: list[str] = []
    caps: dict[str, int] = {}
    for word in words:
        category, equals, number = word.rpartition("=")
        if (equals and not category) or not number.isdecimal():
            problems.append(
                f"--subset {word!r}: expected a number such as 500, or CATEGORY=NUMBER such as liver=2000; correct it."
            )
        elif category in caps:
            named = f"a cap of {category!r}" if category else "a cap of all categories"
            problems.append(f"--subset {word!r}: is a second {named.removeprefix('a ')}; expected one; remove one.")
        else:
            caps[category] = int(number)
    if problems:
        raise InputError(problems)
    return Subset(cap=caps.pop("", None), caps=caps, seed=seed)


def check_categories(subset: Subset, known: Collection[str]) -> None:
    """Checks that categories with a cap of their own exist.

    Raises:
        InputError: some do not.
    """
    unknown = sorted(set(subset.caps) - set(known))
    if unknown:
        raise InputError(
            f"--subset {category}={subset.caps[category]}: expected a category of the chosen data sets, found none of "
            f"this name.{nearest(category, known) or ' Remove it.'}"
            for category in unknown
        )


class Chosen:
    """The targets of a subset, chosen while they pass by.

    Each target has a rank, a hash of the seed and its name. Of each category the targets of the lowest ranks are
    chosen, so the order in which they come does not matter, and only the ranks of the chosen ones are held.
    """

    def __init__(self, subset: Subset) -> None:
        self._subset = subset
        # Negative ranks: a heap has its smallest number in front, and the highest rank is the one to give up.
        self._ranks: dict[str, list[int]] = {}

    def wants(self, category: str, name: str) -> bool:
        """Returns whether a target is chosen, as far as is known: of those added so far, and if it can be used."""
        cap = self._subset.cap_of(category)
        ranks = self._ranks.get(category, [])
        return cap is None or len(ranks) < cap or (cap > 0 and self._rank(name) <= -ranks[0])

    def add(self, category: str, name: str) -> None:
        """Adds a target that can be used; each may be added once."""
        cap = self._subset.cap_of(category)
        if not cap:
            return
        ranks = self._ranks.setdefault(category, [])
        if len(ranks) < cap:
            heapq.heappush(ranks, -self._rank(name))
        else:
            heapq.heappushpop(ranks, -self._rank(name))

    def _rank(self, name: str) -> int:
        return fingerprint(f"{self._subset.seed}:{name}")
