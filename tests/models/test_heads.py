"""Routers, box decoder and text projection against plain numpy."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from medisee.models.heads import START_EDGE, BoxDecoder, Router, TextProjection

HIDDEN, WIDTH, TARGETS = 12, 7, 5


def router(tokens: int, mode: Literal["soft", "hard"] = "soft", pick: int = 0) -> Any:
    """A router, as Any: torch does not type the members of a Sequential."""
    torch.manual_seed(tokens)
    return Router(HIDDEN, tokens, width=WIDTH, mode=mode, pick=pick)


def states(tokens: int) -> Tensor:
    return torch.randn(TARGETS, tokens, HIDDEN, generator=torch.Generator().manual_seed(9))


def numpy_weights(router: Any, tokens_IKD: Tensor) -> np.ndarray:
    first, second = router.gate[0], router.gate[2]
    x = tokens_IKD.numpy().astype(np.float64).reshape(TARGETS, -1)
    hidden = x @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    gates = 1 / (1 + np.exp(-(hidden @ second.weight.detach().numpy().T + second.bias.detach().numpy())))
    return gates / gates.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("tokens", [1, 2, 3])
@torch.no_grad()
def test_soft_router_equals_numpy(tokens: int) -> None:
    own, x = router(tokens), 3 * states(tokens)
    expected = numpy_weights(own, x)
    np.testing.assert_allclose(own.weights(x).numpy(), expected, rtol=1e-5)
    fused = np.zeros((TARGETS, HIDDEN))
    for k in range(tokens):
        fused += expected[:, k : k + 1] * x[:, k].numpy()
    np.testing.assert_allclose(own(x).numpy(), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 3])
@torch.no_grad()
def test_soft_weights_sum_to_one(tokens: int) -> None:
    weights = router(tokens).weights(10 * states(tokens))
    assert weights.shape == (TARGETS, tokens)
    torch.testing.assert_close(weights.sum(1), torch.ones(TARGETS))
    assert (weights > 0).all()
    if tokens == 1:
        assert torch.equal(weights, torch.ones(TARGETS, 1))
    else:
        assert (weights < 1).all()
        assert weights.std(0).min() > 1e-3


@torch.no_grad()
def test_soft_weights_are_not_a_softmax() -> None:
    """Sigmoids divided by their sum: a bias that saturates all gates gives equal weights."""
    own = router(2)
    own.gate[2].bias.copy_(torch.tensor([20.0, 40.0]))
    torch.testing.assert_close(own.weights(states(2)), torch.full((TARGETS, 2), 0.5))


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("pick", ["first", "last"])
def test_hard_router_picks(tokens: int, pick: str) -> None:
    place = 0 if pick == "first" else tokens - 1
    own, x = router(tokens, "hard", place), states(tokens)
    assert torch.equal(own(x), x[:, place])
    assert own.weights(x).sum(1).tolist() == [1.0] * TARGETS
    assert not list(own.parameters())


def test_gradients_reach_every_token_and_the_gate() -> None:
    own, x = router(3), states(3).requires_grad_()
    own(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(dim=(0, 2)) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.parameters())


def test_the_order_of_tokens_matters() -> None:
    own, x = router(2), states(2)
    assert not torch.allclose(own(x), own(x.flip(1)))


@torch.no_grad()
def test_box_decoder_starts_at_the_centre_half_box() -> None:
    boxes = BoxDecoder(HIDDEN, WIDTH)(100 * torch.randn(TARGETS, HIDDEN))
    assert torch.equal(boxes, torch.full((TARGETS, 4), 0.5))


@torch.no_grad()
def test_box_decoder_starts_at_the_boxes_that_it_is_to_correct() -> None:
    start = torch.tensor([[0.3, 0.6, 0.2, 0.1], [0.5, -0.2, 1.4, 0.0]])
    boxes = BoxDecoder(HIDDEN, WIDTH)(torch.randn(2, HIDDEN), start)
    torch.testing.assert_close(boxes, start.clamp(START_EDGE, 1 - START_EDGE))


def test_a_start_at_the_edge_can_be_corrected() -> None:
    decoder: Any = BoxDecoder(HIDDEN, WIDTH)
    start = torch.tensor([[1.0, 0.0, 2.0, -1.0]])
    decoder(states(1)[:1, 0], start).sum().backward()
    assert (decoder.layers[4].bias.grad > 1e-3).all()


@torch.no_grad()
def test_box_decoder_equals_numpy() -> None:
    decoder: Any = BoxDecoder(HIDDEN, WIDTH)
    x = states(1)[:, 0]
    decoder.layers[4].weight.normal_()
    values = x.numpy()
    for place in (0, 2, 4):
        layer = decoder.layers[place]
        values = values @ layer.weight.numpy().T + layer.bias.numpy()
        values = np.maximum(values, 0) if place < 4 else 1 / (1 + np.exp(-values))
    np.testing.assert_allclose(decoder(x).numpy(), values, rtol=1e-4)
    assert decoder(x).shape == (TARGETS, 4)


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_boxes_are_float32_under_bfloat16(way: str) -> None:
    decoder: Any = BoxDecoder(HIDDEN, WIDTH)
    x = states(1)[:, 0]
    torch.nn.init.normal_(decoder.layers[4].weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        boxes = decoder(x) if way == "autocast" else decoder.bfloat16()(x.bfloat16())
    assert boxes.dtype == torch.float32
    assert not torch.equal(boxes, boxes.bfloat16().float())


def test_box_decoder_learns_from_its_start() -> None:
    decoder: Any = BoxDecoder(HIDDEN, WIDTH)
    (decoder(states(1)[:, 0]) - 0.2).square().sum().backward()
    last = decoder.layers[4]
    assert last.weight.grad is not None
    assert last.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_text_projection_is_linear_relu_linear() -> None:
    projection: Any = TextProjection(HIDDEN, 6)
    x = states(1)[:, 0]
    first, second = projection[0], projection[2]
    assert first.weight.shape == (HIDDEN, HIDDEN)
    hidden = np.maximum(x.numpy() @ first.weight.numpy().T + first.bias.numpy(), 0)
    expected = hidden @ second.weight.numpy().T + second.bias.numpy()
    np.testing.assert_allclose(projection(x).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert projection(x).shape == (TARGETS, 6)
