"""Scores and summaries: against the release's figures, against plain loops, and in the empty cases."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medisee.evaluation.metrics import Score, Summary, box_iou, score, summarise
from medisee.foundation.errors import InputError
from medisee.records.masks import Box, mask_box

GOLDEN = Path(os.environ.get("MEDISEE_GOLDEN", Path(__file__).parents[1] / "golden")) / "metrics.json"
EMPTY = np.zeros((6, 8), dtype=bool)
SQUARE = EMPTY.copy()
SQUARE[1:3, 2:5] = True

masks = arrays(np.bool_, (5, 7))
corners = st.integers(-20, 20)
any_box = st.tuples(corners, corners, corners, corners)
scores = st.builds(score, masks, masks)


def array_of(rows: list[str]) -> np.ndarray:
    return np.array([[pixel == "1" for pixel in row] for row in rows])


def corners_of(box: list[float]) -> Box:
    """(centre x, centre y, width, height) to corners in float32, as the release does."""
    x, y, w, h = np.asarray(box, dtype=np.float32)
    x0, y0, x1, y1 = (float(value) for value in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return x0, y0, x1, y1


def golden_score(item: dict[str, Any]) -> Score:
    true_box: Any = tuple(item["gt_box"])
    return score(array_of(item["pred_mask"]), array_of(item["gt_mask"]), corners_of(item["pred_box"]), true_box)


def test_golden_items() -> None:
    """The release adds 1e-6 to Dice's denominator and computes in float32; pixel counts are exact."""
    for item in json.loads(GOLDEN.read_text())["items"]:
        ours = golden_score(item)
        assert (ours.intersection, ours.union) == (item["intersection"][1], item["union"][1])
        total = ours.intersection + ours.union
        if total:  # both empty: the release sets IoU to 1 and leaves Dice at 0 for the single item, 1 in its mean
            assert ours.dice == pytest.approx(item["dice"][1], rel=1e-6 / total + 2e-7)
        side = min(*item["pred_box"][2:], item["gt_box"][2] - item["gt_box"][0], item["gt_box"][3] - item["gt_box"][1])
        assert ours.box_iou == pytest.approx(item["box_iou"], abs=1e-6 * ours.box_iou / side + 2e-7)


@pytest.mark.parametrize("run", ["one_mask_per_image", "grouped"])
def test_golden_summary(run: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    ours = [golden_score(item) for item in golden["items"]]
    figures = golden[run].get("result", golden[run])
    summary = summarise(ours, resamples=1).to_json()
    mean = 1e-5 / len(ours) + 3e-7  # means are divided by (count + 1e-5), in float32
    union = 1e-5 / min(each.union for each in ours if each.union)  # each IoU by (union + 1e-5)
    assert summary["Dice"] == pytest.approx(figures["Dice"], rel=mean + union)
    assert summary["gIoU"] == pytest.approx(figures["gIoU"], rel=mean + union)
    assert summary["cIoU"] == pytest.approx(figures["cIoU"], rel=3e-7)
    assert summary["IoU"] == pytest.approx(figures["boxIoU"], rel=mean, abs=1e-6)
    assert summary["Acc"] == pytest.approx(figures["Acc@0.5"], rel=mean)


def test_empty_masks() -> None:
    assert score(EMPTY, EMPTY) == Score(1.0, 1.0, 0.0, 0.0, 1.0)
    assert score(None, EMPTY) == score(EMPTY, EMPTY)
    assert score(None, SQUARE) == Score(0.0, 0.0, 0.0, 6.0, 0.0)
    assert score(SQUARE, EMPTY) == Score(0.0, 0.0, 0.0, 6.0, 0.0)


def test_boxes_that_are_not_given_come_from_the_masks() -> None:
    assert score(SQUARE, SQUARE).box_iou == 1.0
    assert score(None, SQUARE, pred_box=(2, 1, 5, 3)).box_iou == 1.0
    assert score(SQUARE, EMPTY, true_box=(2, 1, 5, 3)).box_iou == 1.0
    assert score(None, EMPTY, true_box=(2, 1, 5, 3)).box_iou == 0.0
    assert score(None, EMPTY, pred_box=(2, 1, 5, 3)).box_iou == 0.0


def test_boxes_without_area() -> None:
    assert box_iou((1, 1, 1, 5), (1, 1, 1, 5)) == 1.0
    assert box_iou((1, 1, 1, 5), (2, 1, 2, 5)) == 0.0
    assert box_iou((1, 1, 1, 5), (0, 0, 9, 9)) == 0.0
    assert box_iou((5, 5, 1, 1), (1, 1, 5, 5)) == 0.0
    assert box_iou((0, 0, 2, 1), (1, 0, 3, 1)) == pytest.approx(1 / 3)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match=r"predicted mask is .* = \(8, 6\), but the truth is \(6, 8\)"):
        score(SQUARE.T, SQUARE)
    with pytest.raises(InputError, match="expected finite coordinates"):
        box_iou((0, 0, float("nan"), 1), (0, 0, 1, 1))
    with pytest.raises(InputError, match="no score to summarise"):
        summarise([])
    with pytest.raises(ValueError, match="2 groups for 1 scores"):
        summarise([score(SQUARE, SQUARE)], groups=["a", "b"])
    with pytest.raises(ValueError, match="resamples is 0"):
        summarise([score(SQUARE, SQUARE)], resamples=0)


@given(masks, masks)
def test_scores_are_symmetric_and_in_range(a: np.ndarray, b: np.ndarray) -> None:
    ours = score(a, b)
    assert ours == score(b, a)
    assert 0 <= ours.iou <= ours.dice <= 1 and 0 <= ours.box_iou <= 1
    assert ours.dice == pytest.approx(2 * ours.iou / (1 + ours.iou))
    assert ours.union == np.logical_or(a, b).sum()
    assert ours.box_iou == box_iou(mask_box(a), mask_box(b))


@given(masks)
def test_a_mask_equals_itself(mask: np.ndarray) -> None:
    ours = score(mask, mask)
    assert (ours.dice, ours.iou, ours.box_iou) == (1, 1, 1)


@given(any_box, any_box)
def test_box_iou_counts_unit_squares(a: Box, b: Box) -> None:
    def squares(box: Box) -> set[tuple[int, int]]:
        return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}

    union = squares(a) | squares(b)
    expected = len(squares(a) & squares(b)) / len(union) if union else float(a == b)
    assert box_iou(a, b) == box_iou(b, a) == pytest.approx(expected)


real_box = st.tuples(*[st.floats(-1e4, 1e4)] * 4)


@given(real_box, real_box)
def test_box_iou_is_in_range(a: Box, b: Box) -> None:
    assert 0 <= box_iou(a, b) <= 1
    assert box_iou(a, a) == 1


@given(st.lists(scores, min_size=1, max_size=8))
def test_summary_equals_plain_loops(samples: list[Score]) -> None:
    summary = summarise(samples, resamples=3)
    union = sum(each.union for each in samples)
    assert summary.n == len(samples)
    assert summary.ciou.value == pytest.approx(sum(each.intersection for each in samples) / union if union else 1)
    assert summary.giou.value == pytest.approx(sum(each.iou for each in samples) / len(samples))
    assert summary.dice.value == pytest.approx(sum(each.dice for each in samples) / len(samples))
    assert summary.iou.value == pytest.approx(sum(each.box_iou for each in samples) / len(samples))
    assert summary.acc.value == pytest.approx(sum(each.box_iou > 0.5 for each in samples) / len(samples))


@given(st.lists(st.tuples(scores, st.sampled_from("abc")), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_order_does_not_matter(samples: list[tuple[Score, str]], shuffler: random.Random) -> None:
    shuffled = shuffler.sample(samples, len(samples))
    assert figures(summary_of(samples)) == pytest.approx(figures(summary_of(shuffled)))


def summary_of(samples: list[tuple[Score, str]]) -> Summary:
    return summarise([each for each, _ in samples], groups=[group for _, group in samples], resamples=20)


def figures(summary: Summary) -> list[float]:
    every = (summary.dice, summary.giou, summary.ciou, summary.iou, summary.acc)
    return [number for figure in every for number in (figure.value, figure.low, figure.high)]


def random_scores(count: int) -> list[Score]:
    rng = np.random.default_rng(1)
    return [score(rng.random((5, 7)) < 0.5, rng.random((5, 7)) < 0.5) for _ in range(count)]


def test_intervals() -> None:
    samples = random_scores(200)
    summary = summarise(samples, seed=3)
    assert summary == summarise(samples, seed=3) != summarise(samples, seed=4)
    dice = np.array([each.dice for each in samples])
    half = 1.96 * dice.std() / np.sqrt(len(dice))
    assert summary.dice.low == pytest.approx(dice.mean() - half, abs=0.2 * half)
    assert summary.dice.high == pytest.approx(dice.mean() + half, abs=0.2 * half)
    assert summary.ciou.low < summary.ciou.value < summary.ciou.high


def test_grouped_intervals_see_through_repeated_queries() -> None:
    """Four queries with the same answer say no more than one: grouped, the interval stays as wide."""
    samples = random_scores(60)
    names = [f"image{index}" for index in range(60)]
    once = summarise(samples, groups=names)
    repeated = summarise(samples * 4, groups=names * 4)
    naive = summarise(samples * 4)
    assert figures(repeated) == pytest.approx(figures(once))
    assert naive.dice.high - naive.dice.low < 0.6 * (once.dice.high - once.dice.low)


def test_chunks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = random_scores(30)
    whole = summarise(samples, resamples=50)
    monkeypatch.setattr("medisee.evaluation.metrics._CHUNK", 70)
    assert figures(summarise(samples, resamples=50)) == pytest.approx(figures(whole))


def test_json_has_the_papers_names() -> None:
    value = summarise(random_scores(5), groups=["a", "a", "b", "b", "c"]).to_json()
    assert list(value) == ["Dice", "gIoU", "cIoU", "IoU", "Acc", "n", "ci95"]
    assert list(value["ci95"]) == ["Dice", "gIoU", "cIoU", "IoU", "Acc"]
    assert value["n"] == 5 and all(low <= high for low, high in value["ci95"].values())
    assert json.loads(json.dumps(value)) == value


def test_no_model_comes_in() -> None:
    code = "import sys, medisee.evaluation.metrics, medisee.records.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
