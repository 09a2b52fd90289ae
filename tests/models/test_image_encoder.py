"""The image encoder against the package's own: windows that need padding, global blocks, gradients, 16 bit, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from medisee.config.model import SamSizes
from medisee.models import image_encoder as module
from medisee.models.image_encoder import BiasedAttention, image_encoder, package_encoder

SIZES = SamSizes(width=32, depth=3, heads=2, global_attention=(1,), window=3, channels=16)
SIZE = 80  # 5 x 5 patches: windows of 3 are padded


def pair(sizes: SamSizes = SIZES, size: int = SIZE) -> tuple[ImageEncoderViT, ImageEncoderViT]:
    """Our encoder and the package's with the same weights, none of them zero."""
    torch.manual_seed(0)
    ours, theirs = image_encoder(sizes, size).eval(), package_encoder(sizes, size).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(count: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_equals_the_packages_encoder() -> None:
    ours, theirs = pair()
    embedded = ours(images())
    assert embedded.shape == (2, 16, 5, 5)
    same(embedded, theirs(images()))
    assert embedded.std() > 0.1
    assert [block.window_size for block in ours.blocks] == [3, 0, 3]


@given(
    patches=st.integers(2, 7),
    window=st.integers(2, 5),
    heads=st.sampled_from([1, 2, 4]),
    everywhere=st.booleans(),
    count=st.integers(1, 3),
)
@settings(max_examples=25)
@torch.no_grad()
def test_it_equals_the_packages_encoder_at_any_size(
    patches: int, window: int, heads: int, everywhere: bool, count: int
) -> None:
    sizes = SamSizes(
        width=16, depth=2, heads=heads, global_attention=(0, 1) if everywhere else (), window=window, channels=16
    )
    ours, theirs = pair(sizes, 16 * patches)
    same(ours(images(count, 16 * patches)), theirs(images(count, 16 * patches)))


def test_names_and_order_of_the_weights_are_the_packages() -> None:
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(isinstance(block.attn, BiasedAttention) for block in ours.blocks)


def gradients(encoder: nn.Module) -> dict[str, Tensor]:
    pixels = images().requires_grad_()
    encoder(pixels).square().mean().backward()
    assert pixels.grad is not None
    return {"pixels": pixels.grad} | {
        name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None
    }


def test_gradients_equal_the_packages() -> None:
    ours, theirs = pair()
    own, expected = gradients(ours), gradients(theirs)
    assert own.keys() == expected.keys()
    assert len(own) == 1 + len(list(ours.parameters()))
    for name, gradient in own.items():
        same(gradient, expected[name])
        assert gradient.abs().max() > 0, name


@torch.no_grad()
def test_the_position_bias_counts() -> None:
    ours, _ = pair()
    before = ours(images())
    for name, parameter in ours.named_parameters():
        if "rel_pos" in name:
            parameter.zero_()
    assert (ours(images()) - before).abs().max() > 1e-2


@pytest.mark.parametrize("learns", [False, True])
def test_no_bias_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch, learns: bool) -> None:
    ours, theirs = pair()
    held = []
    own = module.F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        held.append(attn_mask.numel())
        return own(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(module, "BIAS_ELEMENTS", 2 * 25**2)  # one image of global attention
    with torch.set_grad_enabled(learns):
        embedded = ours(images(3))
    same(embedded, theirs(images(3)))
    assert max(held) == 2 * 25**2
    assert held.count(2 * 25**2) == 3
    assert sum(numbers < 2 * 25**2 for numbers in held) == 2 * 2  # 12 windows, 7 of them at once


def largest_kept(encoder: nn.Module, pixels: Tensor) -> int:
    """Numbers in the largest tensor that the graph keeps for the backward pass."""
    kept = [0]

    def keep(value: Tensor) -> Tensor:
        kept.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        encoder(pixels)
    return max(kept)


def test_learning_keeps_no_attention_map() -> None:
    size = 320  # 20 x 20 patches: a map of 2 x 400 x 400 is larger than any activation
    ours, theirs = pair(size=size)
    assert largest_kept(theirs, images(1, size)) >= 2 * 400**2
    assert largest_kept(ours, images(1, size)) < 2 * 400**2


@torch.no_grad()
def test_it_runs_in_bfloat16() -> None:
    ours, theirs = pair()
    exact = theirs(images())
    with torch.autocast("cpu", torch.bfloat16):
        cast = ours(images())
    halved = ours.bfloat16()(images().bfloat16())
    error = (theirs.bfloat16()(images().bfloat16()).float() - exact).abs().mean()
    assert halved.dtype == torch.bfloat16
    for rounded in (cast, halved):
        assert (rounded.float() - exact).abs().mean() < 1.5 * error
