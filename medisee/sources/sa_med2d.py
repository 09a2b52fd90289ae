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
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medisee.foundation.errors import InputError
from medisee.records.jsonl import line_writer
from medisee.records.offsets import file_stamp, keep_offsets
from medisee.records.records import SPLITS, Record, Split, record_writer
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


class SaMed2D:
    """An SA-Med2D-20M folder as a source of Records, whose index is streamed: memory does not grow with its images.

    `union_*` classes (merged regions) are dropped. The instances of a class are joined to one target. Left out and
    told: masks of another shape than their image, empty ones, unknown classes, missing files, and two groups of
    images known to be unusable.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        min_area: int = 0,
        datasets: Collection[str] | None = None,
        workers: int = 1,
        index_only: bool = False,
    ) -> None:
        """Reads the names of the classes, and sees that the index is there.

        Args:
            root: the folder with the two JSON files.
            min_area: targets with fewer pixels are left out.
            datasets: take only these; None takes all.
            workers: processes that read masks.
            index_only: open no image and no mask; what only pixels tell is then found out when a mask is used.

        Raises:
            InputError: a file is missing, that of the classes is not of the expected layout, a data set is unknown, or
                an area is asked for without pixels.
        """
        if index_only and min_area:
            raise InputError(
                f"min_area={min_area}: is counted in pixels, which index_only does not read; leave one out."
            )
        self._root = Path(root)
        self._min_area, self._workers, self._index_only = min_area, workers, index_only
        self._index = Index(self._root, datasets)

    def cases(self) -> set[str]:
        """Returns all cases, each "<dataset>/<case>", from the index alone.

        Raises:
            InputError: the index is missing or is not of the expected layout; the first problems are named.
        """
        return self._index.cases()

    def choose(self, subset: Subset) -> Chosen:
        """Returns which targets a subset holds.

        Of a category that has more than enough, few masks are read: those whose rank is so low that they would be
        chosen, were they usable.

        Raises:
            InputError: the index is not of the expected layout, or a category of the subset is unknown.
        """
        check_categories(subset, self._index.categories())
        chosen = Chosen(subset)
        for found in tqdm(
            self._read(_wanted(self._index.entries(), chosen)), desc="choose", unit=" images", disable=None
        ):
            if found.record is None:
                continue
            for target in found.record.targets:
                chosen.add(target.category, _name(found.record.id, target.id))
        return chosen

    def read(self, chosen: Chosen | None = None) -> Iterator[Found]:
        """Yields what each image gives, in the order of the index.

        Boxes are half-open xyxy pixels of the image.

        Args:
            chosen: take only these targets; None takes all.
        """
        entries = self._index.entries()
        return self._read(entries if chosen is None else _wanted(entries, chosen))

    def records(self) -> Iterator[Record]:
        """Yields the Record of each image with at least one target."""
        return (found.record for found in self.read() if found.record)

    def _read(self, entries: Iterator[Entry | Reject]) -> Iterator[Found]:
        if self._index_only:
            yield from map(by_names, entries)
            return
        if self._workers <= 1:
            yield from (by_pixels(self._root, self._min_area, entry) for entry in entries)
            return
        # Not forked: a parent that has run torch holds threads and locks that a fork would copy.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._workers, mp_context=context) as pool:
            waiting: deque[Future[list[Found]]] = deque()
            while chunk := list(islice(entries, _CHUNK)):
                waiting.append(pool.submit(_read_chunk, self._root, self._min_area, chunk))
                if len(waiting) >= _AHEAD * self._workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()


def split_cases(cases: Iterable[str], *, seed: int = 0, val: float = 0.1, test: float = 0.1) -> dict[str, Split]:
    """Puts each case in train, val or test, always the same for a seed.

    Within each data set (what is before the "/") the cases are ranked by a hash of seed and case, and the ranked list
    is cut. So the shares are exact, every data set of three cases or more is in all three splits (unless its share
    is 0), one of fewer is for training only, and adding a data set moves no case of another.

    Raises:
        InputError: a share is negative, or train would get nothing.
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
    Training and evaluation take this `root` too. Where the lines of a large manifest begin is kept beside it, so that
    it opens at once.

    Args:
        root: the SA-Med2D-20M folder.
        out: a folder, made if need be; the four files in it are replaced.
        seed: of the split, see `split_cases`.
        val: share of the cases of each data set for validation.
        test: share of the cases of each data set for testing.
        min_area: targets with fewer pixels are left out.
        datasets: take only these; None takes all.
        workers: processes that read masks.
        subset: take only the targets that it chooses, over all splits together; None takes all.
        index_only: open no image and no mask.

    Raises:
        InputError: the folder is not SA-Med2D-20M, the shares or the subset are wrong, or no image could be used.
    """
    out = Path(out)
    source = SaMed2D(root, min_area=min_area, datasets=datasets, workers=workers, index_only=index_only)
    splits = split_cases(source.cases(), seed=seed, val=val, test=test)
    prepared = _write(source.read(source.choose(subset) if subset else None), splits, out)
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
    """Yields what may be chosen of each image; one of which nothing may be is not read."""
    for entry in entries:
        if isinstance(entry, Reject) or not entry.classes:
            yield entry
            continue
        classes = [one for one in entry.classes if chosen.wants(one.category, _name(entry.stem, one.target))]
        if classes:
            yield replace(entry, classes=tuple(classes), masks=sum(len(one.files) for one in classes))
        else:
            yield from entry.rejects


def _name(record: str, target: str) -> str:
    return f"{record}/{target}"


def _read_chunk(root: Path, min_area: int, entries: list[Entry | Reject]) -> list[Found]:
    return [by_pixels(root, min_area, entry) for entry in entries]


def _share(count: int, share: float, taken: int) -> int:
    """At least one when anything is asked for, but so few that no other split goes empty."""
    most = count - max(taken, 1) - 1
    return min(max(1, round(count * share)), most) if share and count >= 3 else 0
