"""The map of a query over its image tokens, and the box that it spreads over."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medisee.models.geometry import fit, token_places
from medisee.models.heads import SPREADS, map_box, similarity_map

SIDE = SPREADS / math.sqrt(12)  # of an even rectangle of side 1


@pytest.mark.parametrize("autocast", [False, True])
def test_a_map_is_a_scaled_dot_product(autocast: bool) -> None:
    image_ITD, segmentation_ID = torch.randn(2, 5, 9, dtype=torch.bfloat16), torch.randn(2, 9)
    expected = (image_ITD.float() * segmentation_ID[:, None]).sum(2) / 3
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = similarity_map(image_ITD, segmentation_ID)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.data())
def test_an_even_rectangle_comes_back(grid: int, data: st.DataObject) -> None:
    """Mean and spread of a map that is flat on a rectangle of tokens and nothing elsewhere."""
    x0, y0 = data.draw(st.integers(0, grid - 1)), data.draw(st.integers(0, grid - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, grid)), data.draw(st.integers(y0 + 1, grid))
    similarity = torch.full((grid, grid), -1e4)
    similarity[y0:y1, x0:x1] = 7.0
    box = map_box(similarity.reshape(1, -1), token_places(fit(32, 32, 32, "stretch"), grid, "frame")[None])
    expected = torch.tensor([[(x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * SIDE, (y1 - y0) * SIDE]]) / grid
    torch.testing.assert_close(box, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_a_constant_added_to_a_map_moves_nothing(shift: float) -> None:
    places = token_places(fit(20, 40, 32, "longest"), 4, "frame")[None]
    similarity = torch.randn(1, 16)
    torch.testing.assert_close(map_box(similarity + shift, places), map_box(similarity, places), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("over", ["frame", "pad"])
@pytest.mark.parametrize("size", [(30, 70), (70, 30), (64, 64), (8, 640)])
def test_padding_counts_for_nothing(over: Literal["frame", "pad"], size: tuple[int, int]) -> None:
    """An even map spreads over the whole image, whatever its shape, and every coordinate can learn."""
    places = token_places(fit(*size, 64, "longest"), 4, over)[None]
    similarity = torch.zeros(1, 16)
    torch.testing.assert_close(map_box(similarity, places), torch.tensor([[0.5, 0.5, SIDE, SIDE]]))
    similarity = torch.randn(1, 16, requires_grad=True)
    box = map_box(similarity, places)
    assert ((box > 0) & (box < 1)).all()
    for coordinate in (0, 1) if 8 in size else range(4):
        (gradient,) = torch.autograd.grad(box[0, coordinate], similarity, retain_graph=True)
        assert gradient.isfinite().all()
        assert 8 in size or gradient.abs().sum() > 0
