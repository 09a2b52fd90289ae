"""A run: all items through their stages, then the pass over near-duplicates. Live, or in waves of the Batch API."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from data_gen.authors.client import Unreachable
from data_gen.core.items import Item
from data_gen.core.recipe import Recipe
from data_gen.core.workers import work_through
from data_gen.ledger.ledger import Ledger
from data_gen.ledger.limits import StopRun
from data_gen.pipeline.asking import Ask, Asker, Pending
from data_gen.pipeline.batch import BatchServer, Waves
from data_gen.pipeline.deduplicate import deduplicate
from data_gen.pipeline.stages import make

_ROUNDS = 3  # over items that the server did not answer for
_EMPTY = 3  # batches without any answer
_GRACE = 20.0  # seconds that calls under way are given after the first signal
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Job:
    """What a run works on: the ledger, the recipe, the first `limit` items, and how many of them at once."""

    ledger: Ledger
    recipe: Recipe
    limit: int | None
    workers: int


class Signals:
    """Ends a run at SIGINT or SIGTERM: no further call begins, and those under way get some time to finish. After that,
    or at a second signal, the run's task is cancelled.

    Attributes:
        number: of the signal that came; None while there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def handled(self, asker: Asker) -> Iterator[None]:
        """Handles the signals while the run's task is in this block; `asker` then begins no further call."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def handle(number: int) -> None:
            if self.number is not None:
                task.cancel()
                return
            self.number = number
            asker.stopping = "interrupted; run again to go on"
            loop.call_later(_GRACE, task.cancel)

        for number in _SIGNALS:
            loop.add_signal_handler(number, handle, number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


async def run_live(job: Job, asker: Asker) -> None:
    """Finishes all items: the calls of one pass follow each other, many items are worked on at once.

    Raises:
        StopRun: the run ended before that; all answers are in the ledger.
    """
    for _ in range(_ROUNDS):
        left, why = await _pass(job, asker)
        if not left:
            break
    else:
        raise StopRun(f"stopped: {left:,} items had no answer from the server ({why}); run again to go on.")
    try:
        await deduplicate(job.ledger, job.recipe, asker, workers=job.workers)
    except Unreachable as error:
        raise StopRun(f"stopped: the server does not answer ({error}); run again to go on.") from error


async def run_waves(job: Job, waves: Waves, ask: Ask, server: BatchServer) -> None:
    """Finishes all items in waves of the Batch API.

    Args:
        job: what to work on.
        waves: collects the requests.
        ask: asks `waves`, except for stages that are answered at once.
        server: where the waves go.

    Raises:
        StopRun: the run ended before that; the next one collects what was submitted.
    """
    await server.collect()
    empty = 0
    while empty < _EMPTY:
        left, why = await _pass(job, ask)
        if not left:
            try:
                await deduplicate(job.ledger, job.recipe, ask, workers=1)
                return
            except Pending:
                pass
        keys = waves.take()
        if not keys:
            raise StopRun(f"stopped: {left:,} items had no answer from the server ({why}); run again to go on.")
        await server.submit(keys)
        empty += not await server.collect()
    raise StopRun(f"stopped: {_EMPTY} batches brought no answer; look at them, then run again to go on.")


async def _pass(job: Job, ask: Ask) -> tuple[int, str]:
    """Works on all items without an outcome; returns how many still have none, and why."""
    style = job.recipe.style
    open_count, count = job.ledger.count_open(style, job.limit)
    left, why = 0, ""
    with tqdm(total=count, initial=count - open_count, unit="image", disable=None, desc="making pairs") as bar:
        made = dropped = 0

        async def work(item: Item) -> None:
            nonlocal left, why, made, dropped
            try:
                outcome = await make(item, job.recipe, ask)
            except (Unreachable, Pending) as error:
                left, why = left + 1, str(error)
                return
            await asyncio.wrap_future(job.ledger.finish(item.id, style, outcome.pairs, outcome.drops))
            made, dropped = made + len(outcome.pairs), dropped + len(outcome.drops)
            bar.update()
            bar.set_postfix(pairs=made, dropped=dropped, refresh=False)

        await work_through(job.ledger.open_items(style, job.limit), work, job.workers)
    return left, why
