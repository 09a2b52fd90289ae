"""The small heads of the paper's figure 5: routers, box decoder, text projection.

Shapes: I targets, K candidate tokens, D hidden width, C prompt channels.
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
