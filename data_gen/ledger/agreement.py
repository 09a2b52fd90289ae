"""How far two reviewers agree about the pairs that both have judged: the raw share and Cohen's kappa."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from data_gen.core.items import Decision


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two reviewers, compared.

    Attributes:
        first, second: their names.
        pairs: how many pairs both have judged.
        raw: share of these on which their verdicts (accept, reject, edit) are the same; None when there is none.
        kappa: Cohen's kappa, which takes off the agreement that chance alone would give: 1 is perfect, 0 is chance.
            None when it is not defined: nothing shared, or both gave one and the same verdict throughout.
    """

    first: str
    second: str
    pairs: int
    raw: float | None
    kappa: float | None


def agreements(decisions: Sequence[Decision]) -> list[Agreement]:
    """Compares every two reviewers who share a pair, in the order of their names.

    Args:
        decisions: those that stand, one for each reviewer and pair.
    """
    verdicts: dict[str, dict[str, str]] = {}
    for decision in decisions:
        verdicts.setdefault(decision.reviewer, {})[decision.pair] = decision.verdict
    found = []
    for first, second in combinations(sorted(verdicts), 2):
        shared = sorted(verdicts[first].keys() & verdicts[second].keys())
        if shared:
            ours, theirs = ([verdicts[name][pair] for pair in shared] for name in (first, second))
            found.append(Agreement(first, second, len(shared), raw_agreement(ours, theirs), cohen_kappa(ours, theirs)))
    return found


def raw_agreement(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Returns the share of places at which two lists of labels are equal; None for empty lists.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"expected two labels for each case, got {len(first)} and {len(second)}")
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first) if first else None


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Returns Cohen's kappa (1960) of two lists of labels: (observed - chance) / (1 - chance).

    Returns:
        -1 to 1; None for empty lists and where chance alone already explains all, since 0 / 0 says nothing.

    Raises:
        ValueError: the lists differ in length.
    """
    observed = raw_agreement(first, second)
    if observed is None:
        return None
    ours, theirs, total = Counter(first), Counter(second), len(first)
    chance = sum(ours[label] * theirs[label] for label in ours) / total**2
    return None if chance == 1 else (observed - chance) / (1 - chance)
