"""COCO annotations as Records: one target for each category in an image, the union of its instances."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import StrictInt, TypeAdapter, ValidationError

from medisee.foundation.errors import InputError
from medisee.foundation.files import inside
from medisee.foundation.json_files import read_json
from medisee.records.images import image_size
from medisee.records.jsonl import Text, read_object
from medisee.records.masks import Rle, SoundRle, check_size, decode_mask, encode_mask, mask_box
from medisee.records.records import Record, Target
from medisee.sources.splits import Found, Reject, case_of

_RLE: TypeAdapter[Rle] = TypeAdapter(SoundRle)


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


@dataclass(frozen=True, slots=True)
class _About:
    """What is the same for all images."""

    images: Path
    modality: str
    source: str
    case: re.Pattern[str] | None


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
            yield _found(picture, shapes[picture.id], annotations, _About(images, modality, source, case))
        else:
            yield Found(None, (Reject(picture.file_name, "image without annotations", ""),))


def _found(picture: _Image, shapes: Mapping[str, list[Any]], annotations: Path, about: _About) -> Found:
    name = picture.file_name
    try:
        size = image_size(inside(about.images, name, str(annotations)), name)
    except InputError as error:
        return Found(None, (Reject(name, "unreadable image", str(error)),))
    targets: list[Target] = []
    rejects: list[Reject] = []
    for category, segmentations in shapes.items():
        try:
            mask = np.logical_or.reduce([_mask(one, size) for one in segmentations])
        except InputError as error:
            rejects.append(Reject(name, "unusable mask", f"{category}: {error}"))
            continue
        if mask.any():
            targets.append(Target(id=category, category=category, mask=encode_mask(mask), box=mask_box(mask)))
        else:
            rejects.append(Reject(name, "empty mask", category))
    if not targets:
        return Found(None, (*rejects, Reject(name, "no target", "none of its masks is usable")))
    case = case_of(name, about.case, about.source)
    record = Record(
        id=name, image=name, modality=about.modality, source=about.source, case=case, targets=tuple(targets)
    )
    return Found(record, tuple(rejects))


def _mask(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    value = {"size": list(size), "segmentation": segmentation} if isinstance(segmentation, list) else segmentation
    try:
        rle = _RLE.validate_python(value)
    except ValidationError as error:
        raise InputError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    check_size(rle.size, size, "the mask")
    return decode_mask(rle)
