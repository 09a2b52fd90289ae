"""SAM's image encoder: the segment-anything package's ViT with a fused attention kernel.

The package writes the attention map to memory several times. Here torch's scaled dot-product attention computes it,
with the decomposed relative position bias as its mask. Parameter names are the package's, so published weights fit.

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
BIAS_ELEMENTS = 1 << 28  # of the largest bias held at once: one image of global attention at 1024 pixels, ViT-H


class BiasedAttention(nn.Module):
    """Attention with a decomposed relative position bias; takes over the parameters of the package's attention."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, values_BHWC: Tensor) -> Tensor:
        """Attends within each image or window: (B, H, W, C) -> (B, H, W, C)."""
        # The bias has M N^2 elements per image, 0.8 GB at 1024 pixels (ViT-B, float32). If it is that large, images go
        # one after another, and an encoder that learns recomputes it in the backward pass instead of keeping it.
        batch, height, width, _ = values_BHWC.shape
        count = height * width
        qkv = self.qkv(values_BHWC).reshape(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        rows_HHE = get_rel_pos(height, height, self.rel_pos_h)
        columns_WWE = get_rel_pos(width, width, self.rel_pos_w)
        step = max(1, BIAS_ELEMENTS // (self.num_heads * count**2))
        attend: Callable[..., Tensor] = _attend
        if torch.is_grad_enabled() and qkv.requires_grad:
            attend = partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)
        parts = [attend(*part.unbind(0), rows_HHE, columns_WWE) for part in qkv.split(step, dim=1)]
        attended_BMNE = torch.cat(parts)
        return self.proj(attended_BMNE.transpose(1, 2).reshape(batch, height, width, -1))


def _attend(query_BMNE: Tensor, key_BMNE: Tensor, value_BMNE: Tensor, rows_HHE: Tensor, columns_WWE: Tensor) -> Tensor:
    places_BMHWE = query_BMNE.unflatten(2, (len(rows_HHE), len(columns_WWE)))
    # The package computes the bias from the query before scaling.
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
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]: as the published encoders were trained
    )


def image_encoder(sizes: SamSizes, size: int) -> ImageEncoderViT:
    """Builds the same encoder with the fused kernel: (B, 3, size, size) -> (B, channels, size / 16, size / 16)."""
    encoder = package_encoder(sizes, size)
    for block in encoder.blocks:
        block.attn = BiasedAttention(block.attn)  # type: ignore[arg-type]
    return encoder
