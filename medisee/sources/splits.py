"""What an importer finds, image by image, and the manifests that it writes: split by case, rejects listed."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medisee.foundation.errors import InputError, shortened
from medisee.records.jsonl import line_writer
from medisee.records.offsets import file_stamp, keep_offsets
from medisee.records.records import SPLITS, Record, Split, record_writer


@dataclass(frozen=True, slots=True)
class Reject:
    """A file that was left out: `reason` is one of a few, for counting; `detail` is what was found."""

    file: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Found:
    """What an image gave: its Record, None where no target is left, and the files that were left out."""

    record: Record | None
    rejects: tuple[Reject, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `write_split` wrote for each split, and how many files it left out for each reason."""

    images: dict[str, int]
    targets: dict[str, int]
    cases: dict[str, int]
    rejects: dict[str, int]


def case_of(path: str, pattern: re.Pattern[str] | None, source: str) -> str:
    """Returns the patient that a picture's path names: what `pattern` finds (its first group), else the path itself."""
    if pattern is None:
        return f"{source}/{path.rpartition('.')[0] or path}"
    if (found := pattern.search(path)) is None:
        raise InputError(f"{path}: --case {pattern.pattern!r} finds no patient in this path; correct the expression.")
    return f"{source}/{found[1] if pattern.groups else found[0]}"


def write_found(found: Iterable[Found], out: Path, *, val: float, test: float, seed: int) -> Prepared:
    """Splits by case what an importer finds, and writes it; see `split_cases` and `write_split`."""
    every = list(tqdm(found, desc="read", unit=" images", disable=None))
    cases = [one.record.case for one in every if one.record is not None]
    if not cases:
        reasons = [f"{reject.file}: {reject.reason}. {reject.detail}" for one in every for reject in one.rejects]
        raise InputError(shortened(["no image with a target that can be used", *reasons], "and", most=6))
    return write_split(every, split_cases(cases, seed=seed, val=val, test=test), out)


def split_cases(cases: Iterable[str], *, seed: int = 0, val: float = 0.1, test: float = 0.1) -> dict[str, Split]:
    """Puts each case in train, val or test, always the same for a seed.

    Within each data set (the part before the "/") the cases are ranked by a hash of seed and case, and the ranked list
    is cut. So the shares are exact, a data set of three or more cases is in all three splits (unless a share is 0), a
    smaller one is in train only, and adding a data set moves no case of another.
    """
    if val < 0 or test < 0 or val + test >= 1:
        raise InputError(f"val={val}, test={test}: expected shares >= 0 with a sum below 1; lower them.")
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for case in set(cases):
        groups[case.partition("/")[0]].append(case)
    splits: dict[str, Split] = {}
    for group in groups.values():
        ranked = sorted(group, key=lambda case: hashlib.sha256(f"{seed}:{case}".encode()).digest())
        n_test = _share(len(ranked), test, taken=0)
        n_val = _share(len(ranked), val, taken=n_test)
        for rank, case in enumerate(ranked):
            splits[case] = "test" if rank < n_test else "val" if rank < n_test + n_val else "train"
    return splits


def write_split(found: Iterable[Found], splits: Mapping[str, Split], out: Path) -> Prepared:
    """Writes train.jsonl, val.jsonl, test.jsonl and rejects.jsonl into `out`, one image at a time."""
    images, targets, rejects = Counter[str](), Counter[str](), Counter[str]()
    cases: dict[Split, set[str]] = {split: set() for split in SPLITS}
    with ExitStack() as files:
        writers = {split: files.enter_context(record_writer(out / f"{split}.jsonl")) for split in cases}
        left_out = files.enter_context(line_writer(out / "rejects.jsonl"))
        for one in tqdm(found, desc="write", unit=" images", disable=None):
            for reject in one.rejects:
                left_out.write(reject)
                rejects[reject.reason] += 1
            if one.record is None:
                continue
            split = splits[one.record.case]
            writers[split].write(one.record)
            images[split] += 1
            targets[split] += len(one.record.targets)
            cases[split].add(one.record.case)
    for split, writer in writers.items():
        path = out / f"{split}.jsonl"
        keep_offsets(path, np.array(writer.offsets, dtype=np.int64), file_stamp(path))
    return Prepared(
        images={split: images[split] for split in cases},
        targets={split: targets[split] for split in cases},
        cases={split: len(its) for split, its in cases.items()},
        rejects=dict(rejects),
    )


def _share(count: int, share: float, taken: int) -> int:
    """Returns at least one if the share is not 0, but never so many that another split is empty."""
    most = count - max(taken, 1) - 1
    return min(max(1, round(count * share)), most) if share and count >= 3 else 0
