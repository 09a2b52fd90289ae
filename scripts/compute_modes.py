"""The compute modes of a training step that bench_train.py compares: same model, same losses, different work.

Shapes: B images, S sequences, L sequence length, D hidden width, I targets, K candidate tokens, N positions, V vocabulary,
C channels of the image encoder's features, G their side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medisee.config import Loss
from medisee.models.image_encoder import package_encoder
from medisee.models.losses import Terms, end_to_end_loss
from medisee.models.medisee import MaskDetail, MediSee, Output
from medisee.models.processing import Batch, Example
from medisee.models.seg_head import vit_sizes
from medisee.planning.workload import CACHED, OURS, RELEASE, ComputeMode
from medisee.training.optimization import TrainingLoss

MODES = {
    "release": replace(RELEASE, name="unpacked, all logits"),
    "packed": ComputeMode("packed, all logits", all_logits=True),
    "supervised": replace(OURS, name="packed, supervised logits"),
    "cached": replace(CACHED, name="the same, features cached"),
    "bounded": replace(CACHED, name="the same, small mask losses"),
}
MASK_RESOLUTION = {"bounded": "decoder"}  # mask losses not at the images' size: the total loss differs
IGNORED = -100  # label of a position that is not supervised: cross_entropy leaves it out


def use_package(model: MediSee) -> None:
    """Lets the seg head compute as the segment-anything package does, which the release uses, with the same weights."""
    config, head = model.config.seg_head, model.seg_head
    package = package_encoder(vit_sizes(config), config.size).requires_grad_(False).eval()
    package.load_state_dict(head.image_encoder.state_dict())
    head.image_encoder = package

    def upscale(source_IGGC: Tensor, kernel_IU: Tensor) -> Tensor:
        upscaled = head.mask_decoder.output_upscaling(source_IGGC.permute(0, 3, 1, 2))
        return torch.einsum("ic,ichw->ihw", kernel_IU, upscaled)

    head.upscale = upscale


@torch.no_grad()
def make_batch(model: MediSee, examples: Sequence[Example], mode: ComputeMode, weights: Loss) -> Batch:
    """Builds the batch that a mode reads; cached features are computed here, outside what is timed."""
    batch = model.processor(examples, mask_resolution=weights.mask_resolution, packed=mode.packed)
    if mode.vision_per_query and batch.vision_B3VV is not None:
        vision_B3VV = batch.vision_B3VV[batch.image_of_sequence_S]
        batch = replace(batch, vision_B3VV=vision_B3VV, image_of_sequence_S=torch.arange(len(vision_B3VV)))
    if mode.cached:
        batch = replace(batch, embedding_BCGG=model.embed_images(batch), pixels_B3FF=None)
    return batch


def language_states(model: MediSee, inputs_SLD: Tensor, batch: Batch, mode: ComputeMode) -> Tensor:
    """Runs the language model's layers: (S, L, D) -> (S, L, D)."""
    if mode.packed:
        return model.read_sequences(inputs_SLD, batch)
    # Padding comes last, where no causal position sees it: the kernel needs no mask, and is faster without.
    language: Any = model.mllm.model.language_model
    return language(inputs_embeds=inputs_SLD, use_cache=False).last_hidden_state


def all_logits(model: MediSee, hidden_SLD: Tensor) -> Tensor:
    """Returns the logits at every position, (S L, V): all of MediSee.text_logits but `<image>`, which is the last."""
    # Overwriting its logits, as MediSee does, would copy their gradient, which is large here.
    return F.linear(hidden_SLD.flatten(0, 1), model.mllm.lm_head.weight[: model.processor.image_id])


def all_labels(batch: Batch) -> Tensor:
    """Returns a label for every position, (S L,): IGNORED where nothing is supervised."""
    labels_SL = torch.full_like(batch.input_ids_SL, IGNORED)
    labels_SL[batch.supervised_N2[:, 0], batch.supervised_N2[:, 1]] = batch.labels_N
    return labels_SL.flatten()


class ModeLoss(TrainingLoss):
    """Model and loss in one of the modes; values differ only where masks are compared at another resolution."""

    def __init__(self, model: MediSee, weights: Loss, mode: ComputeMode, *, dtype: torch.dtype) -> None:
        super().__init__(model, weights, dtype=dtype, world=1)
        self.mode = mode

    def forward(self, batch: Batch, *, masks: MaskDetail) -> tuple[Tensor, ...]:
        if not self.mode.all_logits:
            return super().forward(batch, masks=masks)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            output = self._output(batch)
            # end_to_end_loss divides by the number of labels, and only some of these are supervised.
            labels_N = all_labels(batch)
            share = len(labels_N) / len(batch.labels_N)
            weights = self.weights.model_copy(update={"text": self.weights.text * share})
            terms = end_to_end_loss(output, replace(batch, labels_N=labels_N), weights)
        others = replace(terms.detach(), text=terms.text.detach() * share)
        return tuple(getattr(terms if field.name == "total" else others, field.name) for field in fields(Terms))

    def _output(self, batch: Batch) -> Output:
        """Computes what MediSee.forward does, with the logits of every position."""
        model = self.model
        features_BCGG = model.embed_images(batch)
        hidden_SLD = language_states(model, input_states(model, batch, features_BCGG), batch, self.mode)
        tokens_IKD, class_QKD = model.candidate_states(batch, hidden_SLD)
        regions = model.locate(batch, features_BCGG, hidden_SLD, tokens_IKD, class_c_QKD=class_QKD)
        return Output(**vars(regions), text_logits_NV=all_logits(model, hidden_SLD))


def input_states(model: MediSee, batch: Batch, features_BCGG: Tensor) -> Tensor:
    """Returns what the language model reads, (S, L, D), image tokens included."""
    return model.embed_inputs(batch, features_BCGG, batch.input_ids_SL, batch.image_of_sequence_S)
