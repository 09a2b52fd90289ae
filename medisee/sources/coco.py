"""COCO annotations as Records: one target for each category in an image, the union of its instances."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import StrictInt

from medisee.foundation.errors import InputError
from medisee.foundation.files import inside
from medisee.foundation.json_files import read_json
from medisee.records.images import image_size
from medisee.records.jsonl import Text, read_object
from medisee.records.masks import decode_mask, encode_mask, mask_box, segmentation_rle
from medisee.records.records import Record, Target
from medisee.sources.splits import Found, Reject


@dataclass(frozen=True, slots=True)
class _Image:
    id: StrictInt
    file_name: Text


@dataclass(frozen=True, slots=True)
class _Category:
    id: StrictInt
    name: Text


@dataclass(frozen=True, slots=True)
class _Annotation:
    image_id: StrictInt
    category_id: StrictInt
    segmentation: Any  # polygons, or an RLE in one of two forms


def coco_records(
    annotations: Path, images: Path, *, modality: str, source: str, case: re.Pattern[str] | None = None
) -> Iterator[Found]:
    """Yields a Record for each image that has annotations; paths are relative to `images`.

    InputError names everything in the file that is wrong; an image that is missing, or whose annotations do not fit it,
    is a Reject.
    """
    content = read_json(annotations, "COCO annotations: {images, annotations, categories}")
    problems: list[str] = []

    def read(noun: type, key: str) -> list[Any]:
        values = content.get(key)
        if not isinstance(values, list):
            problems.append(f"{annotations}: {key!r} is not a list; expected COCO annotations; export them again.")
            return []
        found = (read_object(noun, value, f"{annotations}: {key}[{n}]", problems) for n, value in enumerate(values))
        return [one for one in found if one is not None]

    pictures: list[_Image] = read(_Image, "images")
    names = {one.id: one.name for one in read(_Category, "categories")}
    shapes: defaultdict[int, dict[str, list[Any]]] = defaultdict(dict)
    known = {one.id for one in pictures}
    for place, one in enumerate(read(_Annotation, "annotations")):
        if one.image_id not in known or one.category_id not in names:
            problems.append(
                f"{annotations}: annotations[{place}] has image {one.image_id} and category {one.category_id}; expected "
                "those of the file's images and categories; correct it."
            )
        else:
            shapes[one.image_id].setdefault(names[one.category_id], []).append(one.segmentation)
    if problems:
        raise InputError(problems)
    for picture in pictures:
        if picture.id in shapes:
            yield _found(picture, shapes[picture.id], annotations, images, modality, source, case)
        else:
            yield Found(None, (Reject(picture.file_name, "image without annotations", ""),))


def _found(
    picture: _Image,
    shapes: dict[str, list[Any]],
    annotations: Path,
    images: Path,
    modality: str,
    source: str,
    case: re.Pattern[str] | None,
) -> Found:
    name = picture.file_name
    try:
        height, width = image_size(inside(images, name, str(annotations)))
    except InputError as error:
        return Found(None, (Reject(name, "unreadable image", str(error)),))
    targets: list[Target] = []
    rejects: list[Reject] = []
    for category, segmentations in shapes.items():
        try:
            masks = [decode_mask(segmentation_rle(one, (height, width))) for one in segmentations]
            mask = np.logical_or.reduce(masks)
        except (InputError, ValueError) as error:
            rejects.append(Reject(name, "unusable mask", f"{category}: {error}"))
            continue
        if mask.any():
            targets.append(Target(id=category, category=category, mask=encode_mask(mask), box=mask_box(mask)))
        else:
            rejects.append(Reject(name, "empty mask", category))
    if not targets:
        return Found(None, (*rejects, Reject(name, "no target", "none of its masks is usable")))
    patient = (case.search(name) if case else None) or re.fullmatch(".*", name, re.DOTALL)
    assert patient is not None
    record = Record(
        id=name,
        image=name,
        modality=modality,
        source=source,
        case=f"{source}/{patient[patient.re.groups and 1]}",
        targets=tuple(targets),
    )
    return Found(record, tuple(rejects))
