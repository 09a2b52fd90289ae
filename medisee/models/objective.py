"""L_end of the paper (equation 4): weighted sum of text, mask and box losses, means over all ranks' targets. In
fine-tuning, L_sim is added: a mean over the targets that have a plain query.

Shapes: I targets, J targets whose masks are decoded, N supervised tokens, T image tokens, Q plain queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from medisee.config import Loss
from medisee.geometry import logits_to_original
from medisee.models import losses
from medisee.models.medisee import Output
from medisee.processing import Batch


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
    """Computes L_end, with L_sim where the batch has plain queries, and their terms.

    Args:
        output: of MediSee.forward.
        batch: with answers, masks and boxes.
        weights: lambda of every term.
        world: number of ranks; above 1 the counts are summed over them.
    """
    own = [len(batch.labels_N), len(batch.queries), len(batch.masked_J), len(batch.target_of_plain_Q)]
    counts = torch.tensor(own, device=output.boxes_I4.device, dtype=torch.float32)
    if world > 1:
        torch.distributed.all_reduce(counts)
    tokens, targets, masked, plain = (counts / world).unbind()
    text = losses.text_loss(output.text_logits_NV, batch.labels_N).sum() / tokens
    boxes_I4, truth_I4 = output.boxes_I4, batch.boxes_I4
    if truth_I4 is None or batch.coverage_IT is None:
        raise ValueError("a training batch needs masks and boxes")
    l1 = losses.l1_loss(boxes_I4, truth_I4).sum() / targets
    giou = _giou_loss(boxes_I4, truth_I4, batch, weights).sum() / targets
    similarity = losses.similarity_loss(output.similarity_IT, batch.coverage_IT).sum() / targets
    js, mse = (value / plain.clamp(min=1 / world) for value in _plain_losses(output, batch))
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
        return losses.giou_loss_of_release(boxes_I4, truth_I4, batch.image_of_target_I)
    return losses.giou_loss(boxes_I4, truth_I4)


def _plain_losses(output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
    if output.plain_similarity_QT is None:
        zero = torch.zeros((), device=output.boxes_I4.device)
        return zero, zero
    similarity_QT = output.similarity_IT[batch.target_of_plain_Q]
    return (
        losses.js_divergence(similarity_QT, output.plain_similarity_QT).sum(),
        losses.similarity_mse(similarity_QT, output.plain_similarity_QT).sum(),
    )


def _mask_losses(output: Output, batch: Batch, weights: Loss) -> tuple[Tensor, Tensor]:
    if output.masks_Jhh is None:
        zero = torch.zeros((), device=output.boxes_I4.device)
        return zero, zero
    if weights.mask_resolution == "decoder":
        truth_Jhh = torch.stack([batch.masks[index] for index in batch.masked_J.tolist()])
        truth_Jhh = F.adaptive_avg_pool2d(truth_Jhh[None], output.masks_Jhh.shape[-1])[0]
        return (
            losses.bce_loss(output.masks_Jhh, truth_Jhh).sum(),
            losses.dice_loss(output.masks_Jhh, truth_Jhh).sum(),
        )
    frames = [batch.frames[index] for index in batch.image_of_target_I[batch.masked_J].tolist()]
    masks = [batch.masks[index] for index in batch.masked_J.tolist()]
    # The processor has scaled the true masks; a mask of the image's own size is one that it left alone.
    pairs = [
        (logits_to_original(logits, frame, (mask.shape[0], mask.shape[1]))[None], mask[None])
        for logits, frame, mask in zip(output.masks_Jhh, frames, masks, strict=True)
    ]
    return (
        torch.stack([losses.bce_loss(*pair) for pair in pairs]).sum(),
        torch.stack([losses.dice_loss(*pair) for pair in pairs]).sum(),
    )
