"""Folders of pictures and masks as Records: one mask for each picture, one folder of masks for each category, or label maps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medisee.foundation.errors import InputError
from medisee.records.images import image_size
from medisee.records.masks import MaskFiles, encode_mask, mask_box, read_label_map, read_mask
from medisee.records.records import Record, Target
from medisee.sources.splits import Found, Reject, case_of

_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the pictures and masks of a data set are, and what the masks mean.

    Of `category` and `labels` at most one is given. Without both, each folder in `masks` has the name of a category.
    """

    images: Path
    masks: Path
    root: Path  # both are inside; paths in records are relative to it
    category: str | None = None  # of every mask
    labels: Mapping[int, str] | None = None  # the category of each value of a label map; 0 is the background
    pattern: str = "{stem}.*"  # a mask's name, with {stem} for that of its picture
    case: re.Pattern[str] | None = None  # finds the patient in a picture's path; None: every picture is a case
    fill: bool = False  # masks are closed outlines


def folder_records(layout: Layout, *, modality: str, source: str) -> Iterator[Found]:
    """Yields a Record for each picture that has a mask; pictures and masks without the other are Rejects."""
    folders = _mask_folders(layout)
    pictures = list_images(layout.images)
    masks = {picture: _masks_of(picture, layout, folders) for picture in pictures}
    used = {mask for found in masks.values() for each in found.values() for mask in each}
    for picture in pictures:
        if picture not in used:  # pictures and masks may share a folder
            yield _found(picture, masks[picture], layout, modality=modality, source=source)
    for folder in folders.values():
        left = set(list_images(folder)) - used - set(pictures)
        yield Found(None, tuple(Reject(_relative(mask, layout), "mask without a picture", "") for mask in sorted(left)))


def list_images(folder: Path) -> list[Path]:
    """Lists the PNG, JPEG and TIFF files in a folder and those below it, in order."""
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.name[0] != "." and path.is_file()
    )


def parse_labels(words: list[str]) -> dict[int, str]:
    """Reads labels as they are written in a command: `1=liver,2=spleen`, or as several words."""
    labels: dict[int, str] = {}
    problems: list[str] = []
    for word in (part for each in words for part in each.split(",") if part):
        number, _, name = word.partition("=")
        if not (number.isdecimal() and int(number) and name.strip()):
            problems.append(
                f"--labels {word!r}: expected NUMBER=CATEGORY such as 1=liver, with a number above 0; correct it."
            )
        elif int(number) in labels:
            problems.append(f"--labels {word!r}: {number} is also {labels[int(number)]!r}; remove one.")
        else:
            labels[int(number)] = name.strip()
    if problems or not labels:
        raise InputError(problems or "--labels: names no label; expected NUMBER=CATEGORY such as 1=liver.")
    return labels


def _mask_folders(layout: Layout) -> dict[str, Path]:
    """Returns the folders of masks by category; a single one has the name ""."""
    if layout.category is not None or layout.labels is not None:
        return {"": layout.masks}
    folders = {path.name: path for path in sorted(layout.masks.iterdir()) if path.is_dir() and path.name[0] != "."}
    if not folders:
        raise InputError(
            f"{layout.masks}: has no folders named after categories; name the category of all masks with --category, or the "
            "values of label maps with --labels."
        )
    return folders


def _masks_of(picture: Path, layout: Layout, folders: Mapping[str, Path]) -> dict[str, list[Path]]:
    below = picture.parent.relative_to(layout.images)
    name = layout.pattern.replace("{stem}", re.sub(r"([*?[])", r"[\1]", picture.stem))
    found = {
        category: [
            path for path in sorted((folder / below).glob(name)) if path.suffix.lower() in _ENDINGS and path != picture
        ]
        for category, folder in folders.items()
    }
    return {category: masks for category, masks in found.items() if masks}


def _found(picture: Path, masks: Mapping[str, list[Path]], layout: Layout, *, modality: str, source: str) -> Found:
    image = _relative(picture, layout)
    if not masks:
        return Found(None, (Reject(image, "picture without a mask", ""),))
    try:
        shape = image_size(picture, image)
    except InputError as error:
        return Found(None, (Reject(image, "unreadable image", str(error)),))
    targets: list[Target] = []
    rejects: list[Reject] = []
    for category, files in masks.items():
        try:
            targets += _targets(layout.category or category, files, layout, shape)
        except InputError as error:
            rejects.append(Reject(_relative(files[0], layout), "unusable mask", str(error)))
    if not targets:
        return Found(None, (*rejects, Reject(image, "no target", "none of its masks is usable")))
    name = picture.relative_to(layout.root).with_suffix("").as_posix()
    record = Record(
        id=name,
        image=image,
        modality=modality,
        source=source,
        case=case_of(picture.relative_to(layout.images).as_posix(), layout.case, source),
        targets=tuple(targets),
    )
    return Found(record, tuple(rejects))


def _targets(category: str, files: list[Path], layout: Layout, shape: tuple[int, int]) -> list[Target]:
    """Makes the targets that the masks of one category, or one label map, describe."""
    names = tuple(_relative(file, layout) for file in files)
    if layout.labels is None:
        mask = np.logical_or.reduce([read_mask(file, str(file), shape) for file in files])
        if layout.fill:
            mask = _filled(mask)
        if not mask.any():
            raise InputError(f"{files[0]}: is empty; expected a pixel > 0.")
        stored = encode_mask(mask) if layout.fill else names[0] if len(names) == 1 else MaskFiles(names)
        return [Target(id=category, category=category, mask=stored, box=mask_box(mask))]
    if len(files) > 1:
        raise InputError(f"{files[0]}: is one of {len(files)} label maps of a picture; expected one; narrow --pattern.")
    values = read_label_map(files[0], str(files[0]), shape)
    found = set(np.unique(values).tolist()) - {0}
    if unknown := sorted(found - set(layout.labels)):
        raise InputError(f"{files[0]}: has the values {unknown[:5]}, which have no name; name them with --labels.")
    if not found:
        raise InputError(f"{files[0]}: marks nothing; expected a value > 0.")
    return [
        Target(
            id=layout.labels[value],
            category=layout.labels[value],
            mask=MaskFiles(names, value=value),
            box=mask_box(values == value),
        )
        for value in sorted(found)
    ]


def _filled(outline: NDArray[np.bool_]) -> NDArray[np.bool_]:
    from scipy import ndimage  # only here: it is an extra

    return np.asarray(ndimage.binary_fill_holes(outline), dtype=bool)


def _relative(path: Path, layout: Layout) -> str:
    return path.relative_to(layout.root).as_posix()
