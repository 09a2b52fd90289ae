"""Runs many jobs, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

Job = TypeVar("Job")


async def work_through(jobs: Iterator[Job], work: Callable[[Job], Awaitable[None]], workers: int) -> None:
    """Runs all jobs, `workers` at a time; the next is drawn when a worker is free, so that few are in memory.

    After an exception no further job begins; those under way finish, then the first exception is raised.
    """
    errors: list[BaseException] = []

    async def worker() -> None:
        for job in jobs:
            if errors:
                return
            try:
                await work(job)
            except BaseException as error:
                errors.append(error)

    await asyncio.gather(*(worker() for _ in range(workers)))
    if errors:
        raise errors[0]
