"""The small heads of the paper's figure 5: routers, box decoder, text projection, and the similarity map.

Shapes: I targets, K candidate tokens, D hidden width, C prompt channels, T image tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

START_EDGE = 0.005
"""A box's start lies at least so far from 0 and from 1, since the decoder could not correct what lies further out. The map
learns nothing from a coordinate that was moved there."""


class Router(nn.Module):
    """R_s or R_d: weighs the candidate tokens' states and sums them (paper, equation 2).

    `soft`: concat -> Linear -> GELU -> Linear -> sigmoid -> divided by their sum. `hard`: no parameters, the state of
    token `pick` (Table 4).
    """

    def __init__(self, hidden: int, tokens: int, *, width: int, mode: Literal["soft", "hard"], pick: int) -> None:
        super().__init__()
        self.mode, self.pick, self.tokens = mode, pick, tokens
        if mode == "soft":
            self.gate = nn.Sequential(nn.Linear(tokens * hidden, width), nn.GELU(), nn.Linear(width, tokens))

    def weights(self, tokens_IKD: Tensor) -> Tensor:
        """Returns the weights (I, K), each row summing to 1."""
        if self.mode == "hard":
            picked = torch.zeros(tokens_IKD.shape[:2], dtype=tokens_IKD.dtype, device=tokens_IKD.device)
            picked[:, self.pick] = 1
            return picked
        gates_IK = self.gate(tokens_IKD.flatten(1)).sigmoid()
        return gates_IK / gates_IK.sum(dim=1, keepdim=True)

    def forward(self, tokens_IKD: Tensor) -> Tensor:
        """Fuses (I, K, D) into (I, D)."""
        return (self.weights(tokens_IKD)[..., None] * tokens_IKD).sum(dim=1)

    def picked(self, tokens_IKD: Tensor) -> Tensor:
        """Returns the state of token `pick` alone, (I, D)."""
        return tokens_IKD[:, self.pick]


class BoxDecoder(nn.Module):
    """G_b: h_det (I, D) -> normalised (cx, cy, w, h) in [0, 1].

    The last layer starts at zero: the first boxes are the centre half box, or those that `start_I4` names.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
        last = self.layers[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, detection_ID: Tensor, start_I4: Tensor | None = None) -> Tensor:
        """Returns (I, 4) in float32: bf16 would step by 4 pixels above 512.

        Args:
            detection_ID: h_det.
            start_I4: boxes that are corrected, not decoded from nothing (`Model.box_start`).
        """
        logits_I4 = self.layers(detection_ID).float()
        return (logits_I4 if start_I4 is None else logits_I4 + start_I4.logit(eps=START_EDGE)).sigmoid()


class TextProjection(nn.Sequential):
    """h_seg (I, D) -> one sparse prompt token (I, C) of the mask decoder."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, channels))


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
