"""The pairs after people's decisions: which are kept, in which wording, and how far the reviewers agree.

The rules, the same for one reviewer and for many:
- a pair that nobody has judged is kept as it is (or left out, when only screened pairs are wanted);
- one rejection leaves it out, whatever others decide;
- an edit takes precedence over an accept; different edits of the same pair leave it out;
- a conversation is kept or left out as a whole: its turns refer to each other, and the last one asks for the target;
- of two pairs of an item with the same question after all edits, the first is kept;
- a refusal in words or a text with a special token, which older ledgers may hold, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, get_args

from data_gen.core.items import Decision, Pair
from data_gen.rules.checks import check_text

Outcome = Literal["unscreened", "accepted", "edited", "rejected", "disagreed", "cut", "repeated", "unusable"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
KEPT: tuple[Outcome, ...] = ("unscreened", "accepted", "edited")


@dataclass(frozen=True, slots=True)
class Screened:
    pair: Pair  # in its final wording
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Screening:
    pairs: tuple[Screened, ...]  # those that are kept, in the given order
    counts: dict[Outcome, int]  # of every outcome
    judged: int  # how many pairs at least one person has judged


def screen(pairs: Sequence[Pair], decisions: Iterable[Decision], *, screened_only: bool = False) -> Screening:
    """Applies decisions, one per reviewer and pair, to pairs in the order of their ids."""
    kept = KEPT[1:] if screened_only else KEPT  # screened: accepted or edited by a person
    by_pair: dict[str, list[Decision]] = {}
    for decision in decisions:
        by_pair.setdefault(decision.pair, []).append(decision)
    judged = [_judge(pair, by_pair.get(pair.id, [])) for pair in pairs]
    broken = {one.pair.conversation for one in judged if one.outcome not in kept} - {None}
    seen: set[tuple[str, str]] = set()
    final: list[Screened] = []
    for one in judged:
        question = one.pair.item, " ".join(one.pair.question.casefold().split())
        if one.pair.conversation in broken and one.outcome in kept:
            one = replace(one, outcome="cut")
        # Turns of conversations may repeat a question, as they differ by what was said before.
        elif one.pair.conversation is None and one.outcome in KEPT:
            one = replace(one, outcome="repeated") if question in seen else one
            seen.add(question)
        final.append(one)
    counts = Counter(one.outcome for one in final)
    return Screening(
        pairs=tuple(one for one in final if one.outcome in kept),
        counts={outcome: counts[outcome] for outcome in OUTCOMES},
        judged=sum(pair.id in by_pair for pair in pairs),
    )


def _judge(pair: Pair, decisions: Sequence[Decision]) -> Screened:
    verdicts = {decision.verdict for decision in decisions}
    edits = {(one.question.strip(), one.answer.strip()) for one in decisions if one.verdict == "edit"}
    if "reject" in verdicts:
        return Screened(pair, "rejected")
    if len(edits) > 1:
        return Screened(pair, "disagreed")
    if edits:
        question, answer = edits.pop()
        pair = replace(pair, question=question, answer=answer)
    if any(check_text(pair.question)) or any(check_text(pair.answer)):
        return Screened(pair, "unusable")
    return Screened(pair, "edited" if "edit" in verdicts else "accepted" if verdicts else "unscreened")


@dataclass(frozen=True, slots=True)
class Agreement:  # of two reviewers
    first: str
    second: str
    pairs: int  # how many both have judged
    raw: float  # fraction of these with the same verdict (accept, reject, edit)
    kappa: float | None  # Cohen's (1960), in [-1, 1]: 0 is chance; None when both gave one and the same verdict only


def agreements(decisions: Sequence[Decision]) -> list[Agreement]:
    """Compares all reviewers who share a pair, in the order of their names; one decision per reviewer and pair."""
    verdicts: dict[str, dict[str, str]] = {}
    for decision in decisions:
        verdicts.setdefault(decision.reviewer, {})[decision.pair] = decision.verdict
    found: list[Agreement] = []
    for first, second in combinations(sorted(verdicts), 2):
        if shared := verdicts[first].keys() & verdicts[second].keys():
            count = len(shared)
            raw = sum(verdicts[first][pair] == verdicts[second][pair] for pair in shared) / count
            ours, theirs = (Counter(verdicts[name][pair] for pair in shared) for name in (first, second))
            chance = sum(ours[verdict] * theirs[verdict] for verdict in ours) / count**2
            kappa = None if chance == 1 else (raw - chance) / (1 - chance)
            found.append(Agreement(first, second, count, raw, kappa))
    return found
