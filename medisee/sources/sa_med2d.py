"""SA-Med2D-20M as Records: one class-level target for each class in an image, and a split that never cuts a case.

The data set is a folder, here called root, with `SAMed2D_v1.json`, `SAMed2D_v1_class_mapping_id.json`, `images/` and
`masks/`. The two folders are flat and hold millions of files, so they are never listed: the JSON is the index.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medisee.foundation.errors import InputError
from medisee.foundation.output import check_output
from medisee.records.jsonl import line_writer
from medisee.records.offsets import file_stamp, keep_offsets
from medisee.records.records import SPLITS, Split, record_writer
from medisee.sources.sa_med2d_index import Entry, Index, Reject
from medisee.sources.sa_med2d_record import Found, by_names, by_pixels
from medisee.sources.subset import Chosen, Subset, check_categories

_CHUNK = 32  # images that a process reads at a time
_AHEAD = 4  # chunks for each process, so that none waits and none piles up


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` wrote for each split, and how many files it left out for each reason."""

    images: dict[str, int]
    targets: dict[str, int]
    cases: dict[str, int]
    rejects: dict[str, int]


def read_images(
    root: Path, entries: Iterator[Entry | Reject], *, min_area: int = 0, workers: int = 1, index_only: bool = False
) -> Iterator[Found]:
    """Yields the Record of each image and the files that are left out, in the order of the index.

    Memory does not grow with the images. See `prepare` for the arguments.
    """
    if index_only:
        yield from map(by_names, entries)
        return
    if workers <= 1:
        yield from (by_pixels(root, min_area, entry) for entry in entries)
        return
    # Not forked: a parent that has run torch holds threads and locks that a fork would copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: deque[Future[list[Found]]] = deque()
        while chunk := list(islice(entries, _CHUNK)):
            waiting.append(pool.submit(_read_chunk, root, min_area, chunk))
            if len(waiting) >= _AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _read_chunk(root: Path, min_area: int, entries: list[Entry | Reject]) -> list[Found]:
    return [by_pixels(root, min_area, entry) for entry in entries]


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


def prepare(
    root: Path | str,
    out: Path | str,
    *,
    seed: int = 0,
    val: float = 0.1,
    test: float = 0.1,
    min_area: int = 0,
    datasets: Collection[str] | None = None,
    workers: int = 1,
    subset: Subset | None = None,
    index_only: bool = False,
) -> Prepared:
    """Writes train.jsonl, val.jsonl, test.jsonl and rejects.jsonl into `out`.

    Nothing is copied: the paths in the manifests are relative to `root`, so open them as `Manifest(path, root=root)`.
    `union_*` classes (merged regions) are dropped. Left out and reported are masks of another shape than their image,
    empty ones, unknown classes, missing files, and two groups of images known to be unusable.

    Args:
        root: the SA-Med2D-20M folder.
        out: a folder, which may not exist yet; the four files in it are replaced.
        seed: of the split, see `split_cases`.
        val: share of the cases of each data set for validation.
        test: share for testing.
        min_area: targets with fewer pixels are left out.
        datasets: take only these; None takes all.
        workers: processes that read masks.
        subset: take only the targets that it chooses, over all splits together; None takes all.
        index_only: open no image and no mask; what only pixels tell is then found when a mask is used.
    """
    root, out = Path(root), Path(out)
    check_output(out, inputs={"the root": root})
    if index_only and min_area:
        raise InputError(f"min_area={min_area}: is counted in pixels, which index_only does not read; leave one out.")
    index = Index(root, datasets)
    splits = split_cases(index.cases(), seed=seed, val=val, test=test)
    read = partial(read_images, root, min_area=min_area, workers=workers, index_only=index_only)
    entries = index.entries()
    if subset is not None:
        check_categories(subset, index.categories())
        # Of a category with more than enough targets few masks are read: those that would be chosen if they are usable.
        chosen = Chosen(subset)
        for found in tqdm(read(_wanted(entries, chosen)), desc="choose", unit=" images", disable=None):
            if found.record is not None:
                for target in found.record.targets:
                    chosen.add(target.category, f"{found.record.id}/{target.id}")
        entries = _wanted(index.entries(), chosen)
    prepared = _write(read(entries), splits, out)
    if not any(prepared.images.values()):
        raise InputError(
            f"{root}: expected images with targets, found none that can be used; "
            f"{out / 'rejects.jsonl'} says why for each of {sum(prepared.rejects.values())} files."
        )
    return prepared


def _write(found: Iterable[Found], splits: dict[str, Split], out: Path) -> Prepared:
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


def _wanted(entries: Iterable[Entry | Reject], chosen: Chosen) -> Iterator[Entry | Reject]:
    """Yields the classes of each image that may be chosen, and no image without any."""
    for entry in entries:
        if isinstance(entry, Reject) or not entry.classes:
            yield entry
            continue
        if classes := [one for one in entry.classes if chosen.wants(one.category, f"{entry.stem}/{one.target}")]:
            yield replace(entry, classes=tuple(classes), masks=sum(len(one.files) for one in classes))
        else:
            yield from entry.rejects


def _share(count: int, share: float, taken: int) -> int:
    """Returns at least one if the share is not 0, but never so many that another split is empty."""
    most = count - max(taken, 1) - 1
    return min(max(1, round(count * share)), most) if share and count >= 3 else 0
