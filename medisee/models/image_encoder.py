"""SAM's image encoder: the segment-anything package's ViT with a fused attention kernel in its blocks.

The package writes the attention map out several times. Here it goes through torch's scaled dot-product attention, and
the decomposed relative position bias is its mask. Parameter names are the package's, so published weights fit.

Shapes: B images or windows, H W their height and width in patches, N = H W, M heads, E width of a head, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medisee.config.model import SamSizes

PATCH = 16
BIAS_ELEMENTS = 1 << 28
"""Largest bias that is held at once, in numbers: one image of global attention at 1024 pixels, ViT-H."""


class BiasedAttention(nn.Module):
    """Attention with a decomposed relative position bias; takes over the parameters of the package's attention."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, values_BHWC: Tensor) -> Tensor:
        """Attends within each image or window: (B, H, W, C) -> (B, H, W, C).

        The bias has M N^2 numbers an image, 0.8 GB for one of 1024 pixels (ViT-B, float32): images go one after
        another where it is that large, and what learns computes it again in the backward pass instead of keeping it.
        """
        batch, height, width, _ = values_BHWC.shape
        count = height * width
        qkv = self.qkv(values_BHWC).reshape(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        rows_HHE = get_rel_pos(height, height, self.rel_pos_h)
        columns_WWE = get_rel_pos(width, width, self.rel_pos_w)
        step = max(1, BIAS_ELEMENTS // (self.num_heads * count**2))
        learns = torch.is_grad_enabled() and qkv.requires_grad
        attend: Callable[..., Tensor] = _attend
        if learns:
            attend = partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)
        parts = [attend(*part.unbind(0), rows_HHE, columns_WWE) for part in qkv.split(step, dim=1)]
        attended_BMNE = torch.cat(parts)
        return self.proj(attended_BMNE.transpose(1, 2).reshape(batch, height, width, -1))


def _attend(query_BMNE: Tensor, key_BMNE: Tensor, value_BMNE: Tensor, rows_HHE: Tensor, columns_WWE: Tensor) -> Tensor:
    places_BMHWE = query_BMNE.unflatten(2, (len(rows_HHE), len(columns_WWE)))
    # The package takes the bias from the query before it is scaled.
    vertical_BMHWH = torch.einsum("bmhwe,hke->bmhwk", places_BMHWE, rows_HHE)
    horizontal_BMHWW = torch.einsum("bmhwe,wke->bmhwk", places_BMHWE, columns_WWE)
    bias = (vertical_BMHWH[..., :, None] + horizontal_BMHWW[..., None, :]).flatten(4).flatten(2, 3)
    return F.scaled_dot_product_attention(query_BMNE, key_BMNE, value_BMNE, attn_mask=bias)


def package_encoder(sizes: SamSizes, size: int) -> ImageEncoderViT:
    """Builds the package's own encoder, with random weights, for a frame of side `size` pixels."""
    return ImageEncoderViT(
        img_size=size,
        patch_size=PATCH,
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        global_attn_indexes=sizes.global_attention,
        out_chans=sizes.channels,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=sizes.window,
        norm_layer=_LayerNorm,
    )


def image_encoder(sizes: SamSizes, size: int) -> ImageEncoderViT:
    """Builds the encoder that computes the same with the fused kernel: (B, 3, size, size) -> (B, channels, G, G).

    Args:
        sizes: the ViT's.
        size: side of the square frame, pixels; a multiple of 16.
    """
    encoder = package_encoder(sizes, size)
    for block in encoder.blocks:
        block.attn = BiasedAttention(block.attn)  # type: ignore[arg-type]
    return encoder


class _LayerNorm(nn.LayerNorm):
    # SAM's published encoders were trained with this epsilon.
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)
