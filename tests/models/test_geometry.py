"""Boxes and masks between the original image and the frame, on images of any shape."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medisee.models.geometry import (
    SAM_MEAN,
    SAM_STD,
    Frame,
    bounded_mask,
    boxes_to_frame,
    cxcywh_to_xyxy,
    denormalise_box,
    fit,
    logits_to_original,
    mask_to_frame,
    normalise_box,
    square_of,
    to_frame,
    token_places,
)
from medisee.records.masks import bounded_size

Resize = Literal["longest", "stretch"]
Box = tuple[int, int, int, int]

resizes = st.sampled_from(["longest", "stretch"])
unit = st.floats(0, 1, width=32)


@st.composite
def placed_boxes(draw: st.DrawFn, smallest: int = 24, largest: int = 160, least: int = 8) -> tuple[int, int, Box]:
    """Height, width and a box of at least `least` pixels on each side."""
    height, width = draw(st.integers(smallest, largest)), draw(st.integers(smallest, largest))
    x0, y0 = draw(st.integers(0, width - least)), draw(st.integers(0, height - least))
    x1, y1 = draw(st.integers(x0 + least, width)), draw(st.integers(y0 + least, height))
    return height, width, (x0, y0, x1, y1)


def rectangle(height: int, width: int, box: Box) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def edges(values: Tensor) -> tuple[float, float, float, float]:
    """Where an object of brightness 1 on 0 begins and ends, to a part of a pixel."""
    columns, rows = values.amax(dim=0), values.amax(dim=1)
    x0, y0 = int((columns > 0.5).int().argmax()), int((rows > 0.5).int().argmax())
    return x0, y0, x0 + float((columns > 0.5).sum()), y0 + float((rows > 0.5).sum())


@pytest.mark.parametrize(
    ("height", "width", "resize", "expected"),
    [
        (100, 200, "longest", (32, 64)),
        (200, 100, "longest", (64, 32)),
        (100, 200, "stretch", (64, 64)),
        (64, 64, "longest", (64, 64)),
        (1, 1000, "longest", (1, 64)),
        (30, 20, "longest", (64, 43)),
    ],
)
def test_fit_by_hand(height: int, width: int, resize: Resize, expected: tuple[int, int]) -> None:
    assert fit(height, width, 64, resize) == Frame(height, width, 64, *expected)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([32, 256, 1024]), resizes)
def test_fit_stays_inside_and_keeps_the_shape(height: int, width: int, size: int, resize: Resize) -> None:
    frame = fit(height, width, size, resize)
    assert max(frame.resized_height, frame.resized_width) == size
    assert min(frame.resized_height, frame.resized_width) >= 1
    if resize == "longest" and min(frame.resized_height, frame.resized_width) > 1:
        assert abs(frame.resized_width / width - frame.resized_height / height) * min(height, width) <= 1


@settings(max_examples=60)
@given(placed_boxes(), resizes)
def test_a_box_lands_on_the_resized_object(placed: tuple[int, int, Box], resize: Resize) -> None:
    """The release misses it on every non-square image: it multiplies both axes by the frame's side."""
    height, width, box = placed
    image = np.repeat(255 * rectangle(height, width, box).astype(np.uint8)[..., None], 3, axis=2)
    if rectangle(height, width, box).all():
        return
    frame = fit(height, width, 128, resize)
    seen = edges(to_frame(image, frame, "minmax")[0])
    prompt = boxes_to_frame(torch.tensor([normalise_box(box, height, width)]), [frame])[0]
    # Up to half a pixel of the frame by thresholding and another half by rounding the resized side.
    assert prompt.tolist() == pytest.approx(seen, abs=1.01)


@settings(max_examples=60)
@given(placed_boxes(smallest=40), resizes)
def test_the_releases_scale_misses_the_object_of_a_long_image(placed: tuple[int, int, Box], resize: Resize) -> None:
    """Along the shorter side it is off by the share that is padding; without padding both scales are one."""
    height, width, box = placed
    frame = fit(height, width, 128, resize)
    normalised = torch.tensor([normalise_box(box, height, width)])
    ours, theirs = (boxes_to_frame(normalised, [frame], scale)[0] for scale in ("resized", "frame"))
    stretched = torch.tensor([128 / frame.resized_width, 128 / frame.resized_height] * 2)
    assert theirs.tolist() == pytest.approx((ours * stretched).tolist(), rel=1e-5)
    if resize == "stretch":
        assert torch.equal(ours, theirs)
    elif max(height, width) > 1.5 * min(height, width):
        shorter = 0 if width < height else 1
        assert theirs[shorter + 2] > ours[shorter + 2] * 1.45


def test_both_scales_by_hand() -> None:
    frame = fit(50, 100, 128, "longest")
    box = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    assert boxes_to_frame(box, [frame]).tolist() == [[64, 32, 128, 64]]
    assert boxes_to_frame(box, [frame], "frame").tolist() == [[64, 64, 128, 128]]


@given(placed_boxes(least=1))
def test_inclusive_ends_are_those_of_the_last_pixels(placed: tuple[int, int, Box]) -> None:
    height, width, box = placed
    rows, columns = np.nonzero(rectangle(height, width, box))
    expected = (columns.min() / width, rows.min() / height, columns.max() / width, rows.max() / height)
    assert normalise_box(box, height, width, inclusive=True) == pytest.approx(expected)
    assert normalise_box(box, height, width) == pytest.approx(
        (*expected[:2], expected[2] + 1 / width, expected[3] + 1 / height)
    )


def test_each_box_goes_by_its_own_frame() -> None:
    frames = [fit(50, 100, 128, "longest"), fit(100, 50, 128, "longest"), fit(50, 100, 128, "stretch")]
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, -1)
    assert boxes_to_frame(boxes, frames).tolist() == [[0, 0, 128, 64], [0, 0, 64, 128], [0, 0, 128, 128]]


def test_boxes_to_frame_is_float32_and_has_a_gradient() -> None:
    boxes = torch.rand(2, 4, dtype=torch.bfloat16, requires_grad=True)
    placed = boxes_to_frame(boxes, [fit(50, 100, 1024, "longest")] * 2)
    assert placed.dtype == torch.float32
    placed.sum().backward()
    assert boxes.grad is not None
    assert (boxes.grad != 0).all()


@settings(max_examples=60)
@given(placed_boxes(), resizes)
def test_a_masks_logits_come_back_where_they_were(placed: tuple[int, int, Box], resize: Resize) -> None:
    height, width, box = placed
    mask = rectangle(height, width, box)
    frame = fit(height, width, 128, resize)
    inside = mask_to_frame(mask, frame, 64)
    back = logits_to_original(20 * inside - 10, frame) > 0
    assert back.shape == (height, width)
    # Each side may move by a pixel of the decoder's mask and half of one by rounding.
    step_x, step_y = 1.5 * 2 * width / frame.resized_width + 1, 1.5 * 2 * height / frame.resized_height + 1
    x0, y0, x1, y1 = box
    grown = rectangle(
        height,
        width,
        (max(0, round(x0 - step_x)), max(0, round(y0 - step_y)), round(x1 + step_x), round(y1 + step_y)),
    )
    assert not (back.numpy() & ~grown).any()
    shrunk = (round(x0 + step_x), round(y0 + step_y), round(x1 - step_x), round(y1 - step_y))
    if shrunk[2] > shrunk[0] and shrunk[3] > shrunk[1]:
        assert back.numpy()[shrunk[1] : shrunk[3], shrunk[0] : shrunk[2]].all()


@pytest.mark.parametrize("resize", ["longest", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(96, 192), (192, 96), (128, 128), (512, 256)])
def test_a_large_rectangle_comes_back_exactly_enough(height: int, width: int, resize: Resize) -> None:
    mask = rectangle(height, width, (width // 4, height // 4, 3 * width // 4, height // 2))
    frame = fit(height, width, 256, resize)
    back = (logits_to_original(20 * mask_to_frame(mask, frame, 64) - 10, frame) > 0).numpy()
    assert (back & mask).sum() / (back | mask).sum() > 0.95


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(32, 2000))
def test_a_bound_keeps_the_shape_and_never_enlarges(height: int, width: int, longest: int) -> None:
    rows, columns = bounded_size(height, width, longest)
    assert max(rows, columns) == min(max(height, width), longest)
    assert 1 <= rows <= height and 1 <= columns <= width
    scale = min(1.0, longest / max(height, width))
    assert abs(rows - height * scale) <= max(0.5, 1 - height * scale)
    assert abs(columns - width * scale) <= max(0.5, 1 - width * scale)


@pytest.mark.parametrize("resize", ["longest", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(96, 240), (240, 96), (200, 150), (128, 128)])
def test_a_bounded_mask_lies_on_the_bounded_logits(height: int, width: int, resize: Resize) -> None:
    mask = rectangle(height, width, (width // 2, height // 4, 7 * width // 8, height // 2))
    frame = fit(height, width, 256, resize)
    small = bounded_mask(mask, 64)
    size = bounded_size(height, width, 64)
    back = logits_to_original(20 * mask_to_frame(mask, frame, 64) - 10, frame, size) > 0
    assert back.shape == small.shape == size
    assert max(size) == 64
    inside = small > 0.5
    # A border between two rows may fall to either.
    assert int((back & inside).sum()) / int((back | inside).sum()) > 0.8
    # The share of the image that the mask covers stays.
    assert float(small.mean()) == pytest.approx(float(mask.mean()), rel=0.02)


def test_a_mask_below_the_bound_stays() -> None:
    mask = rectangle(40, 60, (5, 3, 31, 22))
    for longest in (60, 61, 512):
        assert torch.equal(bounded_mask(mask, longest), torch.from_numpy(mask).float())


def test_logits_in_the_padding_do_not_come_back() -> None:
    frame = fit(32, 64, 64, "longest")
    logits = torch.full((16, 16), -5.0)
    logits[9:] = 50  # one row off the border, which the bilinear kernel may touch
    assert (logits_to_original(logits, frame) < 0).all()


@settings(max_examples=100)
@given(placed_boxes(smallest=16, largest=300, least=1), resizes, st.sampled_from([16, 64, 100]))
def test_mask_to_frame_keeps_the_area_and_leaves_the_padding_empty(
    placed: tuple[int, int, Box], resize: Resize, side: int
) -> None:
    height, width, box = placed
    mask = rectangle(height, width, box)
    frame = fit(height, width, 256, resize)
    inside = mask_to_frame(mask, frame, side)
    assert inside.shape == (side, side)
    assert inside.dtype == torch.float32
    assert inside.min() >= 0 and inside.max() <= 1 + 1e-5
    rows, columns = round(frame.resized_height * side / 256), round(frame.resized_width * side / 256)
    rows, columns = max(1, rows), max(1, columns)
    assert inside[rows:].abs().sum() == 0
    assert inside[:, columns:].abs().sum() == 0
    # Windows that do not divide a side overlap: each edge of the rectangle may be off by half a pixel of the frame.
    w, h = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    slack = (w + 1 / columns) * (h + 1 / rows) - w * h
    assert float(inside.sum()) / (rows * columns) == pytest.approx(w * h, abs=slack)


@settings(max_examples=100)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_mask_to_frame_averages_exactly_where_sides_divide(rows: int, columns: int, data: st.DataObject) -> None:
    height, width = 16 * rows, 16 * columns
    mask = rectangle(height, width, data.draw(boxes_inside(height, width)))
    inside = mask_to_frame(mask, fit(height, width, 64, "stretch"), 16)
    expected = mask.reshape(16, rows, 16, columns).mean(axis=(1, 3))
    np.testing.assert_allclose(inside.numpy(), expected, atol=1e-6)


def boxes_inside(height: int, width: int) -> st.SearchStrategy[Box]:
    xs = st.tuples(st.integers(0, width - 1), st.integers(1, width))
    ys = st.tuples(st.integers(0, height - 1), st.integers(1, height))
    return st.tuples(xs, ys).map(
        lambda b: (
            min(b[0][0], b[0][1] - 1),
            min(b[1][0], b[1][1] - 1),
            max(b[0][0] + 1, b[0][1]),
            max(b[1][0] + 1, b[1][1]),
        )
    )


@pytest.mark.parametrize(("height", "width"), [(512, 40), (40, 512), (512, 512)])
@pytest.mark.parametrize("across", [True, False])
def test_thin_structures_do_not_vanish(height: int, width: int, across: bool) -> None:
    """A line of one pixel keeps its weight everywhere, also where one axis grows and the other one shrinks."""
    mask = np.zeros((height, width), dtype=bool)
    where = 101 if (height if across else width) > 200 else 17
    if across:
        mask[where] = True
    else:
        mask[:, where] = True
    inside = mask_to_frame(mask, fit(height, width, 64, "stretch"), 64)
    line = inside.sum(0 if across else 1)
    expected = 64 / (height if across else width)
    assert line.min() > 0.5 * expected
    assert line.max() < 2 * expected


def test_to_frame_pads_with_zeros_after_standardisation() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8)
    for pixels in ("sam", "minmax"):
        values = to_frame(image, fit(40, 100, 64, "longest"), pixels)
        assert values.shape == (3, 64, 64)
        assert values.dtype == torch.float32
        assert values[:, 26:].abs().max() == 0
        assert values[:, :26].abs().sum(0).min() > 0


def test_sams_standardisation_by_hand() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    values = to_frame(image, fit(64, 64, 64, "longest"), "sam").permute(1, 2, 0).numpy()
    np.testing.assert_allclose(values, (image - np.array(SAM_MEAN)) / np.array(SAM_STD), atol=1e-5)


@given(st.integers(0, 254), st.integers(1, 255), st.integers(8, 90), st.integers(8, 90), resizes)
def test_minmax_fills_0_to_1(low: int, span: int, height: int, width: int, resize: Resize) -> None:
    image = np.random.default_rng(low).integers(low, min(255, low + span) + 1, (height, width, 3), dtype=np.uint8)
    frame = fit(height, width, 64, resize)
    values = to_frame(image, frame, "minmax")[:, : frame.resized_height, : frame.resized_width]
    assert values.min() == 0
    assert values.max() == (0 if values.std() == 0 else 1)


def test_minmax_of_a_constant_image_is_0() -> None:
    values = to_frame(np.full((20, 30, 3), 77, dtype=np.uint8), fit(20, 30, 64, "longest"), "minmax")
    assert torch.equal(values, torch.zeros(3, 64, 64))


def test_minmax_is_over_the_image_not_each_channel() -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[..., 1], image[0, 0, 2] = 100, 200
    values = to_frame(image, fit(64, 64, 64, "stretch"), "minmax")
    assert values[1].mean() == pytest.approx(0.5)
    assert values[2, 0, 0] == 1


@given(unit, unit, unit, unit)
def test_cxcywh_to_xyxy(cx: float, cy: float, w: float, h: float) -> None:
    x0, y0, x1, y1 = cxcywh_to_xyxy(torch.tensor([[cx, cy, w, h]]))[0].tolist()
    assert (x0, y0, x1, y1) == pytest.approx((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), abs=1e-6)


@given(st.lists(st.floats(-3, 4, width=32), min_size=4, max_size=4), st.integers(1, 2000), st.integers(1, 2000))
def test_denormalise_clamps_to_the_image(box: list[float], height: int, width: int) -> None:
    x0, y0, x1, y1 = denormalise_box(torch.tensor(box), height, width)
    assert 0 <= x0 <= x1 <= width
    assert 0 <= y0 <= y1 <= height
    if 0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1:
        expected = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        assert (x0, y0, x1, y1) == pytest.approx(expected, abs=1e-3)


@given(placed_boxes(largest=2000))
def test_normalise_and_back(placed: tuple[int, int, Box]) -> None:
    height, width, box = placed
    normalised = torch.tensor(normalise_box(box, height, width))
    assert denormalise_box(normalised, height, width) == pytest.approx(box, abs=1e-3)


@given(st.integers(24, 160), st.integers(24, 160), resizes, st.integers(1, 6))
def test_tokens_of_the_frame_lie_where_boxes_are_sent(height: int, width: int, resize: Resize, grid: int) -> None:
    """A token's part of the image, taken as a box, comes out as its cell of the frame, less what is padding."""
    frame = fit(height, width, 96, resize)
    found = boxes_to_frame(cxcywh_to_xyxy(token_places(frame, grid, "frame")), [frame] * grid**2)
    rows, columns = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
    cells = torch.stack([columns, rows, columns + 1, rows + 1], dim=1) * (96 / grid)
    filled = torch.tensor([frame.resized_width, frame.resized_height] * 2)
    torch.testing.assert_close(found, cells.minimum(filled), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("over", "first", "last"),
    [
        # 40 x 80: the padded square of 80 begins 20 pixels, half the height, above the image; two tokens a side.
        ("pad", (0.25, 0.25, 0.5, 0.5), (0.75, 0.75, 0.5, 0.5)),
        # Its centre square of 40 begins a quarter of the width to the right.
        ("centre_crop", (0.375, 0.25, 0.25, 0.5), (0.625, 0.75, 0.25, 0.5)),
    ],
)
def test_tokens_of_a_vision_tower_by_hand(
    over: Literal["pad", "centre_crop"], first: tuple[float, ...], last: tuple[float, ...]
) -> None:
    places = token_places(fit(40, 80, 64, "longest"), 2, over)
    assert places.shape == (4, 4)
    torch.testing.assert_close(places[[0, 3]], torch.tensor([first, last]))


@pytest.mark.parametrize(
    ("height", "width", "pad", "crop"),
    [(40, 80, (80, -20, 0), (40, 0, 20)), (41, 80, (80, -19, 0), (41, 0, 19)), (80, 41, (80, 0, -19), (41, 19, 0))],
)
def test_a_vision_towers_square_by_hand(
    height: int, width: int, pad: tuple[int, int, int], crop: tuple[int, int, int]
) -> None:
    """Of an odd number of pixels, the one more lies below and behind."""
    assert square_of(height, width, "pad") == pad
    assert square_of(height, width, "centre_crop") == crop
