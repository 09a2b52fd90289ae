"""The map of a query over its image: how well h_seg fits each image token (as in the paper's L_sim), and where that is.

Shapes: I targets, T image tokens, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPREADS = 3.0
"""Sides of `map_box` in standard deviations: an even rectangle has sqrt(12) = 3.5 of its own, a map also strays."""


def similarity_map(image_ITD: Tensor, segmentation_ID: Tensor) -> Tensor:
    """Returns the dot products of image tokens (I, T, D) with h_seg (I, D), over sqrt(D): (I, T), float32."""
    # Autocast would take the products in 16 bit, and boxes may be read off them.
    with torch.autocast(image_ITD.device.type, enabled=False):
        products_IT = torch.einsum("itd,id->it", image_ITD.float(), segmentation_ID.float())
    return products_IT / image_ITD.shape[-1] ** 0.5


def map_box(similarity_IT: Tensor, places_IT4: Tensor) -> Tensor:
    """Returns the box that a map spreads over: its mean, and SPREADS standard deviations along each axis.

    Args:
        similarity_IT: a map; its softmax, with each token weighted by its area in the image, is taken as a density.
        places_IT4: (cx, cy, w, h) of each image token, from `token_places`.

    Returns:
        Normalised (cx, cy, w, h), (I, 4), float32; it may pass the image's border.
    """
    centres_IT2, sides_IT2 = places_IT4.split(2, dim=2)
    density_IT1 = (similarity_IT.float() + sides_IT2.prod(dim=2).log()).softmax(dim=1)[..., None]
    mean_I2 = (density_IT1 * centres_IT2).sum(1)
    # A token's own extent counts, as that of an even rectangle: a map of one token has a token's size.
    squares_IT2 = (centres_IT2 - mean_I2[:, None]) ** 2 + sides_IT2**2 / 12
    return torch.cat([mean_I2, SPREADS * (density_IT1 * squares_IT2).sum(1).sqrt()], dim=1)
