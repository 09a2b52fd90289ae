"""How far two reviewers agree about the pairs that both have judged: the raw agreement and Cohen's kappa."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from data_gen.core.items import Decision


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two reviewers, compared."""

    first: str
    second: str
    pairs: int  # how many both have judged
    raw: float | None  # fraction of these with the same verdict (accept, reject, edit); None when there are none
    kappa: float | None  # Cohen's: 1 is perfect, 0 is chance; None without shared pairs or with one verdict throughout


def agreements(decisions: Sequence[Decision]) -> list[Agreement]:
    """Compares all reviewers who share a pair, in the order of their names; one decision per reviewer and pair."""
    verdicts: dict[str, dict[str, str]] = {}
    for decision in decisions:
        verdicts.setdefault(decision.reviewer, {})[decision.pair] = decision.verdict
    found = []
    for first, second in combinations(sorted(verdicts), 2):
        if shared := sorted(verdicts[first].keys() & verdicts[second].keys()):
            ours, theirs = ([verdicts[name][pair] for pair in shared] for name in (first, second))
            found.append(Agreement(first, second, len(shared), raw_agreement(ours, theirs), cohen_kappa(ours, theirs)))
    return found


def raw_agreement(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Returns the fraction of places at which two lists of labels are equal; None for empty lists.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"expected two labels for each case, got {len(first)} and {len(second)}")
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first) if first else None


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Returns Cohen's kappa (1960) of two lists of labels, (observed - chance) / (1 - chance), in [-1, 1].

    None for empty lists and where chance alone explains everything (0 / 0).

    Raises:
        ValueError: the lists differ in length.
    """
    observed = raw_agreement(first, second)
    if observed is None:
        return None
    ours, theirs = Counter(first), Counter(second)
    chance = sum(ours[label] * theirs[label] for label in ours) / len(first) ** 2
    return None if chance == 1 else (observed - chance) / (1 - chance)
