"""Whether a box is where its mask is, and as what else its four numbers may have been meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from medisee.records.masks import Box, Rle, mask_box

_LOOSE = 4  # pixels by which each side of a hand-drawn box may be off, however small the object is
_OVERLAP = 0.5  # the IoU from which a box is near enough
_MOST = 0.9  # of the pixels of a mask, or of the predictions of a file: the others are outliers

_FORMS: dict[str, Callable[[float, float, float, float], Box]] = {
    "[x0, y0, x1, y1]": lambda *box: box,
    "COCO's [x, y, width, height]": lambda x, y, w, h: (x, y, x + w, y + h),
    "[y0, x0, y1, x1]": lambda y0, x0, y1, x1: (x0, y0, x1, y1),
    "[centre x, centre y, width, height]": lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
}
_EXPECTED = "expected [x0, y0, x1, y1] in pixels"


def box_problem(box: Box, mask: NDArray[np.bool_]) -> str | None:
    """Returns why a box cannot be that of a mask that is not empty; None where it may be.

    It may be drawn loosely, and leave out a few pixels that lie elsewhere.
    """
    x0, y0 = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    held = mask[y0 : math.ceil(box[3]), x0 : math.ceil(box[2])]
    around = mask_box(mask)
    assert around is not None
    if held.sum() >= _MOST * mask.sum() and (inner := mask_box(held)):
        around = inner[0] + x0, inner[1] + y0, inner[2] + x0, inner[3] + y0
    if _fits(box, around):
        return None
    form = _form([(box, around, mask.shape)], least=1.0, overlap=0.7)
    meant = f"it fits as {form}" if form else "correct it or leave it out"
    return f"box {list(box)} is not where its mask is, {list(around)}; {_EXPECTED}; {meant}."


def form_of_boxes(boxes: Iterable[tuple[Box, Rle | None]]) -> str | None:
    """Returns the form that nearly all predicted boxes have, judged by their own masks, if it is not ours.

    Shares of the image's size are told from the numbers alone.
    """
    given = [(box, mask) for box, mask in boxes if box[0] < box[2] and box[1] < box[3]]
    if (
        given
        and all(0 <= value <= 1 for box, _ in given for value in box)
        and any(v % 1 for box, _ in given for v in box)
    ):
        return "shares of the image's width and height"
    known = [(box, around, mask.size) for box, mask in given if mask and (around := rle_box(mask))]
    if sum(_fits(box, around) for box, around, _ in known) > (1 - _MOST) * len(known):
        return None
    return _form(known, least=_MOST, overlap=_OVERLAP)


def rle_box(rle: Rle) -> Box | None:
    """Returns `mask_box` of a sound encoding without decoding it."""
    x, y, width, height = coco.toBbox({"size": list(rle.size), "counts": rle.counts.encode("ascii")}).tolist()  # type: ignore[typeddict-item]
    return (x, y, x + width, y + height) if width and height else None


def _form(known: list[tuple[Box, Box, tuple[int, ...]]], *, least: float, overlap: float) -> str | None:
    """Returns the form of boxes that fits at least a share `least` of the true boxes; the best if there are several."""
    found: dict[str, float] = {}
    for name, read in _FORMS.items():
        for unit, scale in (("", lambda _: (1, 1)), (" in shares of the image's size", lambda size: size)):
            overlaps = [_iou(_scaled(read(*box), *scale(size)), around) for box, around, size in known]
            if known and sum(one >= overlap for one in overlaps) >= least * len(known):
                found[name + unit] = sum(overlaps)
    return max(found, key=found.__getitem__, default=None)


def _scaled(box: Box, height: float, width: float) -> Box:
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def _fits(box: Box, true: Box) -> bool:
    return _iou(box, true) >= _OVERLAP or all(abs(a - b) <= _LOOSE for a, b in zip(box, true, strict=True))


def _iou(one: Box, other: Box) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)
