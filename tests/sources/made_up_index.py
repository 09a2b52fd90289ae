"""A made-up index of SA-Med2D-20M: names only, in the form and about the proportions of the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medisee.sources.sa_med2d_index import CLASSES_FILE, INDEX_FILE

ORGANS = ("liver", "spleen", "kidney_left", "kidney_right", "aorta", "pancreas", "stomach", "gallbladder", "esophagus")
UNKNOWN = 999  # a class id that no data set has


@dataclass(frozen=True, slots=True)
class Source:
    """A data set: its share of the images in parts of all parts, the images of a case, and its number of classes."""

    name: str
    modality: str
    parts: int
    per_case: int
    classes: int


def sources() -> list[Source]:
    """Returns 97 data sets: most images are slices of CT and MR volumes, the native 2-D ones have an image a case."""
    ct = [Source(f"CTSet{n:02d}", "ct_00", 40 + n, 120, 3 + n % 12) for n in range(30)]
    mr = [Source(f"MR_Set-{n:02d}", f"mr_{('t1', 't2', 'flair')[n % 3]}", 20 + n, 90, 2 + n % 6) for n in range(30)]
    flat = [
        Source(f"Native.{n:02d}", modality, 4, 1, 1 + n % 3)
        for n in range(34)
        for modality in [("x_ray", "fundus_photography", "endoscopy_00", "dermoscopy_00", "ultrasound_00")[n % 5]]
    ]
    special = [
        Source("Brain_PTM", "mr_t1", 4, 60, 2),
        Source("QUBIQ2020-brain-growth", "mr_00", 2, 1, 1),
        Source("ichallenge_adam_task2", "fundus_photography", 2, 1, 1),
    ]
    return [*ct, *mr, *flat, *special]


def write_index(root: Path, *, images: int, masks: int, slices: int | None = None) -> None:
    """Writes the two JSON files with exactly so many names; `slices` is the number in each volume (default: about 100).

    Class 0 of each data set is a union. One image in 1,000 has a mask of an unknown class, one in 10,000 a name of
    another form, each also once among few.
    """
    extra = np.random.default_rng(0).integers(images, size=masks - images)
    counts = 1 + np.bincount(extra, minlength=images)
    classes = {source.name: class_names(source) for source in sources()}
    (root / CLASSES_FILE).write_text(json.dumps(classes))
    with (root / INDEX_FILE).open("w") as handle:
        for number, (source, stem) in enumerate(_stems(images, slices)):
            codes = _codes(number, source, int(counts[number]))
            files = ", ".join([f'"masks/{stem}--{code}.png"' for code in codes])
            handle.write(f'{", " if number else "{"}"images/{stem}.png": [{files}]')
        handle.write("}")


def class_names(source: Source) -> dict[str, int]:
    """Returns {name: id} of a data set."""
    organs = {
        f"{ORGANS[n % len(ORGANS)]}{'' if n < len(ORGANS) else f'_part_{n}'}": n for n in range(1, source.classes)
    }
    return {"union_of_all": 0, **organs, f"lesion_of_{source.modality}": source.classes}


def _stems(images: int, slices: int | None) -> Iterator[tuple[Source, str]]:
    listed = sources()
    ends = np.cumsum([source.parts for source in listed]) * images // sum(source.parts for source in listed)
    number = 0
    for source, end in zip(listed, ends.tolist(), strict=True):
        for place in range(end - number):
            case, slice_ = divmod(place, min(source.per_case, slices or source.per_case))
            view = "2d_none" if source.per_case == 1 else f"{'xyz'[case % 3]}_{slice_:04d}"
            if (number + place) % 10_000 == 17:
                view = "w_1"
            case_name = f"brain-growth_{case}" if "QUBIQ" in source.name else f"1.2.826.0.1.{case:06d}_a"
            yield source, f"{source.modality}--{source.name}--{case_name}--{view}{place if view == 'w_1' else ''}"
        number = end


def _codes(number: int, source: Source, count: int) -> list[str]:
    codes = []
    for mask in range(count):
        instance, class_id = divmod(mask + number, source.classes + 1)
        codes.append(f"{class_id:04d}_{instance % 1000:03d}")
    if number % 1000 == 5:
        codes[0] = f"{UNKNOWN:04d}_000"
    return codes
