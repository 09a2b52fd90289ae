"""The ranks of one run: this process's place among them, and what they decide together.

Every rank must call the functions that communicate, or all of them wait.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from medisee.foundation.errors import InputError

Value = TypeVar("Value")
PATIENCE = timedelta(days=1)  # the other ranks wait while the first one encodes the features of a whole dataset


@dataclass(frozen=True, slots=True)
class Place:
    """This process's rank, the number of ranks, and the device that it computes on."""

    rank: int
    world: int
    device: torch.device


def world_from_environment() -> tuple[int, int, int]:
    """Returns (rank, local rank, number of ranks) as a launcher sets them; (0, 0, 1) without one."""
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    return rank, local, int(os.environ.get("WORLD_SIZE", 1))


def join_ranks() -> Place:
    """Connects to the other ranks that the launcher started: NCCL between GPUs, gloo between CPUs."""
    rank, local, world = world_from_environment()
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return Place(rank, world, device)


def wait_for_ranks() -> None:
    """Returns when every rank has called it."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def largest(value: int, place: Place) -> int:
    """Returns the largest of the ranks' values."""
    if place.world == 1:
        return value
    found = torch.tensor(value, device=place.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def gather(value: Value, place: Place) -> list[Value]:
    """Returns every rank's value, in rank order."""
    if place.world == 1:
        return [value]
    found: list[Value | None] = [None] * place.world
    torch.distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def raise_on_all_ranks(problems: Sequence[str], place: Place) -> None:
    """Stops every rank when one has a problem; the first rank reports all problems, the others none."""
    if largest(bool(problems), place):
        everyones = dict.fromkeys(problem for part in gather(list(problems), place) for problem in part)
        raise InputError(everyones if place.rank == 0 else ())


@contextmanager
def errors_on_all_ranks(place: Place) -> Iterator[None]:
    """Stops every rank when one of them raises InputError inside, as `raise_on_all_ranks` does."""
    problems: Sequence[str] = ()
    try:
        yield
    except InputError as error:
        problems = error.problems
    raise_on_all_ranks(problems, place)
