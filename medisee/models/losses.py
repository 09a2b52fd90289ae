"""The terms of L_end (paper, equation 4) and of L_sim as pure functions, each reduced per target: (I,) float32.

A caller sums them and divides by a count of its own, so that several ranks agree with one.

Shapes: I targets, N supervised tokens, V vocabulary, H W mask, T image tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

DICE_SCALE = 1000.0
DICE_EPS = 1e-6


def text_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """L_txt: cross-entropy of each supervised token, (N,)."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")


def bce_loss(logits_IHW: Tensor, masks_IHW: Tensor) -> Tensor:
    """Per-pixel binary cross-entropy, mean over each mask, (I,)."""
    return (
        F.binary_cross_entropy_with_logits(logits_IHW.float(), masks_IHW.float(), reduction="none").flatten(1).mean(1)
    )


def dice_loss(logits_IHW: Tensor, masks_IHW: Tensor) -> Tensor:
    """The release's Dice: 1 - (2 sum(pt)/1000 + 1e-6) / ((sum p + sum t)/1000 + 1e-6), (I,)."""
    probability, truth = logits_IHW.float().sigmoid().flatten(1), masks_IHW.float().flatten(1)
    overlap = 2 * (probability * truth / DICE_SCALE).sum(1)
    total = (probability / DICE_SCALE).sum(1) + (truth / DICE_SCALE).sum(1)
    return 1 - (overlap + DICE_EPS) / (total + DICE_EPS)


def l1_loss(boxes_I4: Tensor, truth_I4: Tensor) -> Tensor:
    """Mean absolute difference of normalised xyxy, (I,)."""
    return (boxes_I4.float() - truth_I4.float()).abs().mean(1)


def giou_loss(boxes_I4: Tensor, truth_I4: Tensor) -> Tensor:
    """1 - GIoU of normalised xyxy, (I,); finite with a gradient for degenerate boxes too."""
    return generalized_box_iou_loss(boxes_I4.float(), truth_I4.float(), reduction="none")


def giou_loss_of_release(boxes_I4: Tensor, truth_I4: Tensor, image_of_target_I: Tensor) -> Tensor:
    """`giou_loss`, but 1 without a gradient for all boxes of an image in which one has no area, (I,).

    This takes the gradient of whole images, as the release does. The constant's value is ours: it moves nothing but
    the logged loss.
    """
    flat_I = torch.zeros(len(boxes_I4), dtype=torch.bool, device=boxes_I4.device)
    for boxes in (boxes_I4.float(), truth_I4.float()):
        flat_I |= (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
    constant_I = torch.isin(image_of_target_I, image_of_target_I[flat_I])
    return torch.where(constant_I, 1.0, giou_loss(boxes_I4, truth_I4))


def similarity_loss(similarity_IT: Tensor, coverage_IT: Tensor) -> Tensor:
    """Cross-entropy between the softmaxed similarity map and the true mask spread over the image tokens, (I,).

    Args:
        similarity_IT: scaled dot products sim(h_img, h_seg).
        coverage_IT: share of each image token's area that the true mask covers, in [0, 1].
    """
    total = coverage_IT.sum(1, keepdim=True)
    truth_IT = coverage_IT / total.clamp(min=1e-6)
    return -(truth_IT * torch.log_softmax(similarity_IT.float(), dim=1)).sum(1)


def js_divergence(similarity_IT: Tensor, target_IT: Tensor) -> Tensor:
    """L_sim's first term: Jensen-Shannon divergence of two maps, softmaxed over the image tokens, (I,) in [0, ln 2].

    Symmetric in its arguments, so the caller says which of them is the target by detaching it.

    Args:
        similarity_IT: dot products sim(h_img, h_seg) over sqrt(D). The paper leaves the scale open; this one, that of
            attention, is our choice.
        target_IT: of the same scale.
    """
    first_IT = torch.log_softmax(similarity_IT.float(), dim=1)
    second_IT = torch.log_softmax(target_IT.float(), dim=1)
    # In logarithms: a share that underflows would give 0 * log 0.
    middle_IT = torch.logaddexp(first_IT, second_IT) - math.log(2)
    to_middle_IT = first_IT.exp() * (first_IT - middle_IT) + second_IT.exp() * (second_IT - middle_IT)
    return (to_middle_IT.sum(1) / 2).clamp(0, math.log(2))


def similarity_mse(similarity_IT: Tensor, target_IT: Tensor) -> Tensor:
    """L_sim's second term: mean squared difference of two maps, (I,); arguments as in `js_divergence`."""
    return (similarity_IT.float() - target_IT.float()).square().mean(1)
