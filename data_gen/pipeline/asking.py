"""Asking: first the ledger, then an author; every answer is judged and stored before anything uses it.

The last function is the loop that all stages share: it asks until the rules are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from pydantic import BaseModel

from data_gen.authors.client import Unreachable
from data_gen.core.calls import Answer, Fault, Reply, Request
from data_gen.core.prompts import ask_again
from data_gen.core.schemas import Mode, Stage, read_answer, without_thoughts
from data_gen.ledger.answers import Answers
from data_gen.ledger.limits import ErrorBudget, StopRun
from data_gen.rules.refusals import refuses

Check: TypeAlias = Callable[[BaseModel], list[Fault]]


class Author(Protocol):
    """What answers requests: a server, the offline author, a model on this machine."""

    async def send(self, request: Request) -> Reply: ...


class Pending(Exception):
    """There is no answer yet; it will come with a batch."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The final answer to a request."""

    value: BaseModel | None  # None when no attempt brought an answer of the right form
    text: str  # as it came
    faults: tuple[Fault, ...]  # what the rules say against it
    again: bool = True  # whether it is worth asking again with the reasons; not after a refusal


Ask: TypeAlias = Callable[[Request, Check], Awaitable[Answered]]
"""What the stages are given: it returns the final answer to a request, and what `check` finds wrong in it."""


class Asker:
    """An `Ask` with a ledger: what has an answer there is not asked again.

    The captioner answers the requests for captions, the author all others. Up to `attempts` answers to one request are
    tried until one has the right form; `budget` limits the calls that bring no usable answer.
    """

    def __init__(
        self,
        answers: Answers,
        author: Author,
        captioner: Author,
        *,
        attempts: int = 4,
        budget: ErrorBudget | None = None,
    ) -> None:
        self._answers, self._author, self._captioner = answers, author, captioner
        self._attempts, self._budget = attempts, budget or ErrorBudget()
        self._under_way: dict[str, asyncio.Future[None]] = {}
        self.stopping: str | None = None  # why no further request may be sent

    async def __call__(self, request: Request, check: Check) -> Answered:
        """Returns the final answer; Unreachable when the server gave none, StopRun when the run ends."""
        while under_way := self._under_way.get(request.key):  # another item asks the very same
            await asyncio.wait([under_way])  # and not the future itself: a cancelled waiter would cancel it
        done = self._under_way[request.key] = asyncio.get_running_loop().create_future()
        try:
            return await self._final(request, check)
        except StopRun as error:
            self.stopping = self.stopping or str(error)
            raise
        finally:
            del self._under_way[request.key]
            done.set_result(None)

    async def _final(self, request: Request, check: Check) -> Answered:
        found = self._answers.find(request.key)
        is_new = False
        while found is None or not is_final(found, self._attempts):
            if self.stopping is not None:
                raise StopRun(self.stopping)
            if found is None:
                await asyncio.wrap_future(self._answers.store_requests([request]))
            try:
                reply = await (self._captioner if request.stage == "caption" else self._author).send(request)
            except Unreachable as error:
                self._budget.bad(str(error))
                raise
            attempt = found.attempt + 1 if found else 1
            found = judge(request.stage, request.mode, reply, attempt=attempt, check=check)
            await asyncio.wrap_future(self._answers.store(request.key, found))
            is_new = True
        answered = await read_stored(self._answers, request, found, check)
        if is_new:
            count_answer(self._budget, found)
        return answered


def is_final(answer: Answer, attempts: int) -> bool:
    """Returns whether a request with this last answer is not to be sent again."""
    return answer.reply.status in ("ok", "rejected") or answer.attempt >= attempts


def count_answer(budget: ErrorBudget, answer: Answer) -> None:
    """Counts a final answer as good or bad; a rejection is about its own request only."""
    reply, faults = answer.reply, answer.verdict or ()
    if reply.status == "ok" and faults and all(fault.rule == "refused" for fault in faults):
        budget.bad(f"refused: {faults[0].reason}")
    elif reply.status == "ok":
        budget.good()
    elif reply.status != "rejected":
        budget.bad(f"{reply.status}: {reply.why}")


def judge(stage: Stage, mode: Mode, reply: Reply, *, attempt: int, check: Check | None) -> Answer:
    """Reads a reply as the stage's answer and applies the rules; without `check` the verdict stays open."""
    reply, value = _read(stage, mode, replace(reply, text=without_thoughts(reply.text)))
    if value is None:
        return Answer(reply, attempt, (Fault("", reply.status, reply.why),))
    return Answer(reply, attempt, None if check is None else tuple(check(value)))


def _read(stage: Stage, mode: Mode, reply: Reply) -> tuple[Reply, BaseModel | None]:
    """Returns a reply with its answer, or with the reason why there is none."""
    try:
        return reply, read_answer(stage, reply.text, mode) if reply.status == "ok" else None
    except ValueError as error:
        if refuses(reply.text):
            return replace(reply, status="refused", why="the model refused to answer"), None
        return replace(reply, status="malformed", why=f"the answer does not have the form asked for ({error})"), None


async def read_stored(answers: Answers, request: Request, answer: Answer, check: Check) -> Answered:
    """Returns a final answer as the stages see it, after judging and storing one that came with a batch."""
    if answer.verdict is None:
        answer = judge(request.stage, request.mode, answer.reply, attempt=answer.attempt, check=check)
        await asyncio.wrap_future(answers.store(request.key, answer))
    reply, value = _read(request.stage, request.mode, answer.reply)
    if value is not None:
        return Answered(value, reply.text, answer.verdict or ())
    again = reply.status not in ("refused", "filtered", "rejected")
    return Answered(None, reply.text, (Fault("", reply.status, reply.why),), again)


@dataclass(frozen=True, slots=True)
class Validated:
    """What a stage brought."""

    parts: dict[str, Any]  # by cell, those that keep the rules
    faults: tuple[Fault, ...]  # of the cells that are missing


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

    `judge` returns an answer's faults, given the parts that are good already, and need not look at those; `parts`
    returns an answer's content by cell. The result has the order of `cells`, whatever became good first.
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
