"""Asking until the rules are kept: the loop that all stages share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from data_gen.core.calls import Fault, Request
from data_gen.core.prompts import ask_again
from data_gen.pipeline.asking import Ask


@dataclass(frozen=True, slots=True)
class Validated:
    """What a stage brought: by cell the parts that keep the rules, and the faults of the cells that are missing."""

    parts: dict[str, Any]
    faults: tuple[Fault, ...]


async def ask_until_valid(
    request: Request,
    cells: list[str],
    judge: Callable[[BaseModel, dict[str, Any]], list[Fault]],
    parts: Callable[[BaseModel], dict[str, Any]],
    *,
    ask: Ask,
    again: int,
) -> Validated:
    """Asks until all cells keep the rules, at most `again` more times; a part that is good once stays as it is.

    Args:
        request: the first one.
        cells: what is wanted; the result has the same order, whatever became good first.
        judge: the faults of an answer, given what is good already; it need not look at those cells.
        parts: an answer's content by cell.
        ask: see `data_gen.pipeline.asking`.
        again: the most requests after the first.
    """
    good: dict[str, Any] = {}
    faults: tuple[Fault, ...] = ()
    current = request
    for attempt in range(again + 1):
        kept = dict(good)
        answer = await ask(current, lambda value, kept=kept: judge(value, kept))
        faults = answer.faults
        broken = {fault.cell for fault in faults}
        if answer.value is not None and "" not in broken:
            found = parts(answer.value)
            good |= {cell: found[cell] for cell in cells if cell not in good and cell not in broken}
        if len(good) == len(cells) or not answer.again:
            break
        current = ask_again(request, answer.text, faults, attempt + 1)
    return Validated(
        {cell: good[cell] for cell in cells if cell in good},
        tuple(fault for fault in faults if fault.cell not in good),
    )
