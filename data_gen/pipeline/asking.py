"""Asking: the ledger first, then whoever answers; what comes back is judged and stored before anybody sees it."""

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
    """Whoever answers requests: a server, the offline author, a model on this machine."""

    async def send(self, request: Request) -> Reply:
        """Answers one request."""
        ...


class Pending(Exception):
    """The answer is not there yet; it will come with a batch."""


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


class Ask(Protocol):
    """What the stages are given: it returns the final answer to a request, and what `check` finds wrong in it."""

    def __call__(self, request: Request, check: Check) -> Awaitable[Answered]: ...


class Asker:
    """An `Ask` on a ledger: nothing that has an answer there is asked again.

    Attributes:
        stopping: why nothing is to be asked any more; None while the run goes on.
        asked: how many answers came in this run.
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
        """Prepares to ask.

        Args:
            answers: of the ledger, where all is stored.
            author: answers all stages but the captions.
            captioner: answers those.
            attempts: how many answers to one and the same request are tried until one has the right form.
            budget: of calls that bring nothing.
        """
        self._answers, self._author, self._captioner = answers, author, captioner
        self._attempts, self._budget = attempts, budget or ErrorBudget()
        self._under_way: dict[str, asyncio.Future[None]] = {}
        self.stopping: str | None = None
        self.asked = 0

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
            return answered(request, await self._final(request, check))
        except StopRun as error:
            self.stopping = self.stopping or str(error)
            raise
        finally:
            del self._under_way[request.key]
            done.set_result(None)

    async def _final(self, request: Request, check: Check) -> Answer:
        found = self._answers.find(request.key)
        is_new = False
        while found is None or (not is_final(found, self._attempts)):
            if self.stopping is not None:
                raise StopRun(self.stopping)
            if found is None:
                await asyncio.wrap_future(self._answers.store_requests([request]))
            reply = await self._send(request)
            found = judge(request.stage, request.mode, reply, attempt=(found.attempt if found else 0) + 1, check=check)
            await asyncio.wrap_future(self._answers.store(request.key, found))
            self.asked += 1
            is_new = True
        if found.verdict is None:  # it came with a batch
            found = judge(request.stage, request.mode, found.reply, attempt=found.attempt, check=check)
            await asyncio.wrap_future(self._answers.store(request.key, found))
        if is_new:
            self._note(found.reply)
        return found

    async def _send(self, request: Request) -> Reply:
        try:
            return await (self._captioner if request.stage == "caption" else self._author).send(request)
        except Unreachable as error:
            self._budget.bad(str(error))
            raise

    def _note(self, reply: Reply) -> None:
        if reply.status == "ok":
            self._budget.good()
        else:
            self._budget.bad(f"{reply.status}: {reply.why}")


def is_final(answer: Answer, attempts: int) -> bool:
    """Returns whether a request with this last answer is not to be sent again."""
    return answer.reply.status in ("ok", "rejected") or answer.attempt >= attempts


def judge(stage: Stage, mode: Mode, reply: Reply, *, attempt: int, check: Check | None) -> Answer:
    """Reads a reply as the stage's answer and lets the rules look at it; without `check` the verdict stays open."""
    value = None
    if reply.status == "ok":
        try:
            value = read_answer(stage, reply.text, mode)
        except ValueError as error:
            reply = replace(reply, status="malformed", why=f"the answer has not the form asked for ({error})")
    if value is None:
        return Answer(reply, attempt, (Fault("", reply.status, reply.why),))
    return Answer(reply, attempt, None if check is None else tuple(check(value)))


def answered(request: Request, answer: Answer) -> Answered:
    """Returns a judged answer as the stages see it."""
    reply = answer.reply
    faults = answer.verdict or ()
    if reply.status != "ok":
        return Answered(None, reply.text, faults, again=reply.status not in ("refused", "filtered", "rejected"))
    return Answered(read_answer(request.stage, reply.text, request.mode), reply.text, faults)
