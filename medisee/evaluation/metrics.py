"""Scores of predictions against truth, and their summary with bootstrap intervals. numpy only: no model comes in here.

What the empty cases count is decided here and nowhere else:

- prediction and truth both empty: IoU = Dice = 1; only one of them empty: 0;
- no predicted box: the smallest box around the predicted mask ("mask2box"); none there either: box IoU 1 when the
  truth has no box, else 0;
- a box whose x1 <= x0 or y1 <= y0 has no area: its IoU is 0, except with an equal box of no area, where it is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medisee.foundation.errors import InputError
from medisee.records.masks import Box, mask_box

_CHUNK = 2**22  # entries of the resampling matrix that are in memory at a time: 32 MB


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
    """The figures of `n` scores, as fractions of 1.

    Attributes:
        dice: mean Dice.
        giou: mean IoU of the masks.
        ciou: sum of intersections over sum of unions; 1 when every union is 0.
        iou: mean IoU of the boxes.
        acc: share of boxes with IoU > 0.5.
        n: number of scores.
    """

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
    """Scores one prediction; the empty cases are decided in the module's docstring.

    Args:
        pred_mask: boolean (height, width) in the original image's pixels; None is an empty mask.
        true_mask: boolean (height, width).
        pred_box: half-open pixels of the original image; None is the smallest box around `pred_mask`.
        true_box: the same around `true_mask`.

    Raises:
        InputError: the masks are not of one size, or a box is not finite.
    """
    if pred_mask is None:
        pred_mask = np.zeros_like(true_mask)
    if pred_mask.shape != true_mask.shape:
        raise InputError(
            f"predicted mask is (height, width) = {pred_mask.shape}; expected the truth's {true_mask.shape}; "
            "write predictions in the pixels of the original image."
        )
    intersection = float(np.count_nonzero(pred_mask & true_mask))
    total = float(np.count_nonzero(pred_mask) + np.count_nonzero(true_mask))
    union = total - intersection
    pred_box = pred_box if pred_box is not None else mask_box(pred_mask)
    true_box = true_box if true_box is not None else mask_box(true_mask)
    return Score(
        dice=2 * intersection / total if total else 1.0,
        iou=intersection / union if union else 1.0,
        intersection=intersection,
        union=union,
        box_iou=box_iou(pred_box, true_box),
    )


def box_iou(a: Box | None, b: Box | None) -> float:
    """Returns the IoU of two half-open boxes of one frame, whatever its unit; None is no box.

    Raises:
        InputError: a coordinate is NaN or infinite.
    """
    if a is None or b is None:
        return float(a is b)
    if not np.isfinite([*a, *b]).all():
        raise InputError(f"boxes {a} and {b}: expected finite coordinates; write null where there is no box.")
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    area_a, area_b = _area(a), _area(b)
    if not (area_a and area_b):
        return float(area_a == area_b and tuple(a) == tuple(b))
    intersection = max(width, 0.0) * max(height, 0.0)
    return float(intersection / (area_a + area_b - intersection))


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def summarise(
    scores: Sequence[Score], *, groups: Sequence[str] | None = None, resamples: int = 1000, seed: int = 0
) -> Summary:
    """Summarises scores, with percentile-bootstrap 95% intervals.

    Queries about one image are not independent. With `groups` whole groups are drawn, which keeps the intervals as
    wide as they should be. Neither figures nor intervals depend on the order of the scores.

    Args:
        scores: one a prediction.
        groups: the image of each score; None draws single scores.
        resamples: bootstrap samples, at least 1.
        seed: of the bootstrap.

    Raises:
        InputError: there is no score.
        ValueError: `groups` is not as long as `scores`, or `resamples` is below 1.
    """
    if not scores:
        raise InputError("no score to summarise; expected at least one prediction that answers a record; check both.")
    if groups is not None and len(groups) != len(scores):
        raise ValueError(f"{len(groups)} groups for {len(scores)} scores")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected 1 or more")
    rows = np.array([[s.dice, s.iou, s.box_iou, s.box_iou > 0.5, s.intersection, s.union, 1.0] for s in scores])
    sums = rows if groups is None else _sum_by_group(rows, groups)
    samples = _figures(_resampled(sums, resamples, seed))
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    values = _figures(rows.sum(axis=0, keepdims=True))[0]
    dice, giou, ciou, iou, acc = (Figure(*map(float, of)) for of in zip(values, low, high, strict=True))
    return Summary(dice=dice, giou=giou, ciou=ciou, iou=iou, acc=acc, n=len(scores))


def _sum_by_group(rows: NDArray[np.float64], groups: Sequence[str]) -> NDArray[np.float64]:
    names, group_of_row = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, group_of_row, rows)
    return sums


def _resampled(sums: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Returns the column sums (resamples, columns) of rows drawn with replacement."""
    rng = np.random.default_rng(seed)
    sums = sums[np.lexsort(sums.T)]  # the order of a predictions file must not move the interval
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
