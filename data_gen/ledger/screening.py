"""What people's decisions make of the machine's pairs: which stay, in which words, and why the others go.

The rules, the same for one reviewer and for many:
- nobody has judged it: it stays as it is (or goes, when only screened pairs are wanted);
- one rejection is enough to take it out, whatever others say;
- an edit goes before an accept: the edited words stand; edits of the same pair that differ take it out;
- a conversation stays or goes as a whole: its turns speak of each other, and the last one asks for the target;
- of two pairs of an item that ask the same after all edits, the first stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from data_gen.core.items import Decision, Pair

Outcome = Literal["unscreened", "accepted", "edited", "rejected", "disagreed", "cut", "repeated"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
KEPT: tuple[Outcome, ...] = ("unscreened", "accepted", "edited")


@dataclass(frozen=True, slots=True)
class Screened:
    """A pair in its final words, and what people made of it."""

    pair: Pair
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Screening:
    """All pairs after screening.

    Attributes:
        pairs: those that stay, in the order given.
        counts: how many came to each outcome; all outcomes are there.
        judged: how many pairs at least one person has judged.
    """

    pairs: tuple[Screened, ...]
    counts: dict[Outcome, int]
    judged: int


def screen(pairs: Sequence[Pair], decisions: Iterable[Decision], *, screened_only: bool = False) -> Screening:
    """Applies decisions to pairs.

    Args:
        pairs: in the order of their ids.
        decisions: those that stand, one for each reviewer and pair; those about other pairs are passed over.
        screened_only: keep only what a person has accepted or edited.
    """
    by_pair: dict[str, list[Decision]] = {}
    for decision in decisions:
        by_pair.setdefault(decision.pair, []).append(decision)
    judged = [_judge(pair, by_pair.get(pair.id, [])) for pair in pairs]
    final = _without_repeats(_without_cut_turns(judged, screened_only))
    counts = Counter(one.outcome for one in final)
    return Screening(
        pairs=tuple(one for one in final if _stays(one, screened_only)),
        counts={outcome: counts[outcome] for outcome in OUTCOMES},
        judged=sum(pair.id in by_pair for pair in pairs),
    )


def _stays(one: Screened, screened_only: bool) -> bool:
    return one.outcome in KEPT and not (screened_only and one.outcome == "unscreened")


def _judge(pair: Pair, decisions: Sequence[Decision]) -> Screened:
    verdicts = {decision.verdict for decision in decisions}
    if not verdicts:
        return Screened(pair, "unscreened")
    if "reject" in verdicts:
        return Screened(pair, "rejected")
    edits = {(one.question.strip(), one.answer.strip()) for one in decisions if one.verdict == "edit"}
    if len(edits) > 1:
        return Screened(pair, "disagreed")
    if not edits:
        return Screened(pair, "accepted")
    ((question, answer),) = edits
    return Screened(replace(pair, question=question, answer=answer), "edited")


def _without_cut_turns(judged: Sequence[Screened], screened_only: bool) -> list[Screened]:
    broken = {one.pair.conversation for one in judged if not _stays(one, screened_only)} - {None}
    return [
        replace(one, outcome="cut") if one.pair.conversation in broken and _stays(one, screened_only) else one
        for one in judged
    ]


def _without_repeats(judged: Sequence[Screened]) -> list[Screened]:
    """Marks pairs that ask the same of one item; turns of conversations differ by what was said before."""
    seen: set[tuple[str, str]] = set()
    final = []
    for one in judged:
        key = (one.pair.item, " ".join(one.pair.question.casefold().split()))
        if one.outcome in KEPT and one.pair.conversation is None:
            final.append(replace(one, outcome="repeated") if key in seen else one)
            seen.add(key)
        else:
            final.append(one)
    return final
