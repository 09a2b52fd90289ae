"""Prints what a loader process takes that reads records at random: a process of its own, asked by its tests.

python tests/sources/loader_program.py train.jsonl ROOT 20000
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader, Dataset, Sampler

from medisee.data.mixture import Draw, Mixture
from medisee.records.manifest import Manifest


class TimedRecords(Dataset[tuple[float, int, int]]):
    """Seconds for a record, its targets, and the most bytes that the process which read it ever held."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __getitem__(self, draw: Draw) -> tuple[float, int, int]:  # type: ignore[override]
        """Reads one record."""
        started = time.perf_counter()
        record = self.manifest[draw.index]
        return time.perf_counter() - started, len(record.targets), most_held()


@dataclass(frozen=True, slots=True)
class Draws(Sampler[Draw]):
    """So many draws, made where the workers' parent asks for them, as in training."""

    records: int
    number: int

    def __iter__(self) -> Iterator[Draw]:
        mixture = Mixture([self.records], [1], seed=0)
        return (mixture.draw(number) for number in range(self.number))

    def __len__(self) -> int:
        return self.number


def most_held() -> int:
    """Returns the most bytes of memory that this process ever held."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Draws as training does, in one worker process."""
    path, root, draws = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    started = time.perf_counter()
    manifest = Manifest(path, root)
    opened = time.perf_counter() - started
    loader = DataLoader(TimedRecords(manifest), sampler=Draws(len(manifest), draws), batch_size=None, num_workers=1)
    seconds, targets, held = zip(*loader, strict=True)
    facts = {"records": len(manifest), "opened": opened, "median": statistics.median(seconds)}
    print(json.dumps({**facts, "slowest": max(seconds), "targets": sum(targets), "held": max(held)}))


if __name__ == "__main__":
    main()
