"""Every term of L_end: values computed by hand, the release's own figures, gradients of the degenerate cases."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medisee.models.geometry import cxcywh_to_xyxy
from medisee.models.losses import (
    bce_loss,
    dice_loss,
    giou_loss,
    js_divergence,
    l1_loss,
    similarity_loss,
    similarity_mse,
    text_loss,
)

GOLDEN = Path(os.environ.get("MEDISEE_GOLDEN", Path(__file__).parents[1] / "golden"))
RELEASES = sorted(GOLDEN.glob("release_*.json"))

unit = st.floats(0, 1, width=32)
boxes = st.tuples(unit, unit, unit, unit).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def box(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_text_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    expected = [math.log(4 / 3), math.log(2)]
    assert text_loss(logits, torch.tensor([1, 0])).tolist() == pytest.approx(expected)


def test_bce_loss_is_the_mean_over_each_mask() -> None:
    logits = torch.tensor([[[0.0, math.log(3)]], [[-math.log(3), -math.log(3)]]])
    truth = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    first = (math.log(2) + math.log(4)) / 2
    second = (math.log(4 / 3) + math.log(4)) / 2
    assert bce_loss(logits, truth).tolist() == pytest.approx([first, second])


def test_dice_loss_by_hand() -> None:
    """Probabilities 0.75, 0.25, 0.5 and a truth of 1, 0, 1: overlap 1.25, sums 1.5 and 2, all over 1000."""
    logits = torch.tensor([[[math.log(3), -math.log(3), 0.0]]])
    truth = torch.tensor([[[1.0, 0.0, 1.0]]])
    expected = 1 - (2 * 1.25 / 1000 + 1e-6) / ((1.5 + 2) / 1000 + 1e-6)
    assert dice_loss(logits, truth).tolist() == pytest.approx([expected], rel=1e-6)


def test_dice_loss_divides_by_1000_before_its_epsilon() -> None:
    """The place of the 1000 shows where almost nothing is predicted: the epsilon weighs 1000 times more."""
    logits = torch.full((1, 1, 1), -6.0)
    p = 1 / (1 + math.exp(6))
    expected = 1 - 1e-6 / (p / 1000 + 1e-6)
    assert dice_loss(logits, torch.zeros(1, 1, 1)).tolist() == pytest.approx([expected], rel=1e-5)
    assert 0.6 < expected < 0.8


def test_dice_loss_of_perfect_and_opposite_masks() -> None:
    truth = torch.zeros(1, 8, 8)
    truth[:, 2:5, 2:5] = 1
    assert dice_loss(200 * truth - 100, truth).item() == pytest.approx(0, abs=1e-6)
    # Nothing overlaps: only the epsilon is left, 1e-6 of 64/1000.
    assert dice_loss(100 - 200 * truth, truth).item() == pytest.approx(1 - 1e-6 / (0.064 + 1e-6), rel=1e-6)


def test_l1_loss_by_hand() -> None:
    assert l1_loss(box(0.1, 0.2, 0.5, 0.9), box(0.2, 0.2, 0.4, 0.5)).tolist() == pytest.approx([0.6 / 4])


GIOU_CASES = {
    "equal": ((0.2, 0.2, 0.6, 0.8), (0.2, 0.2, 0.6, 0.8), 1.0),
    "nested": ((0.0, 0.0, 1.0, 1.0), (0.25, 0.25, 0.75, 0.75), 0.25),
    "overlapping": ((0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75), 0.0625 / 0.4375 - (0.5625 - 0.4375) / 0.5625),
    "disjoint": ((0.0, 0.0, 0.25, 0.25), (0.75, 0.75, 1.0, 1.0), -(1 - 0.125)),
    "touching": ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), 0.0),
}


@pytest.mark.parametrize(("first", "second", "giou"), GIOU_CASES.values(), ids=GIOU_CASES.keys())
def test_giou_loss_by_hand(first: tuple[float, ...], second: tuple[float, ...], giou: float) -> None:
    assert giou_loss(box(*first), box(*second)).item() == pytest.approx(1 - giou, abs=1e-5)
    assert giou_loss(box(*second), box(*first)).item() == pytest.approx(1 - giou, abs=1e-5)


@given(boxes, boxes)
def test_giou_loss_is_finite_and_in_range(first: tuple[float, ...], second: tuple[float, ...]) -> None:
    predicted = box(*first).requires_grad_()
    loss = giou_loss(predicted, box(*second))
    loss.sum().backward()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    assert -1e-5 <= loss.item() <= 2 + 1e-5


@pytest.mark.parametrize("degenerate", [(0.2, 0.2, 0.2, 0.2), (0.1, 0.1, 0.1, 0.4), (0.1, 0.3, 0.4, 0.3)])
def test_giou_loss_pulls_a_degenerate_box(degenerate: tuple[float, ...]) -> None:
    """The release falls to a constant for the whole image here; ours keeps every box's own gradient."""
    predicted = torch.cat([box(*degenerate), box(0.5, 0.5, 0.8, 0.8)]).requires_grad_()
    truth = torch.cat([box(0.6, 0.6, 0.9, 0.9), box(0.6, 0.6, 0.9, 0.9)])
    loss = giou_loss(predicted, truth)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    assert (predicted.grad.abs().sum(1) > 1e-3).all()
    better = giou_loss(predicted.detach() - 0.01 * predicted.grad, truth)
    assert (better < loss).all()


def test_similarity_loss_by_hand() -> None:
    similarity = torch.tensor([[math.log(1), math.log(2), math.log(5)]])
    coverage = torch.tensor([[0.5, 0.5, 0.0]])
    expected = -(0.5 * math.log(1 / 8) + 0.5 * math.log(2 / 8))
    assert similarity_loss(similarity, coverage).tolist() == pytest.approx([expected])


def test_similarity_loss_is_minimal_where_the_softmax_equals_the_truth() -> None:
    coverage = torch.tensor([[0.1, 0.3, 0.6, 1.0]])
    best = (coverage / coverage.sum()).log().requires_grad_()
    loss = similarity_loss(best, coverage)
    loss.sum().backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-6
    noise = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    assert (similarity_loss(best.detach() + noise, coverage.expand(100, -1)) > loss.detach()).all()


def test_similarity_loss_of_a_mask_that_covers_no_token_is_zero() -> None:
    similarity = torch.randn(1, 4).requires_grad_()
    loss = similarity_loss(similarity, torch.zeros(1, 4))
    loss.sum().backward()
    assert loss.item() == 0
    assert similarity.grad is not None
    assert torch.isfinite(similarity.grad).all()


value = st.floats(-100, 100, width=32)
pairs = st.integers(1, 12).flatmap(lambda tokens: st.tuples(*[st.lists(value, min_size=tokens, max_size=tokens)] * 2))


@given(pairs, value)
def test_js_divergence_is_a_symmetric_bounded_measure_of_shapes(
    maps: tuple[list[float], list[float]], shift: float
) -> None:
    first, second = (torch.tensor([one], requires_grad=True) for one in maps)
    js = js_divergence(first, second)
    assert js.dtype == torch.float32 and js.shape == (1,)
    assert 0 <= js.item() <= math.log(2) + 1e-7
    torch.testing.assert_close(js_divergence(second, first), js)
    torch.testing.assert_close(js_divergence(first + shift, second), js, rtol=1e-3, atol=1e-4)
    assert js_divergence(first, first.detach()).item() == pytest.approx(0, abs=1e-6)
    gradients = torch.autograd.grad(js.sum(), (first, second))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_js_divergence_by_hand() -> None:
    """Shares 1/4, 3/4 and 3/4, 1/4; their middle is 1/2, 1/2."""
    first, second = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(3), 0.0]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert js_divergence(first, second).tolist() == pytest.approx([expected])
    # Nothing in common, and shares that underflow.
    assert js_divergence(1e4 * first, 1e4 * second).tolist() == pytest.approx([math.log(2)])


@given(pairs)
def test_similarity_mse_is_symmetric_and_zero_for_equal_maps(maps: tuple[list[float], list[float]]) -> None:
    first, second = (torch.tensor([one]) for one in maps)
    expected = np.square(np.subtract(*maps)).mean()
    assert similarity_mse(first, second).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert torch.equal(similarity_mse(first, second), similarity_mse(second, first))
    assert similarity_mse(first, first).item() == 0


def quotient(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-2) -> Tensor:
    slopes = torch.zeros_like(at)
    for place in range(at.numel()):
        change = torch.zeros_like(at).flatten()
        change[place] = step
        change = change.reshape(at.shape)
        slopes.flatten()[place] = (function(at + change).sum() - function(at - change).sum()) / (2 * step)
    return slopes


TRUTH = (torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "text": (lambda x: text_loss(x, torch.tensor([0, 2])), (2, 3)),
    "bce": (lambda x: bce_loss(x, TRUTH), (2, 3, 4)),
    "dice": (lambda x: dice_loss(x, TRUTH), (2, 3, 4)),
    "similarity": (lambda x: similarity_loss(x, TRUTH.flatten(1)), (2, 12)),
    "js": (lambda x: js_divergence(x, 3 * TRUTH.flatten(1)), (2, 12)),
    "mse": (lambda x: similarity_mse(x, TRUTH.flatten(1)), (2, 12)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_equal_difference_quotients(name: str) -> None:
    function, shape = SMOOTH[name]
    point = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (gradient,) = torch.autograd.grad(function(point).sum(), point)
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(gradient, quotient(function, point.detach()), rtol=2e-2, atol=1e-4)


def test_giou_gradient_equals_difference_quotient() -> None:
    truth = torch.tensor([[0.2, 0.3, 0.7, 0.9], [0.6, 0.6, 0.9, 0.9]])
    predicted = torch.tensor([[0.3, 0.1, 0.8, 0.7], [0.1, 0.2, 0.3, 0.4]]).requires_grad_()
    (gradient,) = torch.autograd.grad(giou_loss(predicted, truth).sum(), predicted)
    numeric = quotient(lambda x: giou_loss(x, truth), predicted.detach(), 1e-3)
    torch.testing.assert_close(gradient, numeric, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_compute_in_float32(dtype: torch.dtype) -> None:
    """A sum over 256 x 256 probabilities would be off by percents in 16 bit."""
    logits = torch.zeros(1, 256, 256, dtype=dtype)
    truth = torch.ones(1, 256, 256)
    assert bce_loss(logits, truth).item() == pytest.approx(math.log(2), rel=1e-5)
    assert dice_loss(logits, truth).item() == pytest.approx(1 / 3, rel=1e-4)
    for loss in (l1_loss, giou_loss):
        assert loss(torch.zeros(1, 4, dtype=dtype), torch.ones(1, 4, dtype=dtype)).dtype == torch.float32
    assert similarity_loss(logits[0], truth[0]).dtype == torch.float32
    assert js_divergence(logits[0], truth[0]).dtype == similarity_mse(logits[0], truth[0]).dtype == torch.float32
    assert text_loss(logits[0], torch.zeros(256, dtype=torch.long)).dtype == torch.float32


def golden_losses(arrays: Any) -> dict[str, float]:
    images = range(sum(name.startswith("raw_image_") for name in arrays))
    predicted = cxcywh_to_xyxy(torch.from_numpy(arrays["train_pred_bboxes_cxcywh"]))
    truth = torch.from_numpy(np.concatenate([arrays[f"gt_bboxes_{i}"] for i in images]))
    pairs = [
        (torch.from_numpy(arrays[f"train_pred_masks_{i}"]), torch.from_numpy(arrays[f"gt_masks_{i}"])) for i in images
    ]
    return {
        "loss_bbox_l1_unweighted": l1_loss(predicted, truth).mean().item(),
        "loss_bbox_giou_unweighted": giou_loss(predicted, truth).mean().item(),
        "loss_bce_unweighted": torch.cat([bce_loss(*pair) for pair in pairs]).mean().item(),
        "loss_dice_unweighted": torch.cat([dice_loss(*pair) for pair in pairs]).mean().item(),
    }


def test_there_are_golden_files() -> None:
    assert RELEASES


@pytest.mark.parametrize("release", RELEASES, ids=[path.stem for path in RELEASES])
def test_losses_reproduce_the_release(release: Path) -> None:
    """The release takes the mean over all masks of a batch, and so do its box terms."""
    arrays = np.load(release.with_suffix(".npz"))
    ours = golden_losses(arrays)
    for name, value in ours.items():
        assert value == pytest.approx(float(arrays[name]), rel=1e-4), name
    weights = json.loads(release.read_text())["loss_weights"]
    box_loss = weights["bbox"] * (ours["loss_bbox_l1_unweighted"] + ours["loss_bbox_giou_unweighted"])
    mask_loss = weights["bce"] * ours["loss_bce_unweighted"] + weights["dice"] * ours["loss_dice_unweighted"]
    assert box_loss == pytest.approx(float(arrays["loss_bbox_loss"]), rel=1e-4)
    assert mask_loss == pytest.approx(float(arrays["loss_mask_loss"]), rel=1e-4)


@pytest.mark.parametrize("release", RELEASES, ids=[path.stem for path in RELEASES])
def test_text_loss_reproduces_the_release(release: Path) -> None:
    """Image embeddings replace the one image token; each state predicts the next token."""
    arrays = np.load(release.with_suffix(".npz"))
    facts = json.loads(release.read_text())
    logits = torch.from_numpy(arrays["train_logits"])
    losses = []
    for row, (ids, labels) in enumerate(zip(arrays["input_ids"], arrays["labels"], strict=True)):
        image = int(np.flatnonzero(ids == facts["image_token_index"])[0])
        shift = np.where(np.arange(len(ids)) > image, facts["num_image_tokens"] - 1, 0)
        places = np.flatnonzero(labels != -100)
        states = logits[row, torch.from_numpy(places + shift[places] - 1)]
        losses.append(text_loss(states, torch.from_numpy(labels[places])))
    ours = torch.cat(losses).mean().item() * facts["loss_weights"]["ce"]
    assert ours == pytest.approx(float(arrays["loss_ce_loss"]), rel=1e-4)
