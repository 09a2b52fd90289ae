"""Scores of predictions against truth, and their summary with bootstrap intervals. Needs numpy only, no model.

Empty cases are decided here and nowhere else:

- prediction and truth both empty: IoU = Dice = 1; only one of them empty: 0;
- no predicted box: the smallest box around the predicted mask counts ("mask2box"); if that is empty too, the box IoU is
  1 when the truth has no box, else 0;
- a box whose x1 <= x0 or y1 <= y0 has no area: its IoU is 0, except with an equal box of no area, where it is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medisee.foundation.errors import InputError
from medisee.records.boxes import box_iou
from medisee.records.masks import Box, mask_box

_CHUNK = 2**22  # entries of the resampling matrix in memory at a time: 32 MB


@dataclass(frozen=True, slots=True)
class Score:
    """One prediction against its truth; `dice`, `iou` and `box_iou` in 0..1, the other two in pixels."""

    dice: float
    iou: float
    intersection: float
    union: float
    box_iou: float


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure in 0..1 and its bootstrap 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of `n` scores, as fractions of 1: mean Dice and IoU of the masks (`giou`), the sum of intersections
    over the sum of unions (`ciou`; 1 when every union is 0), mean IoU of the boxes, share of boxes with IoU > 0.5."""

    dice: Figure
    giou: Figure
    ciou: Figure
    iou: Figure
    acc: Figure
    n: int

    def to_json(self) -> dict[str, Any]:
        """Returns the figures under the paper's names, `n`, and `ci95` with [low, high] under the same names."""
        figures = {"Dice": self.dice, "gIoU": self.giou, "cIoU": self.ciou, "IoU": self.iou, "Acc": self.acc}
        return {
            **{name: figure.value for name, figure in figures.items()},
            "n": self.n,
            "ci95": {name: [figure.low, figure.high] for name, figure in figures.items()},
        }


def score(
    pred_mask: NDArray[np.bool_] | None,
    true_mask: NDArray[np.bool_],
    pred_box: Box | None = None,
    true_box: Box | None = None,
) -> Score:
    """Scores one prediction; the module's docstring decides the empty cases.

    Masks are boolean (height, width), boxes half-open, both in pixels of the original image. A predicted mask of None
    is empty; a box of None is the smallest one around the mask.
    """
    if pred_mask is None:
        pred_mask = np.zeros_like(true_mask)
    if pred_mask.shape != true_mask.shape:
        raise InputError(
            f"predicted mask is (height, width) = {pred_mask.shape}, but the truth is {true_mask.shape}; "
            "write predictions in the pixels of the original image."
        )
    intersection = float(np.count_nonzero(pred_mask & true_mask))
    total = float(np.count_nonzero(pred_mask) + np.count_nonzero(true_mask))
    union = total - intersection
    return Score(
        dice=2 * intersection / total if total else 1.0,
        iou=intersection / union if union else 1.0,
        intersection=intersection,
        union=union,
        box_iou=box_iou(pred_box or mask_box(pred_mask), true_box or mask_box(true_mask)),
    )


def summarise(
    scores: Sequence[Score], *, groups: Sequence[str] | None = None, resamples: int = 1000, seed: int = 0
) -> Summary:
    """Summarises scores, with percentile-bootstrap 95% intervals.

    Queries about one image are not independent: with `groups`, the image of each score, whole groups are drawn, which
    keeps the intervals as wide as they should be. Figures and intervals do not depend on the order of the scores.
    """
    if not scores:
        raise InputError("no score to summarise; at least one prediction has to answer a record.")
    if groups is not None and len(groups) != len(scores):
        raise ValueError(f"{len(groups)} groups for {len(scores)} scores")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected 1 or more")
    rows = np.array([[s.dice, s.iou, s.box_iou, s.box_iou > 0.5, s.intersection, s.union, 1.0] for s in scores])
    sums = rows
    if groups is not None:
        names, group_of_row = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        sums = np.zeros((len(names), rows.shape[1]))
        np.add.at(sums, group_of_row, rows)
    samples = _figures(_resampled(sums, resamples, seed))
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    values = _figures(rows.sum(axis=0, keepdims=True))[0]
    dice, giou, ciou, iou, acc = (Figure(*map(float, of)) for of in zip(values, low, high, strict=True))
    return Summary(dice=dice, giou=giou, ciou=ciou, iou=iou, acc=acc, n=len(scores))


def _resampled(sums: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Returns the column sums (resamples, columns) of rows drawn with replacement."""
    rng = np.random.default_rng(seed)
    sums = sums[np.lexsort(sums.T)]  # the order of a predictions file must not change the interval
    count = len(sums)
    drawn: list[NDArray[np.float64]] = []
    chunk = max(1, _CHUNK // count)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        rows = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times_drawn = np.bincount(rows.ravel(), minlength=size * count).reshape(size, count)
        drawn.append(times_drawn.astype(np.float64) @ sums)
    return np.concatenate(drawn)


def _figures(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turns sums (samples, 7) into figures (samples, 5) in the order of Summary."""
    means = sums[:, :4] / sums[:, 6:]
    intersection, union = sums[:, 4:5], sums[:, 5:6]
    ciou = np.divide(intersection, union, out=np.ones_like(union), where=union > 0)
    return np.concatenate([means[:, :2], ciou, means[:, 2:]], axis=1)
