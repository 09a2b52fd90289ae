"""The small heads of the paper's figure 5: routers, box decoder, text projection, and the similarity map.

Shapes: I targets, K candidate tokens, D hidden width, C prompt channels, T image tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

START_EDGE = 0.005  # least distance of a box's start from 0 and 1; one further out could not be corrected
SPREADS = 3.0  # sides of `map_box` in standard deviations: those of an even rectangle are 3.5, but a map also strays


class Router(nn.Module):
    """R_s or R_d: the weighted sum of the candidate tokens' states (paper, equation 2).

    `soft`: concat -> Linear -> GELU -> Linear -> sigmoid -> divided by their sum. `hard`: the state of token `pick`,
    without parameters (Table 4).
    """

    def __init__(self, hidden: int, tokens: int, *, width: int, mode: Literal["soft", "hard"], pick: int) -> None:
        super().__init__()
        self.mode, self.pick = mode, pick
        if mode == "soft":
            self.gate = nn.Sequential(nn.Linear(tokens * hidden, width), nn.GELU(), nn.Linear(width, tokens))

    def weights(self, tokens_IKD: Tensor) -> Tensor:
        """Returns the weights (I, K), each row summing to 1."""
        if self.mode == "hard":
            picked_IK = torch.zeros_like(tokens_IKD[..., 0])
            picked_IK[:, self.pick] = 1
            return picked_IK
        gates_IK = self.gate(tokens_IKD.flatten(1)).sigmoid()
        return gates_IK / gates_IK.sum(dim=1, keepdim=True)

    def forward(self, tokens_IKD: Tensor) -> Tensor:
        """Fuses (I, K, D) into (I, D)."""
        return (self.weights(tokens_IKD)[..., None] * tokens_IKD).sum(dim=1)


class BoxDecoder(nn.Module):
    """G_b: h_det (I, D) -> normalised (cx, cy, w, h) in [0, 1].

    The last layer starts at zero, so the first boxes are `start_I4`, or the central box of half the image's sides.
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
        """Corrects the boxes `start_I4` by h_det: (I, 4) in float32, since bfloat16 rounds to 4 pixels above 512."""
        logits_I4 = self.layers(detection_ID).float()
        return (logits_I4 if start_I4 is None else logits_I4 + start_I4.logit(eps=START_EDGE)).sigmoid()


class TextProjection(nn.Sequential):
    """h_seg (I, D) -> one prompt token (I, C) of the mask decoder."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, channels))


def similarity_map(image_ITD: Tensor, segmentation_ID: Tensor) -> Tensor:
    """Returns the dot products of image tokens (I, T, D) with h_seg (I, D), over sqrt(D): (I, T), float32."""
    # Autocast would compute in 16 bit, but boxes may be read off the map.
    with torch.autocast(image_ITD.device.type, enabled=False):
        products_IT = torch.einsum("itd,id->it", image_ITD.float(), segmentation_ID.float())
    return products_IT / image_ITD.shape[-1] ** 0.5


def map_box(similarity_IT: Tensor, places_IT4: Tensor) -> Tensor:
    """Returns the extent of a map: its mean, and SPREADS standard deviations along each axis.

    The density is the map's softmax, weighted by each token's area in the image (`token_places`). Returns normalised
    (cx, cy, w, h), (I, 4), float32, which may cross the image's border.
    """
    centres_IT2, sides_IT2 = places_IT4.split(2, dim=2)
    density_IT1 = (similarity_IT.float() + sides_IT2.prod(dim=2).log()).softmax(dim=1)[..., None]
    mean_I2 = (density_IT1 * centres_IT2).sum(1)
    # A token counts as an even rectangle, so that a map on one token has its size.
    squares_IT2 = (centres_IT2 - mean_I2[:, None]) ** 2 + sides_IT2**2 / 12
    return torch.cat([mean_I2, SPREADS * (density_IT1 * squares_IT2).sum(1).sqrt()], dim=1)
