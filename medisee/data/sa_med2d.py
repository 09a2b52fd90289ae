"""SA-Med2D-20M as Records: one class-level target for each class in an image, and a split that never cuts a case.

The data set is a folder, here called root, with `SAMed2D_v1.json`, `SAMed2D_v1_class_mapping_id.json`, `images/` and
`masks/`. The two folders are flat and hold millions of files, so they are never listed: the JSON is the index.
What a file shows is in its name: `<modality>_<submodality>--<dataset>--<case>--<axis>_<slice>`, and a mask adds
`--<class>_<instance>`.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medisee.data.image_name import parse_name
from medisee.data.images import read_image
from medisee.errors import InputError, nearest
from medisee.jsonl import write_lines
from medisee.masks import encode_mask, mask_box
from medisee.records import Record, Target, write_records

INDEX_FILE = "SAMed2D_v1.json"
CLASSES_FILE = "SAMed2D_v1_class_mapping_id.json"

Split = Literal["train", "val", "test"]

_INVERTED = "ichallenge_adam_task2"
_IMAGE = re.compile(r"images/[^/\\]+\.png")
_MASK = re.compile(r"masks/[^/\\]+\.png")
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_SHOWN = 5  # of millions of equal problems


@dataclass(frozen=True, slots=True)
class Reject:
    """A file that was left out: `reason` is one of a few, for counting; `detail` says what was found."""

    file: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` wrote for each split, and how many files it left out for each reason."""

    images: dict[str, int]
    targets: dict[str, int]
    cases: dict[str, int]
    rejects: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image of the index: what its name says, its masks, and the names of each class id of its data set."""

    image: str
    modality: str
    dataset: str
    case: str
    plane: str | None
    masks: list[str]
    classes: dict[int, list[str]]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.image).stem


class SaMed2D:
    """An SA-Med2D-20M folder as a source of Records.

    `union_*` classes (merged regions) are dropped. The instances of a class are joined to one target. Left out and
    told in `rejects`: masks of another shape than their image, empty ones, unknown classes, missing files, and two
    groups of images known to be unusable.

    Attributes:
        root: the folder; the paths in the Records are relative to it.
        rejects: what `records` left out so far, by file.
    """

    def __init__(
        self, root: Path | str, *, min_area: int = 0, datasets: Collection[str] | None = None, workers: int = 1
    ) -> None:
        """Reads the index: of the whole data set in about a minute and 6 GB of memory (scaled up from a fiftieth).

        Args:
            root: the folder with the two JSON files.
            min_area: targets with fewer pixels are left out.
            datasets: take only these; None takes all.
            workers: processes that read masks.

        Raises:
            InputError: a JSON file is missing or is not of the expected layout, or a data set is unknown.
        """
        self.root = Path(root)
        self.rejects: dict[str, Reject] = {}
        self._min_area = min_area
        self._workers = workers
        self._masks = _read_index(self.root / INDEX_FILE)
        self._classes = _read_classes(self.root / CLASSES_FILE)
        self._datasets = None if datasets is None else set(datasets)
        unknown = (self._datasets or set()) - self._classes.keys()
        if unknown:
            raise InputError(
                f"{self.root / CLASSES_FILE}: expected the data set {name!r}, found none of this name."
                f"{nearest(name, self._classes) or ' Remove it from the list.'}"
                for name in sorted(unknown)
            )

    def cases(self) -> set[str]:
        """Returns all cases, each "<dataset>/<case>", from the index alone."""
        return {entry.case for entry in self._entries()}

    def records(self, cases: Collection[str] | None = None) -> Iterator[Record]:
        """Yields a Record for each image with at least one target, in the order of the index.

        Its boxes are half-open xyxy pixels of the image. A target of one file names that file as its mask; one that
        was joined or inverted holds an RLE.

        Args:
            cases: take only these; None takes all.
        """
        entries = (entry for entry in self._entries() if cases is None or entry.case in cases)
        for record, rejects in self._read(entries):
            self.rejects.update((reject.file, reject) for reject in rejects)
            if record:
                yield record

    def _read(self, entries: Iterable[_Entry]) -> Iterator[tuple[Record | None, list[Reject]]]:
        read = partial(_read_entry, self.root, self._min_area)
        if self._workers <= 1:
            yield from map(read, entries)
            return
        # Not forked: a parent that has run torch holds threads and locks that a fork would copy.
        with multiprocessing.get_context("spawn").Pool(self._workers) as pool:
            yield from pool.imap(read, entries, chunksize=32)

    def _entries(self) -> Iterator[_Entry]:
        for image, masks in self._masks.items():
            entry = _parse(image, masks, self._classes)
            if entry is None:
                detail = "expected <modality>--<dataset>--<case>--<axis>_<slice>.png"
                self.rejects[image] = Reject(image, "unreadable name", detail)
            elif self._datasets is None or entry.dataset in self._datasets:
                yield entry


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
) -> Prepared:
    """Writes train.jsonl, val.jsonl, test.jsonl and rejects.jsonl into `out`.

    Nothing is copied: the paths in the manifests are relative to `root`, so open them as `Manifest(path, root=root)`.
    Training and evaluation take this `root` too.

    Args:
        root: the SA-Med2D-20M folder.
        out: a folder, made if need be; the four files in it are replaced.
        seed: of the split, see `split_cases`.
        val: share of the cases of each data set for validation.
        test: share of the cases of each data set for testing.
        min_area: targets with fewer pixels are left out.
        datasets: take only these; None takes all.
        workers: processes that read masks.

    Raises:
        InputError: the folder is not SA-Med2D-20M, the shares are wrong, or no image could be used.
    """
    out = Path(out)
    source = SaMed2D(root, min_area=min_area, datasets=datasets, workers=workers)
    splits = split_cases(source.cases(), seed=seed, val=val, test=test)
    written: dict[str, list[tuple[str, int]]] = {split: [] for split in get_args(Split)}
    for split, notes in written.items():
        records = source.records({case for case, its in splits.items() if its == split})
        write_records(out / f"{split}.jsonl", _noted(tqdm(records, desc=split, unit=" images", disable=None), notes))
    write_lines(out / "rejects.jsonl", source.rejects.values())
    if not any(written.values()):
        raise InputError(
            f"{root}: expected images with targets, found none that can be used; "
            f"{out / 'rejects.jsonl'} says why for each of {len(source.rejects)} files."
        )
    return Prepared(
        images={split: len(notes) for split, notes in written.items()},
        targets={split: sum(targets for _, targets in notes) for split, notes in written.items()},
        cases={split: len({case for case, _ in notes}) for split, notes in written.items()},
        rejects=dict(Counter(reject.reason for reject in source.rejects.values())),
    )


def _noted(records: Iterable[Record], notes: list[tuple[str, int]]) -> Iterator[Record]:
    for record in records:
        notes.append((record.case, len(record.targets)))
        yield record


def _share(count: int, share: float, taken: int) -> int:
    """At least one when anything is asked for, but so few that no other split goes empty."""
    most = count - max(taken, 1) - 1
    return min(max(1, round(count * share)), most) if share and count >= 3 else 0


def _parse(image: str, masks: list[str], classes: dict[str, dict[int, list[str]]]) -> _Entry | None:
    name = parse_name(image)
    if name is None:
        return None
    return _Entry(image, name.modality, name.dataset, name.case, name.plane, masks, classes.get(name.dataset, {}))


def _read_entry(root: Path, min_area: int, entry: _Entry) -> tuple[Record | None, list[Reject]]:
    try:
        with Image.open(root / entry.image) as image:
            shape = image.height, image.width
        unusable = _unusable(root, entry)
    except (*_UNREADABLE, InputError) as error:
        return None, [Reject(entry.image, "unreadable image", str(error))]
    if unusable:
        return None, [Reject(entry.image, "unusable image", unusable)]
    rejects: list[Reject] = []
    targets: list[Target] = []
    for class_id, files in _by_class(entry, rejects):
        read = {file: _read_mask(root, file, shape, inverted=entry.dataset == _INVERTED) for file in files}
        rejects += [found for found in read.values() if isinstance(found, Reject)]
        masks = {file: found for file, found in read.items() if not isinstance(found, Reject)}
        joined = np.logical_or.reduce([np.zeros(shape, np.bool_), *masks.values()])
        if masks and joined.sum() >= min_area:
            targets.append(_target(entry, class_id, list(masks), joined))
        rejects += [Reject(file, "small target", f"{joined.sum()} pixels") for file in masks if joined.sum() < min_area]
    if not targets:
        return None, [*rejects, Reject(entry.image, "no target", f"none of its {len(entry.masks)} masks is usable")]
    record = Record(
        id=entry.stem,
        image=entry.image,
        modality=entry.modality,
        source=entry.dataset,
        case=entry.case,
        targets=tuple(targets),
        plane=entry.plane,
    )
    return record, rejects


def _unusable(root: Path, entry: _Entry) -> str | None:
    if entry.dataset.casefold().startswith("qubiq") and "brain-growth" in entry.case.casefold():
        return "QUBIQ's brain-growth images are not usable"
    if entry.dataset == "Brain_PTM" and np.unique(read_image(root / entry.image)).size <= 2:
        return "the image has at most two grey values: it is a mask"
    return None


def _by_class(entry: _Entry, rejects: list[Reject]) -> list[tuple[int, list[str]]]:
    """Groups the masks by class id; unions are dropped, as they repeat what the other classes hold."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for mask in entry.masks:
        stem, _, code = PurePosixPath(mask).stem.rpartition("--")
        class_id = code.partition("_")[0]
        if stem != entry.stem or not re.fullmatch(r"\d+_\d+", code):
            rejects.append(Reject(mask, "unreadable name", f"expected {entry.stem}--<class>_<instance>.png"))
            continue
        names = entry.classes.get(int(class_id), [])
        if len(names) != 1:
            found = f"{len(names)} names ({', '.join(names)})" if names else "no name"
            rejects.append(Reject(mask, "unknown class", f"{entry.dataset} has {found} for class id {class_id}"))
        elif not names[0].startswith("union_"):
            groups[int(class_id)].append(mask)
    return sorted(groups.items())


def _target(entry: _Entry, class_id: int, files: list[str], mask: NDArray[np.bool_]) -> Target:
    as_it_is = len(files) == 1 and entry.dataset != _INVERTED
    return Target(
        id=f"{class_id:04d}",
        category=entry.classes[class_id][0].replace("_", " "),
        mask=files[0] if as_it_is else encode_mask(mask),
        box=mask_box(mask),
    )


def _read_mask(root: Path, file: str, shape: tuple[int, int], *, inverted: bool) -> NDArray[np.bool_] | Reject:
    try:
        with Image.open(root / file) as image:
            pixels = np.asarray(image)
            if image.mode in ("LA", "PA", "RGBA"):  # opaque alpha says nothing about the foreground
                pixels = pixels[..., :-1]
    except _UNREADABLE as error:
        return Reject(file, "unreadable mask", str(error))
    mask: NDArray[np.bool_] = np.logical_or.reduce(np.atleast_3d(pixels) != 0, axis=-1) ^ inverted
    if mask.shape != shape:
        return Reject(file, "other shape", f"(height, width) is {mask.shape}, its image has {shape}")
    return mask if mask.any() else Reject(file, "empty mask", "no pixel of the foreground")


def _read_json(path: Path, expected: str) -> dict[str, Any]:
    try:
        with path.open("rb") as handle:
            value = json.load(handle)
    except OSError as error:
        raise InputError(
            f"{path}: expected {expected}, found no such file ({error.strerror}); "
            "give the unzipped folder SAMed2Dv1, which holds it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected {expected}, found no valid JSON ({error}); unzip it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected {expected}, found a {type(value).__name__}; use the data set's own file.")
    return value


def _read_index(path: Path) -> dict[str, list[str]]:
    expected = '{"images/<stem>.png": ["masks/<stem>--<class>_<instance>.png", ...]}'
    index = _read_json(path, expected)
    # Names with no folder in them cannot lead out of the root.
    wrong = [
        (image, masks)
        for image, masks in index.items()
        if not _IMAGE.fullmatch(image)
        or not isinstance(masks, list)
        or not all(isinstance(mask, str) and _MASK.fullmatch(mask) for mask in masks)
    ]
    _raise_wrong(path, expected, wrong)
    return index


def _read_classes(path: Path) -> dict[str, dict[int, list[str]]]:
    """Turns {dataset: {name: id}} into {dataset: {id: names}}; an id with two names is told where it is met."""
    expected = '{"<dataset>": {"<class name>": <class id>}}'
    mapping = _read_json(path, expected)
    wrong = [
        (dataset, names)
        for dataset, names in mapping.items()
        if not isinstance(names, dict) or not all(type(class_id) is int for class_id in names.values())
    ]
    _raise_wrong(path, expected, wrong)
    classes: dict[str, dict[int, list[str]]] = {dataset: {} for dataset in mapping}
    for dataset, names in mapping.items():
        for name, class_id in names.items():
            classes[dataset].setdefault(class_id, []).append(name)
    return classes


def _raise_wrong(path: Path, expected: str, wrong: list[tuple[str, Any]]) -> None:
    problems = [f"{path}: expected {expected}, found {key!r}: {value!r:.100}; fix it." for key, value in wrong[:_SHOWN]]
    if len(wrong) > _SHOWN:
        problems.append(f"{path}: and {len(wrong) - _SHOWN} more entries like these.")
    if problems:
        raise InputError(problems)
