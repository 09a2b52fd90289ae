"""The terms of L_end (paper, equation 4) and of L_sim as pure functions, and their weighted sums.

Each term is one value per target, (I,) in float32. `end_to_end_loss` sums them and divides by the counts of all ranks,
so that several ranks compute what one would.

Shapes: I targets, J targets whose masks are decoded, N supervised tokens, V vocabulary, H W mask, T image tokens,
Q class queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from medisee.config import Loss
from medisee.models.geometry import logits_to_original
from medisee.models.medisee import Output
from medisee.models.processing import Batch

DICE_SCALE = 1000.0
DICE_EPS = 1e-6


def text_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """L_txt: cross-entropy of each supervised token, (N,)."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")


def bce_loss(logits_IHW: Tensor, masks_IHW: Tensor) -> Tensor:
    """Per-pixel binary cross-entropy, mean over each mask, (I,)."""
    losses_IHW = F.binary_cross_entropy_with_logits(logits_IHW.float(), masks_IHW.float(), reduction="none")
    return losses_IHW.flatten(1).mean(1)


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
    """`giou_loss`, (I,), but if any box of an image has no area, all boxes of the image get the constant loss 1.

    The release drops the gradient of such images. The value 1 is ours and changes only the logged loss.
    """
    flat_I = torch.zeros(len(boxes_I4), dtype=torch.bool, device=boxes_I4.device)
    for boxes in (boxes_I4.float(), truth_I4.float()):
        flat_I |= (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
    constant_I = torch.isin(image_of_target_I, image_of_target_I[flat_I])
    return torch.where(constant_I, 1.0, giou_loss(boxes_I4, truth_I4))


def similarity_loss(similarity_IT: Tensor, coverage_IT: Tensor) -> Tensor:
    """Cross-entropy between the softmaxed similarity map and the true mask's `Batch.coverage_IT`, (I,)."""
    truth_IT = coverage_IT / coverage_IT.sum(1, keepdim=True).clamp(min=1e-6)
    return -(truth_IT * torch.log_softmax(similarity_IT.float(), dim=1)).sum(1)


def js_divergence(similarity_IT: Tensor, target_IT: Tensor) -> Tensor:
    """L_sim's first term: Jensen-Shannon divergence of two maps, softmaxed over the image tokens, (I,) in [0, ln 2].

    It is symmetric; the caller detaches the target. Both maps are dot products over sqrt(D).
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


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms before their weights, and their weighted sum; scalars, means over the micro-batches of all ranks.

    Each rank's values are multiplied by the number of ranks, so that their mean over ranks is the global mean.
    """

    total: Tensor
    text: Tensor
    bce: Tensor
    dice: Tensor
    l1: Tensor
    giou: Tensor
    similarity: Tensor
    js: Tensor
    mse: Tensor

    def detach(self) -> Terms:
        return Terms(*(getattr(self, field.name).detach() for field in fields(self)))


def end_to_end_loss(output: Output, batch: Batch, weights: Loss, *, world: int = 1, release: bool = False) -> Terms:
    """Computes L_end, with L_sim for class queries, and their terms.

    `world`: ranks over which the counts are summed. `release`: use `giou_loss_of_release`.
    """
    own = [len(batch.labels_N), len(batch.queries), len(batch.masked_J), len(batch.target_of_class_query_Q)]
    device = output.boxes_I4.device
    # Pinned, so that the host does not wait for the copy.
    counts = torch.tensor(own, dtype=torch.float32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    if world > 1:
        torch.distributed.all_reduce(counts)
    # At least one of each over all ranks, or what a batch without targets lacks would be 0 / 0.
    tokens, targets, masked, class_queries = (counts.clamp(min=1) / world).unbind()
    text = text_loss(output.text_logits_NV, batch.labels_N).sum() / tokens
    boxes_I4, truth_I4 = output.boxes_I4, batch.boxes_I4
    if truth_I4 is None or batch.coverage_IT is None:
        raise ValueError("a training batch needs masks and boxes")
    l1 = l1_loss(boxes_I4, truth_I4).sum() / targets
    giou_I = (
        giou_loss_of_release(boxes_I4, truth_I4, batch.image_of_target_I) if release else giou_loss(boxes_I4, truth_I4)
    )
    giou = giou_I.sum() / targets
    similarity = similarity_loss(output.similarity_IT, batch.coverage_IT).sum() / targets
    js = mse = bce = dice = torch.zeros((), device=boxes_I4.device)
    if output.class_similarity_QT is not None:
        maps_QT = (output.similarity_IT[batch.target_of_class_query_Q], output.class_similarity_QT)
        js, mse = (loss(*maps_QT).sum() / class_queries for loss in (js_divergence, similarity_mse))
    if output.masks_Jhh is not None:
        pairs = _mask_pairs(output.masks_Jhh, batch, decoder=weights.mask_resolution == "decoder")
        bce, dice = (torch.cat([loss(*pair) for pair in pairs]).sum() / masked for loss in (bce_loss, dice_loss))
    total = (
        weights.text * text
        + weights.bce * bce
        + weights.dice * dice
        + weights.box * (weights.l1 * l1 + weights.giou * giou)
        + weights.similarity * similarity
        + weights.js * js
        + weights.mse * mse
    )
    return Terms(total, text, bce, dice, l1, giou, similarity, js, mse)


def mean_terms(terms: Sequence[Terms], *, world: int = 1) -> Terms:
    """Returns the mean over micro-batches and ranks; all ranks must call it."""
    values = torch.stack([torch.stack([getattr(one, field.name) for field in fields(Terms)]) for one in terms]).mean(0)
    if world > 1:
        torch.distributed.all_reduce(values)
        values = values / world
    return Terms(*values.unbind())


def _mask_pairs(masks_Jhh: Tensor, batch: Batch, *, decoder: bool) -> list[tuple[Tensor, Tensor]]:
    # Logits and true masks: of all targets at the decoder's size, or each target alone at the size of its true mask,
    # which the processor has scaled.
    masks = [batch.masks[index] for index in batch.masked]
    if not masks:  # still a pair, so that the mask decoder gets a gradient, which other ranks wait for
        return [(masks_Jhh, torch.zeros_like(masks_Jhh))]
    if decoder:
        return [(masks_Jhh, F.adaptive_avg_pool2d(torch.stack(masks)[None], masks_Jhh.shape[-1])[0])]
    frames = [batch.frames[batch.image_of_target[index]] for index in batch.masked]
    return [
        (logits_to_original(logits, frame, (mask.shape[0], mask.shape[1]))[None], mask[None])
        for logits, frame, mask in zip(masks_Jhh, frames, masks, strict=True)
    ]
