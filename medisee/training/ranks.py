"""The ranks of one run: this process's place among them, and what they decide together.

Every rank must call the functions that communicate, or all of them wait.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch.distributed.rendezvous import rendezvous

from medisee.foundation.errors import InputError, first_line

Value = TypeVar("Value")
MEETING = timedelta(minutes=30)  # until all ranks have started
PATIENCE = timedelta(days=1)  # the other ranks wait while the first one encodes the features of a whole dataset


@dataclass(frozen=True, slots=True)
class Place:
    """This process's rank, the number of ranks, and the device that it computes on."""

    rank: int
    world: int
    device: torch.device


def world_from_environment() -> tuple[int, int, int]:
    """Returns (rank, local rank, number of ranks) as a launcher sets them; (0, 0, 1) without one."""
    given = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    numbers = [int(value) if value.isdecimal() else -1 for value in given.values()]
    rank, local, world = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        **dict(zip(given, numbers, strict=True)),
    }.values()
    partly = len(given) < 3 and (world > 1 or "LOCAL_RANK" in given)
    if partly or min(numbers, default=0) < 0 or rank >= world:
        raise InputError(
            f"environment {' '.join(f'{name}={value}' for name, value in given.items())}: a launcher sets RANK below "
            f"WORLD_SIZE, and LOCAL_RANK; start with one, or for a single process: unset {' '.join(given)}."
        )
    return rank, local, world


def join_ranks() -> Place:
    """Connects to the other ranks that the launcher started: NCCL between GPUs, gloo between CPUs."""
    rank, local, world = world_from_environment()
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if cuda and local >= torch.cuda.device_count():
        raise InputError(f"LOCAL_RANK={local}: only {torch.cuda.device_count()} GPUs here; start fewer ranks.")
    if "LOCAL_RANK" in os.environ and find_spec("deepspeed") is None:
        raise InputError("several ranks need deepspeed; run pip install -e '.[train]', or start without a launcher.")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        _connect(rank, world, "nccl" if cuda else "gloo")
    return Place(rank, world, device)


def _connect(rank: int, world: int, backend: str) -> None:
    place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if rank == 0:
        print(
            f"waiting for {world} ranks at {place} (for a single process: unset RANK LOCAL_RANK WORLD_SIZE)", flush=True
        )
    try:
        store, *_ = next(rendezvous("env://", rank, world, timeout=MEETING))
        store.set_timeout(PATIENCE)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"rank {rank} of {world} cannot reach the others at MASTER_ADDR:MASTER_PORT {place} ({first_line(error):.200});"
            " start as many ranks as WORLD_SIZE says, or set another MASTER_PORT."
        ) from error


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
