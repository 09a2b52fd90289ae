"""Masks: the one reader of mask images, COCO's forms of a mask, and the box around a mask."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pycocotools import mask as coco
from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt

from medisee.foundation.errors import InputError
from medisee.records.images import decoded, deep_values, open_picture, shown_size, split_alpha
from medisee.records.jsonl import FilePath, Text, null_means

Box: TypeAlias = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the original image; half-open: the pixel at x=3, y=4 is (3, 4, 4, 5)."""

_MOST_PIXELS = 2**31  # pycocotools counts in 32 bits
_LONGEST_OUTLINE = 2**22  # of a polygon, pixels
_LEAST_RANGE = 64  # highest value of a JPEG mask; it does not keep small ones
_LABELS = 32  # values from which a mask looks smoothed rather than like a label map
_RIM = 5  # pixels: within them, a JPEG mask goes from one value to the other
_EXACT = ("PNG", "TIFF", "BMP")  # formats whose grey values are those that were saved
_STRAYS = 0.01  # of the foreground may be otherwise: thin strips at the image's border do


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask as COCO's compressed run-length encoding: `size` is (height, width), `counts` its ASCII string."""

    size: tuple[StrictInt, StrictInt]
    counts: Text


def _not_empty(files: tuple[str, ...]) -> tuple[str, ...]:
    if not files:
        raise ValueError("expected a list of one path or more; name the mask's files")
    return files


@dataclass(frozen=True, slots=True)
class MaskFiles:
    """A mask in image files: the pixels of `value` in any of `files`, or of any value but 0; if `inverted`, those that
    any of the files leaves out."""

    files: Annotated[tuple[FilePath, ...], AfterValidator(_not_empty)]
    inverted: Annotated[StrictBool, null_means(False)] = False
    value: Annotated[StrictInt, Field(ge=1)] | None = None  # of a label map


def encode_mask(mask: NDArray[np.bool_]) -> Rle:
    """Returns the run-length encoding of a boolean mask (height, width)."""
    if mask.dtype != np.bool_ or mask.ndim != 2 or not mask.size:
        raise ValueError(f"a mask is a boolean array (height, width), got {mask.dtype} of shape {mask.shape}")
    encoded: Any = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return Rle((mask.shape[0], mask.shape[1]), encoded["counts"].decode("ascii"))


def decode_mask(rle: Rle) -> NDArray[np.bool_]:
    """Returns the boolean mask (height, width) of a run-length encoding."""
    runs = check_rle(rle)
    is_foreground = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(is_foreground, runs).reshape(rle.size[::-1]).T)


def check_rle(rle: Rle) -> NDArray[np.int64]:
    """Returns the lengths of an encoding's runs, without making its pixels, since a small string may describe a huge array.

    pycocotools checks nothing: it reads past the end of a truncated string and returns uninitialised pixels where the
    runs are too few. So an encoding that may come from a user is decoded here.
    """
    height, width = rle.size
    if height < 1 or width < 1 or height * width >= _MOST_PIXELS:
        raise InputError(
            f"RLE size {list(rle.size)} is wrong; expected [height, width] with 1 to 2^31 pixels; correct it."
        )
    runs = _runs(rle.counts)
    if runs is None:
        raise InputError(
            "RLE counts do not decode; expected COCO's compressed string; write it with pycocotools.mask.encode."
        )
    if runs.min() < 0 or runs.sum() != height * width:
        raise InputError(
            f"RLE counts cover {runs.sum()} pixels; expected {height} x {width} = {height * width}; "
            "check that size is [height, width] and that counts is whole."
        )
    return runs


def _runs(counts: str) -> NDArray[np.int64] | None:
    """Returns the lengths of the runs, background first, column by column; None when the string is malformed.

    A number has five bits per character, lowest first; bit 5 says that more follow, bit 4 of the last is the sign. From
    the fourth number on it is the difference to the run two before.
    """
    codes = np.frombuffer(counts.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 7 x 5 bits hold any 32-bit number; a longer one would overflow
        return None
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _compressed(mask: Any) -> Any:
    """Returns a mask's JSON value with COCO's other two forms, integer counts and polygons, as a compressed string."""
    if isinstance(mask, list):
        raise ValueError('expected an object; write polygons as {"size": [height, width], "segmentation": [[...]]}')
    if isinstance(mask, dict) and {"counts", "segmentation"} <= mask.keys():
        raise ValueError("expected counts or segmentation, found both; remove one")
    if isinstance(mask, dict) and isinstance(counts := mask.get("counts"), list):
        if not counts or not all(type(count) is int and 0 <= count < _MOST_PIXELS for count in counts):
            raise ValueError("expected counts of whole numbers, 0 or more; correct them")
        packed: Any = coco.frPyObjects({"size": [1, 1], "counts": counts}, 1, 1)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return {**mask, "counts": packed["counts"].decode("ascii")}
    if not isinstance(mask, dict) or "segmentation" not in mask:
        return mask
    if isinstance(mask["segmentation"], dict):
        raise ValueError('expected polygons; write an RLE as {"size": ..., "counts": ...}, without "segmentation"')
    size, polygons = mask.get("size"), mask["segmentation"]
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**16 for side in size)):
        raise ValueError('expected polygons with "size": [height, width] of the image; add it')
    # pycocotools takes four numbers for a box, reads an odd one past the end, and takes memory for each outline's pixel.
    if not (isinstance(polygons, list) and polygons and all(map(_is_polygon, polygons))):
        raise ValueError("expected polygons [[x0, y0, x1, y1, ...], ...] of three points or more; correct them")
    for polygon in polygons:
        points = np.array(polygon, np.float64).reshape(-1, 2)
        if (points < 0).any() or (points > size[::-1]).any():
            raise ValueError(f"expected 0 <= x <= {size[1]} and 0 <= y <= {size[0]}; correct or clip the polygons")
        if np.abs(points - np.roll(points, 1, axis=0)).sum() > _LONGEST_OUTLINE:
            raise ValueError(f"expected outlines of at most {_LONGEST_OUTLINE} pixels; write the mask as an RLE")
    joined: Any = coco.merge(coco.frPyObjects(polygons, *size))
    return {"size": size, "counts": joined["counts"].decode("ascii")}


def _is_polygon(value: Any) -> bool:
    numbers = isinstance(value, list) and all(
        type(number) in (int, float) and abs(number) < _MOST_PIXELS for number in value
    )
    return numbers and len(value) >= 6 and len(value) % 2 == 0


def _sound_rle(rle: Rle) -> Rle:
    try:
        check_rle(rle)
    except InputError as error:
        raise ValueError(str(error).removesuffix(".")) from error
    return rle


SoundRle = Annotated[Rle, BeforeValidator(_compressed), AfterValidator(_sound_rle)]
"""An Rle, checked; in a file it may have any of COCO's forms."""


def read_mask(path: Path, where: str, size: tuple[int, int] | None, value: int | None = None) -> NDArray[np.bool_]:
    """Reads a mask image (height, width), turned as its orientation tag says; an alpha channel is ignored.

    Foreground are the pixels of `value`; by default all that are not 0, which must have one value or colour. Of a JPEG
    it is what lies above half of the highest value; it may have other values at the rim only.

    `where` names the mask in messages; `size` is the (height, width) that it must have, None takes any.
    """
    if value is not None:
        return read_label_map(path, where, size) == value
    colours, alpha, palette, lossy = _stored(path, where, size)
    foreground = np.logical_or.reduce([channel != 0 for channel in np.moveaxis(colours, 2, 0)])
    found = colours[foreground]
    if lossy and found.size:
        return _lossy_foreground(colours, path, where)
    if (found != found[:1]).any():
        raise InputError(_several_values(colours, where))
    if foreground.all() and (alpha != alpha[:1, :1]).any():
        raise InputError(f"{where}: differs in its transparency only; save the mask in black and white.")
    if found.size and any(palette[:3]) and not any(palette[3 * int(found[0, 0]) :][:3]):
        raise InputError(f"{where}: its palette shows 0 bright and the other value black; save it in black and white.")
    return foreground


def read_label_map(path: Path, where: str, size: tuple[int, int] | None) -> NDArray[Any]:
    """Reads the values (height, width) of a label map; see `read_mask`."""
    with open_picture(path, where, formats=None) as image:
        is_exact = image.format in _EXACT and image.info.get("compression") not in ("jpeg", "webp")
        kind, bits = image.format, _bits(image)
    colours = _stored(path, where, size)[0]
    if not is_exact or (colours != colours[..., :1]).any():
        raise InputError(f"{where}: is a {kind} in colour or with inexact values; save the label map as a grey PNG.")
    # Pillow spreads the values of 1, 2 and 4 bits over 0..255.
    return colours[..., 0] // (255 // (2**bits - 1))


def _bits(image: Image.Image) -> int:
    """Returns the bits of a grey image's values, where they are fewer than 8."""
    tiles: Any = getattr(image, "tile", None)
    layout = tiles[0].args if tiles else ""
    layout = layout if isinstance(layout, str) else str((layout or ("",))[0])
    return 1 if image.mode == "1" else int(layout[2]) if image.mode == "L" and layout[:3] in ("L;2", "L;4") else 8


def _stored(
    path: Path, where: str, size: tuple[int, int] | None
) -> tuple[NDArray[Any], NDArray[Any], Sequence[int], bool]:
    """Returns colours, alpha channel and palette of a mask image, and whether its values are inexact."""
    with open_picture(path, where, formats=None) as image:
        check_size(shown_size(image), size, where)
        lossy = image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"
        deep = deep_values(image, path, where)
        picture = decoded(image)
        palette = picture.getpalette() or [0, 0, 0]
        picture = picture.convert({"1": "L", "CMYK": "RGB", "YCbCr": "RGB"}.get(picture.mode, picture.mode))
    return *split_alpha(np.atleast_3d(np.asarray(picture)) if deep is None else deep), palette, lossy


def _several_values(colours: NDArray[Any], where: str) -> str:
    is_grey = (colours == colours[..., :1]).all()
    values = np.unique(colours.reshape(-1, colours.shape[2])[:, : 1 if is_grey else 3], axis=0)
    listed = ", ".join("/".join(f"{number:g}" for number in value) for value in values[:6])
    fix = "save a mask per object without smoothing"
    if len(values) <= _LABELS:
        fix = f'write {{"files": [...], "value": N}} for one value of a label map, or {fix}'
    return (
        f"{where}: expected 0 and one other value, found {len(values)}: {listed}{', ...' * (len(values) > 6)}; {fix}."
    )


def _lossy_foreground(colours: NDArray[np.uint8], path: Path, where: str) -> NDArray[np.bool_]:
    """Returns what lies above half of the highest value, if what lies in the middle is a rim."""
    grey = colours.max(axis=2).astype(np.int64)
    top = grey.max()
    ends = 4 * grey <= top, 4 * grey >= 3 * top
    near = [np.asarray(Image.fromarray(end).convert("L").filter(ImageFilter.MaxFilter(_RIM))) > 0 for end in ends]
    strays = np.count_nonzero(~(ends[0] | ends[1] | (near[0] & near[1])))
    one_colour = np.ptp(colours[ends[1]], axis=0).max() <= top // 2
    if top < _LEAST_RANGE or strays > _STRAYS * np.count_nonzero(ends[1]) or not one_colour:
        raise InputError(
            f"{where}: its JPEG values are not those of one bright object on black; make a PNG of the source."
        )
    _tell_lossy(path.parent)
    return 2 * grey > top


@cache
def _tell_lossy(folder: Path) -> None:
    print(f"warning: {folder}: JPEG masks are cut at half of their highest value; PNG is exact.", file=sys.stderr)


def check_size(found: tuple[int, int], expected: tuple[int, int] | None, where: str) -> None:
    """Refuses a mask whose (height, width) is not that of its image."""
    if expected and found != expected:
        raise InputError(
            f"{where} is {found[1]} x {found[0]} (width x height); expected the image's {expected[1]} x {expected[0]}; "
            "make it again from this image."
        )


def mask_box(mask: NDArray[np.bool_]) -> Box | None:
    """Returns the smallest half-open box around a mask (height, width) in its pixels, None when it is empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not columns.size:
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def bounded_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """Returns (height, width) of an image scaled down, never up, so that its longer side has `longest` pixels."""
    scale = min(1.0, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
