"""Asking: first the ledger, then an author; every answer is judged and stored before anything uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from pydantic import BaseModel

from data_gen.authors.client import Unreachable
from data_gen.core.calls import Answer, Fault, Reply, Request
from data_gen.core.schemas import Mode, Stage, read_answer
from data_gen.ledger.answers import Answers
from data_gen.ledger.limits import ErrorBudget, StopRun

Check: TypeAlias = Callable[[BaseModel], list[Fault]]


class Author(Protocol):
    """What answers requests: a server, the offline author, a model on this machine."""

    async def send(self, request: Request) -> Reply:
        """Answers one request."""
        ...


class Pending(Exception):
    """There is no answer yet; it will come with a batch."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The final answer to a request.

    Attributes:
        value: the answer; None when no attempt brought one of the right form.
        text: as it came.
        faults: what the rules say against it.
        again: whether it is worth asking again with the reasons; not after a refusal.
    """

    value: BaseModel | None
    text: str
    faults: tuple[Fault, ...]
    again: bool = True


Ask: TypeAlias = Callable[[Request, Check], Awaitable[Answered]]
"""What the stages are given: it returns the final answer to a request, and what `check` finds wrong in it."""


class Asker:
    """An `Ask` with a ledger: what has an answer there is not asked again.

    Attributes:
        stopping: why no further request may be sent; None while the run goes on.
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
        """Nothing is asked yet.

        Args:
            answers: of the ledger, where everything is stored.
            author: answers all stages but the captions.
            captioner: answers the captions.
            attempts: how many answers to one request are tried until one has the right form.
            budget: limits the calls that bring no usable answer.
        """
        self._answers, self._author, self._captioner = answers, author, captioner
        self._attempts, self._budget = attempts, budget or ErrorBudget()
        self._under_way: dict[str, asyncio.Future[None]] = {}
        self.stopping: str | None = None

    async def __call__(self, request: Request, check: Check) -> Answered:
        """Returns the final answer to a request.

        Raises:
            Unreachable: the server gave none; the item can be tried again later.
            StopRun: the run ends.
        """
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
            count_reply(self._budget, found.reply)
        return answered


def is_final(answer: Answer, attempts: int) -> bool:
    """Returns whether a request with this last answer is not to be sent again."""
    return answer.reply.status in ("ok", "rejected") or answer.attempt >= attempts


def count_reply(budget: ErrorBudget, reply: Reply) -> None:
    """Counts a final reply as good or bad.

    Raises:
        StopRun: too many are bad.
    """
    if reply.status == "ok":
        budget.good()
    else:
        budget.bad(f"{reply.status}: {reply.why}")


def judge(stage: Stage, mode: Mode, reply: Reply, *, attempt: int, check: Check | None) -> Answer:
    """Reads a reply as the stage's answer and applies the rules; without `check` the verdict stays open."""
    value = None
    if reply.status == "ok":
        try:
            value = read_answer(stage, reply.text, mode)
        except ValueError as error:
            reply = replace(reply, status="malformed", why=f"the answer does not have the form asked for ({error})")
    if value is None:
        return Answer(reply, attempt, (Fault("", reply.status, reply.why),))
    return Answer(reply, attempt, None if check is None else tuple(check(value)))


async def read_stored(answers: Answers, request: Request, answer: Answer, check: Check) -> Answered:
    """Returns a final answer as the stages see it, after judging and storing one that came with a batch."""
    if answer.verdict is None:
        answer = judge(request.stage, request.mode, answer.reply, attempt=answer.attempt, check=check)
        await asyncio.wrap_future(answers.store(request.key, answer))
    reply, faults = answer.reply, answer.verdict or ()
    if reply.status != "ok":
        return Answered(None, reply.text, faults, again=reply.status not in ("refused", "filtered", "rejected"))
    return Answered(read_answer(request.stage, reply.text, request.mode), reply.text, faults)
