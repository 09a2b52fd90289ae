"""Masks: COCO run-length encoding and back, masks of several files, and the box around a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco
from pydantic import AfterValidator, StrictBool, StrictInt

from medisee.foundation.errors import InputError
from medisee.records.jsonl import FilePath, Text, null_means

Box: TypeAlias = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the original image; half-open: the pixel at x=3, y=4 is (3, 4, 4, 5)."""

_MOST_PIXELS = 2**31  # pycocotools counts in 32 bits


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
    """A mask in several image files: the foreground of any of `files`; their background where `inverted`."""

    files: Annotated[tuple[FilePath, ...], AfterValidator(_not_empty)]
    inverted: Annotated[StrictBool, null_means(False)] = False


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
