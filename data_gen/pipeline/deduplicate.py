"""The pass over near-duplicates: questions that say what another says, in whichever template or image, are put anew.

It runs when all items are finished, in the order of the pairs' ids, so that its outcome does not depend on which answer
came first. Pairs that an earlier pass has kept stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from pydantic import BaseModel

from data_gen.core.calls import Fault, canonical
from data_gen.core.items import Drop, Item, Pair
from data_gen.core.prompts import ask_again
from data_gen.core.recipe import Recipe, fields_of, request_of
from data_gen.core.schemas import CellPair, CellPairs
from data_gen.core.workers import work_through
from data_gen.ledger.ledger import Ledger
from data_gen.pipeline.asking import Ask, Pending
from data_gen.rules import checks as rules
from data_gen.rules.checks import Breach
from data_gen.rules.duplicates import Duplicates


@dataclass(slots=True)
class _Open:
    """A question that another one resembles: all turns of its conversation (or itself alone), and the other's breach."""

    turns: list[Pair]
    breach: Breach
    rewritten: bool = False

    @property
    def last(self) -> Pair:
        return self.turns[-1]


async def settle(ledger: Ledger, recipe: Recipe, ask: Ask, *, workers: int) -> None:
    """Compares all new pairs with each other and with those kept before.

    A near-duplicate is asked for again in other words, `recipe.again` times at most, then dropped; of a conversation the
    last question counts.

    Args:
        ledger: where the pairs are.
        recipe: how they were made.
        ask: see `data_gen.pipeline.asking`.
        workers: how many are asked for again at once.

    Raises:
        StopRun: the run ends; nothing is settled then.
        Unreachable: the server did not answer; nothing is settled then.
        Pending: answers will come with a batch; nothing is settled then.
    """
    seen = Duplicates()
    for turns in _conversations(ledger.pairs_in("kept")):
        seen.add(turns[-1].id, turns[-1].question)
    still_open: list[_Open] = []
    for turns in _conversations(ledger.pairs_in("new")):
        if breach := seen.add(turns[-1].id, turns[-1].question):
            still_open.append(_Open(turns, breach))
    rewritten: list[Pair] = []
    for attempt in range(1, recipe.again + 1):
        pending: list[Pending] = []

        async def rewrite(one: _Open, attempt: int = attempt, pending: list[Pending] = pending) -> None:
            try:
                await _rewrite(one, ledger.item(one.last.item), recipe, ask, attempt=attempt)
            except Pending as error:
                pending.append(error)

        await work_through(iter(still_open), rewrite, workers)
        if pending:
            raise pending[0]
        left: list[_Open] = []
        for one in still_open:
            breach = seen.add(one.last.id, one.last.question) if one.rewritten else one.breach
            if breach is None:
                rewritten.append(one.last)
            else:
                one.breach = breach
                left.append(one)
        still_open = left
    drops = [
        Drop(turn.item, "duplicates", one.breach.rule, one.breach.reason, turn.id)
        for one in still_open
        for turn in one.turns
    ]
    ledger.settle(rewritten, drops)


def _conversations(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    """Groups the turns of a conversation, whose ids follow each other; a pair without one stands alone."""
    for _, turns in groupby(pairs, key=lambda pair: pair.conversation or pair.id):
        yield sorted(turns, key=lambda pair: pair.turn)


async def _rewrite(one: _Open, item: Item, recipe: Recipe, ask: Ask, *, attempt: int) -> None:
    """Asks for the last question in other words; what breaks a rule leaves it as it is."""
    pair = one.last
    cell = f"{pair.perspective}-{pair.length}"
    fields = {**fields_of(item, recipe.names, "", template=pair.template), "descriptions": {cell: pair.question}}
    answer = canonical({"pairs": [{"cell": cell, "question": pair.question, "answer": pair.answer}]})
    asked = ask_again(
        request_of("transform", fields, recipe, item),
        answer,
        [Fault(cell, one.breach.rule, one.breach.reason)],
        attempt,
    )

    def judge(value: BaseModel) -> list[Fault]:
        found = _only(value, cell)
        if found is None:
            return [Fault("", "cells", f"write one entry for {cell}")]
        breaches = rules.check_pair(found.question, found.answer, pair.length, item, recipe.names)
        return [Fault(cell, breach.rule, breach.reason) for breach in breaches]

    answered = await ask(asked, judge)
    found = None if answered.value is None or answered.faults else _only(answered.value, cell)
    one.rewritten = found is not None
    if found is not None:
        one.turns[-1] = replace(pair, question=found.question.strip(), answer=found.answer.strip())


def _only(value: BaseModel, cell: str) -> CellPair | None:
    pairs = value.pairs if isinstance(value, CellPairs) else []
    return pairs[0] if len(pairs) == 1 and pairs[0].cell == cell else None
