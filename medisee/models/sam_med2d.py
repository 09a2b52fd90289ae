"""SAM-Med2D: SAM's ViT with an adapter in every block, trained on medical images at 256 pixels (arXiv 2308.16184).

It was trained with nearest-neighbour resizing; here images are resized bilinearly, as for every seg head. Tensor names
are those of the published weights.

Shapes: B images, H W height and width in patches, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition
from torch import Tensor, nn

from medisee.config.model import SegHeadConfig
from medisee.models.image_encoder import image_encoder
from medisee.models.seg_head import SamHead, assemble, vit_sizes


class Adapter(nn.Module):
    """Reweights channels by their mean over the image, mixes neighbours at half resolution, adds and normalises."""

    def __init__(self, width: int) -> None:
        super().__init__()
        reduced = width // 4
        self.norm = nn.LayerNorm(width)
        self.channel = nn.Sequential(
            nn.Linear(width, reduced, bias=False),
            nn.ReLU(),
            nn.Linear(reduced, width, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, kernel_size=4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, values_BHWC: Tensor) -> Tensor:
        """Maps (B, H, W, C) to (B, H, W, C); H and W even."""
        weighted_BHWC = values_BHWC * self.channel(values_BHWC.mean(dim=(1, 2)))[:, None, None]
        mixed_BHWC = self.spatial(weighted_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(values_BHWC + mixed_BHWC)


class AdaptedBlock(nn.Module):
    """A block of SAM's ViT with an adapter beside its MLP; takes over the parameters of the package's block."""

    def __init__(self, block: Block, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window_size = block.window_size
        self.Adapter = Adapter(width)  # published under this name

    def forward(self, values_BHWC: Tensor) -> Tensor:
        height, width = values_BHWC.shape[1:3]
        attended = self.norm1(values_BHWC)
        if self.window_size > 0:
            windows, padded = window_partition(attended, self.window_size)
            attended = window_unpartition(self.attn(windows), self.window_size, padded, (height, width))
        else:
            attended = self.attn(attended)
        values_BHWC = values_BHWC + attended
        normal_BHWC = self.norm2(values_BHWC)
        return values_BHWC + self.mlp(normal_BHWC) + self.Adapter(normal_BHWC)


class _NoOptimizer:
    # The published file also holds the optimizer, as an object; this takes its place.
    def __setstate__(self, state: Any) -> None:
        pass


def sam_med2d_head(config: SegHeadConfig, *, weights: bool = True) -> SamHead:
    """Builds SAM-Med2D; `weights=False` leaves it random, for a checkpoint that is loaded next."""
    sizes = vit_sizes(config)

    def encoder() -> nn.Module:
        plain = image_encoder(sizes, config.size)
        for index, block in enumerate(plain.blocks):
            plain.blocks[index] = AdaptedBlock(block, sizes.width)  # type: ignore[arg-type]
        return plain

    optimizers: list[Any] = [(_NoOptimizer, f"torch.optim.{name}") for name in ("adam.Adam", "adamw.AdamW")]
    with torch.serialization.safe_globals([*optimizers, (lambda *_: {}, "collections.defaultdict"), dict]):
        return assemble(encoder, config, weights=weights)
