"""Whether a box is where its mask is, and as what else its four numbers may have been meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from medisee.foundation.errors import InputError
from medisee.records.masks import Box, Rle, decode_mask, mask_box

_LOOSE = 4  # pixels by which each side of a hand-drawn box may be off, however small the object is
_OVERLAP = 0.5  # the IoU from which a box is near enough
_NEAR = 0.75  # the IoU from which another form is named: a poor system's boxes come near to anything
_MOST = 0.9  # of the pixels of a mask, or of the predictions of a file: the others are outliers
_ENOUGH = 200  # predictions of a file that are looked at

_SHARES = "shares of the image's width and height"
_FORMS: dict[str, Callable[[Box, tuple[int, ...]], Box]] = {
    "COCO's [x, y, width, height]": lambda box, _: (box[0], box[1], box[0] + box[2], box[1] + box[3]),
    "[y0, x0, y1, x1]": lambda box, _: (box[1], box[0], box[3], box[2]),
    _SHARES: lambda box, size: (box[0] * size[1], box[1] * size[0], box[2] * size[1], box[3] * size[0]),
}


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
    form = _form([(box, around, mask.shape)])
    meant = f"it fits as {form}; write [x0, y0, x1, y1] in pixels" if form else "correct it or leave it out"
    return f"box {list(box)} is not where its mask is, {list(around)}; {meant}."


def form_of_boxes(boxes: Iterable[tuple[Box, Rle | None]]) -> str | None:
    """Returns the form that nearly all predicted boxes have, judged by their own masks, if it is not ours."""
    given = [(box, mask) for box, mask in boxes if box[0] < box[2] and box[1] < box[3]]
    values = [value for box, _ in given for value in box]
    if values and min(values) >= 0 and max(values) <= 1 and any(value % 1 for value in values):
        return _SHARES
    masks = ((box, decode_mask(mask)) for box, mask in given if mask)
    known = [(box, around, mask.shape) for box, mask in islice(masks, _ENOUGH) if (around := mask_box(mask))]
    few = sum(_fits(box, around) for box, around, _ in known) <= (1 - _MOST) * len(known)
    return _form(known) if few else None


def _form(known: Sequence[tuple[Box, Box, tuple[int, ...]]]) -> str | None:
    """Returns the form of boxes that fits nearly all true boxes; the best if there are several."""
    found: dict[str, float] = {}
    for name, read in _FORMS.items():
        overlaps = [box_iou(read(box, size), around) for box, around, size in known]
        if known and sum(one >= _NEAR for one in overlaps) >= _MOST * len(known):
            found[name] = sum(overlaps)
    return max(found, key=found.__getitem__, default=None)


def _fits(box: Box, true: Box) -> bool:
    return box_iou(box, true) >= _OVERLAP or all(abs(a - b) <= _LOOSE for a, b in zip(box, true, strict=True))


def box_iou(a: Box | None, b: Box | None) -> float:
    """Returns the IoU of two half-open boxes in the same frame and unit; None if there is no box."""
    if a is None or b is None:
        return float(a is b)
    if not np.isfinite([*a, *b]).all():
        raise InputError(f"boxes {a} and {b}: expected finite coordinates; write null where there is no box.")
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    area_a, area_b = (max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0) for box in (a, b))
    if not (area_a and area_b):
        return float(area_a == area_b and tuple(a) == tuple(b))
    intersection = max(width, 0.0) * max(height, 0.0)
    return float(intersection / (area_a + area_b - intersection))
