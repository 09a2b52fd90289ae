"""Asking until the rules are kept: the loop that all stages share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from data_gen.core.calls import Fault, Request
from data_gen.core.prompts import ask_again
from data_gen.core.schemas import CELLS
from data_gen.pipeline.asking import Ask

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Filled:
    """What a stage brought: the parts that keep the rules by cell, and the faults of the cells that are missing."""

    parts: dict[str, Any]
    faults: tuple[Fault, ...]


async def fill(
    asked: Request,
    cells: list[str],
    judge: Callable[[BaseModel, dict[str, Any]], list[Fault]],
    parts: Callable[[BaseModel], dict[str, Any]],
    *,
    ask: Ask,
    again: int,
) -> Filled:
    """Asks until all cells keep the rules, or `again` more times; what is good once stays as it is.

    Args:
        asked: the first request.
        cells: what is wanted.
        judge: the faults of an answer, given what is good already; it need not look at those cells.
        parts: an answer's content by cell.
        ask: see `data_gen.pipeline.asking`.
        again: most requests after the first.
    """
    good: dict[str, Any] = {}
    faults: tuple[Fault, ...] = ()
    current = asked
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
        current = ask_again(asked, answer.text, faults, attempt + 1)
    return Filled(good, tuple(fault for fault in faults if fault.cell not in good))


def in_order(parts: dict[str, Part]) -> dict[str, Part]:
    """Sorts parts by cell, so that a request does not depend on the order in which they became good."""
    return {cell: parts[cell] for cell in CELLS if cell in parts}
