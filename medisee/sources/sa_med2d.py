"""SA-Med2D-20M as Records: one class-level target for each class in an image, and a split that never cuts a case.

The data set is a folder, here called root, with `SAMed2D_v1.json`, `SAMed2D_v1_class_mapping_id.json`, `images/` and
`masks/`. The two folders are flat and hold millions of files, so they are never listed: the JSON is the index.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from medisee.foundation.errors import InputError
from medisee.foundation.output import check_output
from medisee.sources.sa_med2d_index import Entry, Index
from medisee.sources.sa_med2d_record import by_names, by_pixels
from medisee.sources.splits import Found, Prepared, Reject, split_cases, write_split
from medisee.sources.subset import Chosen, Subset, check_categories

_CHUNK = 32  # images that a process reads at a time
_AHEAD = 4  # chunks for each process, so that none waits and none piles up


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
    prepared = write_split(read(entries), splits, out)
    if not any(prepared.images.values()):
        raise InputError(
            f"{root}: expected images with targets, found none that can be used; "
            f"{out / 'rejects.jsonl'} says why for each of {sum(prepared.rejects.values())} files."
        )
    return prepared


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
