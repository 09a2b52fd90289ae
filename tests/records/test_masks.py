"""Run-length encoding and boxes around masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from medisee.foundation.errors import InputError
from medisee.records.masks import Rle, check_rle, decode_mask, encode_mask, mask_box

masks = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=24))


@given(masks)
def test_rle_round_trip(mask: np.ndarray) -> None:
    rle = encode_mask(mask)
    decoded = decode_mask(rle)
    assert rle.size == mask.shape
    assert decoded.dtype == np.bool_ and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, mask)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
@given(masks)
def test_pycocotools_decodes_the_same(mask: np.ndarray) -> None:
    rle = encode_mask(mask)
    theirs = coco.decode({"size": list(rle.size), "counts": rle.counts.encode()})
    np.testing.assert_array_equal(theirs.astype(bool), decode_mask(rle))


@given(st.integers(1, 3000), st.lists(st.integers(0, 3000), min_size=1, max_size=6))
def test_long_runs_round_trip(height: int, rows: list[int]) -> None:
    """Long runs need several characters a number, and differences to earlier runs have both signs."""
    mask = np.zeros((height, 3), dtype=bool)
    for index, row in enumerate(rows):
        mask[row % height :, index % 3] ^= True
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)


def test_encoding_is_cocos() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 2] = True
    rle = encode_mask(mask)
    assert coco.area({"size": list(rle.size), "counts": rle.counts.encode()}) == 2
    assert encode_mask(np.ones((4, 5), dtype=bool)).counts == "0d0"


@given(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.text(max_size=12))
def test_any_string_decodes_or_is_refused(size: tuple[int, int], counts: str) -> None:
    """pycocotools alone would return uninitialised pixels for many of these."""
    try:
        mask = decode_mask(Rle(size, counts))
    except InputError as error:
        assert "RLE" in str(error) and "expected" in str(error)
    else:
        assert mask.shape == size


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        (Rle((4, 4), ""), "do not decode"),
        (Rle((4, 4), "zzzz"), "do not decode"),
        (Rle((4, 4), "é"), "do not decode"),
        (Rle((4, 4), "P"), "do not decode"),
        (Rle((4, 4), "PPPPPPPPPP0"), "do not decode"),
        (Rle((4, 4), "0"), "cover 0 pixels; expected 4 x 4 = 16"),
        (Rle((0, 4), "0"), "size [0, 4] is wrong"),
        (Rle((10**6, 10**6), "0"), "size [1000000, 1000000] is wrong"),
    ],
)
def test_bad_rle_is_refused(rle: Rle, message: str) -> None:
    with pytest.raises(InputError, match="RLE") as caught:
        check_rle(rle)
    assert message in str(caught.value)


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((1, 2, 2), bool), np.zeros((0, 2), bool)])
def test_only_a_boolean_plane_is_encoded(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="boolean array"):
        encode_mask(array)


def test_box_is_half_open() -> None:
    mask = np.zeros((10, 8), dtype=bool)
    assert mask_box(mask) is None
    mask[4, 3] = True
    assert mask_box(mask) == (3, 4, 4, 5)
    assert mask_box(np.ones((10, 8), dtype=bool)) == (0, 0, 8, 10)


@given(masks)
def test_box_is_the_smallest(mask: np.ndarray) -> None:
    box = mask_box(mask)
    if box is None:
        assert not mask.any()
        return
    x0, y0, x1, y1 = map(int, box)
    inner = mask[y0:y1, x0:x1]
    assert inner.sum() == mask.sum()
    assert inner[0].any() and inner[-1].any() and inner[:, 0].any() and inner[:, -1].any()
