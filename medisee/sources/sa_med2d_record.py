"""An image of SA-Med2D-20M as a Record: by its names alone, or by its pixels and those of its masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medisee.foundation.errors import InputError
from medisee.records.images import image_size, read_image
from medisee.records.masks import MaskFiles, encode_mask, mask_box, read_mask
from medisee.records.records import Record, Target
from medisee.sources.sa_med2d_index import Entry
from medisee.sources.splits import Found, Reject

_INVERTED = "ichallenge_adam_task2"
_WITH_MASKS_AS_IMAGES = "Brain_PTM"


def by_names(entry: Entry | Reject) -> Found:
    """Makes a Record of an image without opening a file.

    Boxes are left out, and so are images that only their pixels could tell from masks.
    """
    if isinstance(entry, Reject):
        return Found(None, (entry,))
    if entry.name.dataset == _WITH_MASKS_AS_IMAGES:
        return Found(None, (Reject(entry.image, "unchecked image", "only its pixels show whether it is a mask"),))
    inverted = entry.name.dataset == _INVERTED
    targets = [
        Target(id=found.target, category=found.category, mask=_mask(found.files, inverted)) for found in entry.classes
    ]
    return _found(entry, targets, list(entry.rejects))


def by_pixels(root: Path, min_area: int, entry: Entry | Reject) -> Found:
    """Makes a Record of an image from its masks, whose instances are joined; leaves out classes below `min_area` pixels."""
    if isinstance(entry, Reject):
        return Found(None, (entry,))
    try:
        shape = image_size(root / entry.image, entry.image)
        is_mask = entry.name.dataset == _WITH_MASKS_AS_IMAGES and np.unique(read_image(root / entry.image)).size <= 2
    except InputError as error:
        return Found(None, (Reject(entry.image, "unreadable image", str(error)),))
    if is_mask:
        return Found(None, (Reject(entry.image, "unusable image", "it has at most two grey values: it is a mask"),))
    inverted = entry.name.dataset == _INVERTED
    rejects = list(entry.rejects)
    targets: list[Target] = []
    for found in entry.classes:
        read = {file: _read_mask(root, file, shape, inverted=inverted) for file in found.files}
        rejects += [mask for mask in read.values() if isinstance(mask, Reject)]
        masks = {file: mask for file, mask in read.items() if not isinstance(mask, Reject)}
        if not masks:
            continue
        joined = np.logical_or.reduce(list(masks.values()))
        if (area := joined.sum()) < min_area:
            rejects += [Reject(file, "small target", f"{area} pixels") for file in masks]
            continue
        named = _mask(tuple(masks), inverted)
        mask = encode_mask(joined) if isinstance(named, MaskFiles) else named
        targets.append(Target(id=found.target, category=found.category, mask=mask, box=mask_box(joined)))
    return _found(entry, targets, rejects)


def _found(entry: Entry, targets: list[Target], rejects: list[Reject]) -> Found:
    if not targets:
        rejects = [*rejects, Reject(entry.image, "no target", f"none of its {entry.masks} masks is usable")]
        return Found(None, tuple(rejects))
    record = Record(
        id=entry.stem,
        image=entry.image,
        modality=entry.name.modality,
        source=entry.name.dataset,
        case=entry.name.case,
        targets=tuple(targets),
        plane=entry.name.plane,
    )
    return Found(record, tuple(rejects))


def _mask(files: tuple[str, ...], inverted: bool) -> str | MaskFiles:
    return files[0] if len(files) == 1 and not inverted else MaskFiles(files, inverted)


def _read_mask(root: Path, file: str, shape: tuple[int, int], *, inverted: bool) -> NDArray[np.bool_] | Reject:
    try:
        mask = read_mask(root / file, file, None) ^ inverted
    except InputError as error:
        return Reject(file, "unreadable mask", str(error))
    if mask.shape != shape:
        return Reject(file, "other shape", f"(height, width) is {mask.shape}, its image has {shape}")
    return mask if mask.any() else Reject(file, "empty mask", "no pixel of the foreground")
