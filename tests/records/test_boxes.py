"""Boxes and their masks: what contradicts is refused with what was meant, what is only loose is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from medisee.foundation.errors import InputError
from medisee.records.boxes import box_problem, form_of_boxes
from medisee.records.manifest import Manifest
from medisee.records.masks import Box, Rle, encode_mask, mask_box
from medisee.records.records import Record, Target, write_records

TRUE = (19, 13, 42, 36)


def rectangle(x0: int, y0: int, x1: int, y1: int, *, height: int = 48, width: int = 64) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize(
    ("box", "meant"),
    [
        ((19, 13, 23, 23), "it fits as COCO's [x, y, width, height]"),
        ((13, 19, 36, 42), "it fits as [y0, x0, y1, x1]"),
        ((19 / 64, 13 / 48, 42 / 64, 36 / 48), "it fits as shares of the image's width and height"),
        ((29, 23, 31, 25), "correct it or leave it out"),
        ((44, 0, 60, 12), "correct it or leave it out"),
        ((0, 0, 64, 48), "correct it or leave it out"),
        ((19, 13, 42, 36), None),
        ((16, 10, 45, 39), None),
        ((18.5, 12.25, 42.75, 36), None),
    ],
)
def test_a_box_that_contradicts_its_mask_is_told(box: Box, meant: str | None) -> None:
    problem = box_problem(box, rectangle(*TRUE))
    assert problem is None if meant is None else problem is not None and f"; {meant}" in problem
    if problem:
        assert f"box {list(box)} is not where its mask is, [19.0, 13.0, 42.0, 36.0]" in problem


def test_swapped_axes_are_named() -> None:
    problem = box_problem((2, 40, 12, 60), rectangle(40, 2, 60, 12))
    assert problem is not None and "it fits as [y0, x0, y1, x1];" in problem


def test_a_loose_box_of_a_small_object_is_taken() -> None:
    assert box_problem((8, 8, 16, 16), rectangle(11, 11, 13, 13)) is None


def test_a_box_may_leave_out_stray_pixels() -> None:
    mask = rectangle(*TRUE)
    mask[47, 0] = mask[0, 63] = True
    assert box_problem((19, 13, 42, 36), mask) is None
    assert box_problem((44, 0, 64, 12), mask) is not None


@given(arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40))).filter(np.any), st.integers(0, 4))
def test_a_masks_own_box_always_fits(mask: np.ndarray, loose: int) -> None:
    box = mask_box(mask)
    assert box is not None
    assert box_problem((max(0, box[0] - loose), max(0, box[1] - loose), box[2] + loose, box[3] + loose), mask) is None


def test_the_manifest_refuses_it_with_record_and_target(tmp_path: Path) -> None:
    Image.new("L", (64, 48)).save(tmp_path / "a.png")
    mask = encode_mask(rectangle(*TRUE))
    targets = [
        Target(id=str(number), category="x", mask=mask, box=box) for number, box in enumerate([TRUE, (19, 13, 23, 23)])
    ]
    record = Record(id="r", image="a.png", modality="ct", source="s", case="c", targets=tuple(targets))
    write_records(tmp_path / "r.jsonl", [record])
    manifest = Manifest(tmp_path / "r.jsonl")
    for call in (manifest.check_files, lambda: manifest.masks(record), lambda: manifest.mask(record, targets[1])):
        with pytest.raises(InputError, match=r"record 'r', target '1': box \[19, 13, 23, 23\] .* COCO's"):
            call()
    assert manifest.mask(record, targets[0]).sum() == 23 * 23


def predicted(count: int, seed: int = 0) -> list[tuple[Box, Rle]]:
    """Boxes around rectangles that are far enough from the corner, and their masks."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        x0, y0 = rng.integers(20, 30, 2).tolist()
        x1, y1 = x0 + rng.integers(32, 60), y0 + rng.integers(32, 60)
        found.append(
            ((x0, y0, int(x1), int(y1)), encode_mask(rectangle(x0, y0, int(x1), int(y1), height=90, width=100)))
        )
    return found


def test_predicted_boxes_that_are_all_of_another_form_are_told() -> None:
    ours = predicted(20)
    assert form_of_boxes(ours) is None
    coco = [((x0, y0, x1 - x0, y1 - y0), mask) for (x0, y0, x1, y1), mask in ours]
    assert all(box[0] < box[2] and box[1] < box[3] for box, _ in coco)
    assert form_of_boxes(coco) == "COCO's [x, y, width, height]"
    assert form_of_boxes([*coco[:19], ((0, 0, 9, 9), coco[19][1])]) == "COCO's [x, y, width, height]"
    # A system may contradict itself now and then, and its masks are no truth.
    assert form_of_boxes([*coco[:10], *ours[10:]]) is None
    assert form_of_boxes([((0, 0, 12, 12), mask) for _, mask in ours]) is None
    # As an untrained model answers: everything as mask, the middle as box.
    everything = encode_mask(np.ones((90, 100), dtype=bool))
    assert form_of_boxes([((25, 22.5, 75, 67.5), everything)] * 16) is None


def test_predicted_boxes_in_shares_are_told_even_without_masks() -> None:
    shares: list[tuple[Box, Rle | None]] = [((0.25, 0.5, 0.75, 1), None), ((0, 0, 1, 1), None), ((0, 0, 0, 0), None)]
    assert form_of_boxes(shares) == "shares of the image's width and height"
    assert form_of_boxes([*shares, ((0.5, 0.5, 3, 4), None)]) is None
    assert form_of_boxes([((0, 0, 1, 1), None)]) is None
    assert form_of_boxes([]) is None
