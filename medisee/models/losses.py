"""The terms of L_end (paper, equation 4) and of L_sim as pure functions, and their weighted sums.

Each term is reduced per target, (I,) in float32. `end_to_end_loss` sums them and divides by counts over all ranks, so
that several ranks agree with one.

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


@dataclass(frozen=True, slots=True)
class Terms:
    """Every term before its weight, and their weighted sum; means over the global micro-batch, scalars.

    Under several ranks each holds its own share times the number of ranks, so that the ranks' mean is the global mean.
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
        """Returns the values without their graph."""
        return Terms(*(getattr(self, field.name).detach() for field in fields(self)))


def end_to_end_loss(output: Output, batch: Batch, weights: Loss, *, world: int = 1) -> Terms:
    """Computes L_end, with L_sim where the batch has class queries, and their terms.

    Args:
        output: of MediSee.forward.
        batch: with answers, masks and boxes.
        weights: lambda of every term.
        world: number of ranks; above 1 the counts are summed over them.
    """
    own = [len(batch.labels_N), len(batch.queries), len(batch.masked_J), len(batch.target_of_class_query_Q)]
    device = output.boxes_I4.device
    # Pinned, so that the host does not wait for the copy.
    counts = torch.tensor(own, dtype=torch.float32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    if world > 1:
        torch.distributed.all_reduce(counts)
    tokens, targets, masked, plain = (counts / world).unbind()
    text = text_loss(output.text_logits_NV, batch.labels_N).sum() / tokens
    boxes_I4, truth_I4 = output.boxes_I4, batch.boxes_I4
    if truth_I4 is None or batch.coverage_IT is None:
        raise ValueError("a training batch needs masks and boxes")
    l1 = l1_loss(boxes_I4, truth_I4).sum() / targets
    giou = _giou_loss(boxes_I4, truth_I4, batch, weights).sum() / targets
    similarity = similarity_loss(output.similarity_IT, batch.coverage_IT).sum() / targets
    js, mse = (value / plain.clamp(min=1 / world) for value in _class_query_losses(output, batch))
    bce, dice = (value / masked for value in _mask_losses(output, batch, weights))
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
    """Returns the mean over micro-batches, and over ranks: every rank calls it."""
    values = torch.stack([torch.stack([getattr(one, field.name) for field in fields(Terms)]) for one in terms]).mean(0)
    if world > 1:
        torch.distributed.all_reduce(values)
        values = values / world
    return Terms(*values.unbind())


def _giou_loss(boxes_I4: Tensor, truth_I4: Tensor, batch: Batch, weights: Loss) -> Tensor:
    if weights.degenerate_giou == "constant":
        return giou_loss_of_release(boxes_I4, truth_I4, batch.image_of_target_I)
    return giou_loss(boxes_I4, truth_I4)


def _class_query_losses(output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
    if output.class_similarity_QT is None:
        zero = torch.zeros((), device=output.boxes_I4.device)
        return zero, zero
    similarity_QT = output.similarity_IT[batch.target_of_class_query_Q]
    return (
        js_divergence(similarity_QT, output.class_similarity_QT).sum(),
        similarity_mse(similarity_QT, output.class_similarity_QT).sum(),
    )


def _mask_losses(output: Output, batch: Batch, weights: Loss) -> tuple[Tensor, Tensor]:
    if output.masks_Jhh is None:
        zero = torch.zeros((), device=output.boxes_I4.device)
        return zero, zero
    if weights.mask_resolution == "decoder":
        truth_Jhh = torch.stack([batch.masks[index] for index in batch.masked_J.tolist()])
        truth_Jhh = F.adaptive_avg_pool2d(truth_Jhh[None], output.masks_Jhh.shape[-1])[0]
        return (
            bce_loss(output.masks_Jhh, truth_Jhh).sum(),
            dice_loss(output.masks_Jhh, truth_Jhh).sum(),
        )
    frames = [batch.frames[index] for index in batch.image_of_target_I[batch.masked_J].tolist()]
    masks = [batch.masks[index] for index in batch.masked_J.tolist()]
    # The processor has scaled the true masks; a mask of the image's own size is one that it left alone.
    pairs = [
        (logits_to_original(logits, frame, (mask.shape[0], mask.shape[1]))[None], mask[None])
        for logits, frame, mask in zip(output.masks_Jhh, frames, masks, strict=True)
    ]
    return (
        torch.stack([bce_loss(*pair) for pair in pairs]).sum(),
        torch.stack([dice_loss(*pair) for pair in pairs]).sum(),
    )
