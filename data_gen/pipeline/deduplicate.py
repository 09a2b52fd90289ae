"""The pass over near-duplicates: a question that repeats another one, of any template or image, is rewritten.

It runs when all items are finished, in the order of the pairs' ids, so that its outcome does not depend on which answer
came first. Pairs that an earlier pass has kept stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby

from pydantic import BaseModel

from data_gen.core.calls import Fault, canonical
from data_gen.core.items import Drop, Pair
from data_gen.core.prompts import ask_again
from data_gen.core.recipe import Recipe, fields_of, request_of
from data_gen.core.schemas import CellPair, CellPairs
from data_gen.core.workers import work_through
from data_gen.ledger.ledger import Ledger
from data_gen.pipeline.asking import Ask, Pending
from data_gen.rules import checks as rules
from data_gen.rules.checks import Breach
from data_gen.rules.duplicates import Duplicates


async def deduplicate(ledger: Ledger, recipe: Recipe, ask: Ask, *, workers: int) -> None:
    """Compares all new pairs with each other and with those kept before.

    A near-duplicate is asked for again in other words, at most `recipe.again` times, then dropped; of a conversation
    the last question counts. When an answer does not come (StopRun, Unreachable, Pending) nothing else is stored.
    """
    seen = Duplicates()
    for turns in _conversations(ledger.pairs_in("kept")):
        seen.add(turns[-1].id, turns[-1].question)
    # Of each question that another one resembles: all turns of its conversation (or itself alone), and the breach.
    repeated: list[tuple[list[Pair], Breach]] = []
    for turns in _conversations(ledger.pairs_in("new")):
        if breach := seen.add(turns[-1].id, turns[-1].question):
            repeated.append((turns, breach))
    rewritten: list[Pair] = []
    new: dict[str, Pair] = {}
    pending: list[Pending] = []

    async def rewrite(one: tuple[list[Pair], Breach], attempt: int) -> None:
        try:
            if pair := await _rewrite(one[0][-1], one[1], ledger, recipe, ask, attempt=attempt):
                new[pair.id] = pair
        except Pending as error:
            pending.append(error)

    for attempt in range(1, recipe.again + 1):
        new.clear()
        await work_through(iter(repeated), partial(rewrite, attempt=attempt), workers)
        if pending:
            raise pending[0]
        left: list[tuple[list[Pair], Breach]] = []
        for turns, breach in repeated:
            pair = new.get(turns[-1].id)
            still = seen.add(pair.id, pair.question) if pair else breach
            if still:
                left.append(([*turns[:-1], pair or turns[-1]], still))
            elif pair:
                rewritten.append(pair)
        repeated = left
    drops = [
        Drop(turn.item, "duplicates", breach.rule, breach.reason, turn.id)
        for turns, breach in repeated
        for turn in turns
    ]
    ledger.mark_deduplicated(rewritten, drops)


def _conversations(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    """Groups the turns of a conversation, whose ids follow each other; a pair without one is a group by itself."""
    for _, turns in groupby(pairs, key=lambda pair: pair.conversation or pair.id):
        yield sorted(turns, key=lambda pair: pair.turn)


async def _rewrite(
    pair: Pair, breach: Breach, ledger: Ledger, recipe: Recipe, ask: Ask, *, attempt: int
) -> Pair | None:
    """Asks for a question in other words; None when the answer breaks a rule."""
    item = ledger.item(pair.item)
    cell = f"{pair.perspective}-{pair.length}"
    fields = {**fields_of(item, recipe.names, "", template=pair.template), "descriptions": {cell: pair.question}}
    request = ask_again(
        request_of("transform", fields, recipe, item),
        canonical({"pairs": [{"cell": cell, "question": pair.question, "answer": pair.answer}]}),
        [Fault(cell, breach.rule, breach.reason)],
        attempt,
    )

    def judge(value: BaseModel) -> list[Fault]:
        found = _only(value, cell)
        if found is None:
            return [Fault("", "cells", f"write one entry for {cell}")]
        breaches = rules.check_pair(found.question, found.answer, pair.length, item, recipe.names)
        return [Fault(cell, one.rule, one.reason) for one in breaches]

    answered = await ask(request, judge)
    found = None if answered.value is None or answered.faults else _only(answered.value, cell)
    return found and replace(pair, question=found.question.strip(), answer=found.answer.strip())


def _only(value: BaseModel, cell: str) -> CellPair | None:
    pairs = value.pairs if isinstance(value, CellPairs) else []
    return pairs[0] if len(pairs) == 1 and pairs[0].cell == cell else None
