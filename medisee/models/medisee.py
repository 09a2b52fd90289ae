"""MediSee: the paper's figure 5 as code. Read `forward` first, then `locate`.

Names are the paper's: f image features, G language model, h_c candidate states, R_s and R_d routers, h_seg and h_det
their fused states, Sim similarity map, B boxes, M masks.

Shapes: B images, S sequences, I targets, J targets whose masks are decoded, K candidate tokens, L sequence length, D
hidden width, C prompt channels, T image tokens, Q class queries, N supervised tokens, V vocabulary, G embedding grid, h
decoder output side, A longest written answer, P prefix length, X = I + Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedTokenizerBase

from medisee.config.model import Model
from medisee.foundation.errors import InputError
from medisee.models.generation import write_answers
from medisee.models.geometry import boxes_to_frame, cxcywh_to_xyxy, token_places
from medisee.models.heads import BoxDecoder, Router, TextProjection, map_box, similarity_map
from medisee.models.lite_medsam import lite_medsam_head
from medisee.models.mllm import load_mllm, seg_head_tokens
from medisee.models.packing import block_mask, flex_mask, use_flex
from medisee.models.processing import Batch, MediSeeProcessor
from medisee.models.sam_med2d import sam_med2d_head
from medisee.models.seg_head import Prompts, SamHead, sam_head
from medisee.weights.checkpoints import load_checkpoint, local_checkpoint, push_checkpoint, save_checkpoint
from medisee.weights.llava import pinned_device
from medisee.weights.tokenizer import decode

MaskDetail = Literal["none", "coarse", "full"]


# No slots: DeepSpeed finds a module's tensors with vars().
@dataclass(frozen=True)
class Regions:
    """Where the targets are."""

    boxes_I4: Tensor  # B, normalised xyxy, float32
    masks_Jhh: Tensor | None  # M, mask logits of the seg head's frame; None if masks were left out
    similarity_IT: Tensor  # Sim(h_img, h_seg), dot products over sqrt(D); the paper leaves the scale open
    class_similarity_QT: Tensor | None  # the maps of the class queries, without gradient; None if there are none


@dataclass(frozen=True)
class Output(Regions):
    """What one forward pass computes: `text_logits_NV` are the logits that predict the supervised tokens."""

    text_logits_NV: Tensor


@dataclass(frozen=True, slots=True)
class Generated:
    """Answers that the model wrote, one per query; boxes and masks, as in Regions, are meaningless if not emitted."""

    texts: tuple[str, ...]  # without special tokens
    emitted: tuple[bool, ...]  # whether all candidate tokens were written
    boxes_I4: Tensor
    masks_Jhh: Tensor


class MediSee(nn.Module):
    """The model: MLLM -> candidate states -> two routers -> box decoder, then mask decoder."""

    def __init__(self, config: Model, tokenizer: PreTrainedTokenizerBase, *, weights: bool = True) -> None:
        """Builds the model; `weights` loads the published weights of frozen parts. The tokenizer has the candidates."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        build = {"sam_med2d": sam_med2d_head, "lite_medsam": lite_medsam_head}.get(config.seg_head.kind, sam_head)
        self.seg_head: SamHead = build(config.seg_head, weights=weights)
        spec = self.seg_head.spec
        self.mllm = load_mllm(config.mllm, tokenizer, spec, config.candidate_tokens)
        hidden: int = self.mllm.config.get_text_config().hidden_size
        tokens = len(config.candidate_tokens)
        routers = {"width": config.router_hidden, "mode": config.fusion}
        self.seg_router = Router(hidden, tokens, pick=0, **routers)
        self.box_router = Router(hidden, tokens, pick=tokens - 1, **routers)
        self.box_decoder = BoxDecoder(hidden, config.box_hidden)
        self.text_projection = TextProjection(hidden, spec.channels)
        self.processor = MediSeeProcessor(config, tokenizer, spec)
        self.unpadded = False  # see Train.unpadded

    def forward(self, batch: Batch, *, masks: MaskDetail = "full") -> Output:
        """Reads the answers given in the batch (teacher forcing) and predicts text, boxes and masks.

        Args:
            batch: from MediSeeProcessor; every query has an answer with the candidate tokens.
            masks: `full`: run the mask decoder. `coarse`: run it on features of half the side, at about a quarter of
                the cost. `none`: leave it out.
        """
        f_BCGG = self.embed_images(batch)  # f = G_enc(x_img)
        h_SLD = self.hidden_states(batch, f_BCGG)  # G(x_img, x_txt)
        h_c_IKD, class_c_QKD = self.candidate_states(batch, h_SLD)
        regions = self.locate(batch, f_BCGG, h_SLD, h_c_IKD, class_c_QKD=class_c_QKD, masks=masks)
        text_logits_NV = self.text_logits(h_SLD[batch.supervised_N2[:, 0], batch.supervised_N2[:, 1]])
        return Output(**vars(regions), text_logits_NV=text_logits_NV)

    def locate(
        self,
        batch: Batch,
        f_BCGG: Tensor,
        h_SLD: Tensor,
        h_c_IKD: Tensor,
        *,
        class_c_QKD: Tensor | None = None,
        masks: MaskDetail = "full",
        release: bool = False,
    ) -> Regions:
        """Decodes candidate states into boxes and masks: the right half of figure 5.

        Args:
            batch: what the states were computed from.
            f_BCGG: image features.
            h_SLD: last states; only those of image tokens are read.
            h_c_IKD, class_c_QKD: candidate states of the targets and of the class queries.
            masks: see `forward`.
            release: as the release decodes what it wrote: first and last candidate state, no routers, no box prompt.
        """
        # One call, even without class queries: under ZeRO 3 all ranks must gather the router's weights equally often.
        h_c_XKD = h_c_IKD if class_c_QKD is None else torch.cat([h_c_IKD, class_c_QKD])
        h_seg_XD = h_c_XKD[:, 0] if release else self.seg_router(h_c_XKD)  # h_seg = R_s(h_c)
        h_seg_ID, class_seg_QD = h_seg_XD.split([len(h_c_IKD), len(h_seg_XD) - len(h_c_IKD)])
        h_det_ID = h_c_IKD[:, -1] if release else self.box_router(h_c_IKD)  # h_det = R_d(h_c)
        similarity_IT = self._similarity(h_SLD, batch.sequence_of_target_I, h_seg_ID)  # Sim(h_img, h_seg)
        centred_I4 = self.box_decoder(h_det_ID, self._box_start(batch, similarity_IT))  # B = G_b(h_det)
        masks_Jhh = None
        if masks != "none":
            features_BCGG = F.avg_pool2d(f_BCGG, 2) if masks == "coarse" else f_BCGG
            prompts, image_of_mask_J = self._prompts(batch, h_seg_ID, centred_I4, box=not release)
            masks_Jhh = self.seg_head.decode(features_BCGG, prompts, image_of_mask_J)  # M = G_dec(f, h_seg, B)
        class_similarity_QT = None
        if len(class_seg_QD):
            class_similarity_QT = self._similarity(h_SLD.detach(), batch.class_sequence_Q, class_seg_QD.detach())
        return Regions(cxcywh_to_xyxy(centred_I4), masks_Jhh, similarity_IT, class_similarity_QT)

    @torch.inference_mode()
    def generate(self, batch: Batch, *, max_new_tokens: int, release: bool = False) -> Generated:
        """Writes the answers greedily with a KV cache and locates what they mark; `release`: see `locate`.

        The candidate states are those that predicted the candidate tokens, as in `forward`. The batch is unpacked (one
        query per sequence) and without answers.
        """
        f_BCGG, language_model = self.embed_images(batch), self.mllm.model.language_model
        # The prefix of an image is read once for all its queries.
        prefix, images = len(self.processor.prefix), range(len(batch.frames))
        first_B = torch.stack([(batch.image_of_sequence_S == image).int().argmax() for image in images])
        prefix_BP = batch.input_ids_SL[first_B, :prefix]
        inputs_BPD = self.embed_inputs(batch, f_BCGG, prefix_BP, batch.image_of_sequence_S[first_B])
        mask_BPP = self._attention_mask(batch.segments_SL[first_B, :prefix], inputs_BPD.dtype)
        read = language_model(inputs_embeds=inputs_BPD, attention_mask=mask_BPP, use_cache=True)
        ids_SA, states_SAD = write_answers(
            self.mllm,
            read.past_key_values,
            batch,
            prefix=prefix,
            max_new_tokens=max_new_tokens,
            end_id=self.processor.end_id,
            pad_id=self.processor.pad_id,
            never=self.processor.image_id,
        )
        wanted_K = torch.tensor(self.processor.candidate_ids, device=ids_SA.device)
        found_SKA = ids_SA[:, None, :] == wanted_K[None, :, None]
        rows_S1 = torch.arange(len(ids_SA), device=ids_SA.device)[:, None]
        h_c_IKD = states_SAD.to(self.head_dtype)[rows_S1, found_SKA.int().argmax(dim=2)]
        h_SPD = read.last_hidden_state[batch.image_of_sequence_S]
        regions = self.locate(batch, f_BCGG, h_SPD, h_c_IKD, release=release)
        assert regions.masks_Jhh is not None
        ends = (self.processor.end_id, self.processor.pad_id)
        texts = [decode(self.tokenizer, [token for token in ids if token not in ends]) for ids in ids_SA.tolist()]
        emitted = tuple(found_SKA.any(dim=2).all(dim=1).tolist())
        return Generated(tuple(text.strip() for text in texts), emitted, regions.boxes_I4, regions.masks_Jhh)

    def train(self, mode: bool = True) -> MediSee:
        """Sets training or evaluation mode, and the attention kernel with it: flex attention is only for training."""
        super().train(mode)
        if self.config.mllm.attention == "flex":
            use_flex(self.mllm, training=mode)
        return self

    @property
    def head_dtype(self) -> torch.dtype:
        """The type of routers and decoders: float32, even if the language model is stored in 16 bit."""
        return self.text_projection[0].weight.dtype  # type: ignore[return-value]

    def embed_images(self, batch: Batch) -> Tensor:
        """Returns f = G_enc(x_img), (B, C, G, G), or the cached features of the batch."""
        if batch.embedding_BCGG is not None:
            return batch.embedding_BCGG
        if batch.pixels_B3FF is None:
            raise ValueError("a batch needs pixels or cached embeddings")
        return self.seg_head.encode(batch.pixels_B3FF)

    def hidden_states(self, batch: Batch, f_BCGG: Tensor) -> Tensor:
        """Returns the language model's last states (S, L, D), after the final norm."""
        inputs_SLD = self.embed_inputs(batch, f_BCGG, batch.input_ids_SL, batch.image_of_sequence_S)
        return self.read_sequences(inputs_SLD, batch)

    def embed_inputs(self, batch: Batch, f_BCGG: Tensor, input_ids_SL: Tensor, image_of_sequence_S: Tensor) -> Tensor:
        """Returns what the language model reads, (S, L, D): embedded token ids, with image tokens in their places."""
        inputs_SLD = self.mllm.get_input_embeddings()(input_ids_SL)
        if self.config.mllm.image_tokens == "seg_head":
            projector = self.mllm.model.multi_modal_projector
            features = seg_head_tokens(f_BCGG, self.config.mllm.image_grid)
            images_BTD = projector(features.to(projector.linear_1.weight.dtype))
        elif batch.vision_B3VV is not None:
            seen: Any = self.mllm.get_image_features(batch.vision_B3VV.to(self.mllm.dtype))
            images_BTD = torch.stack(seen.pooler_output)
        else:
            raise ValueError("a batch needs pixels for the vision tower")
        image_SL = input_ids_SL == self.processor.image_id
        return inputs_SLD.masked_scatter(image_SL[..., None], images_BTD[image_of_sequence_S].to(inputs_SLD.dtype))

    def read_sequences(self, inputs_SLD: Tensor, batch: Batch) -> Tensor:
        """Runs the language model's layers over a batch's embedded sequences, (S, L, D) -> (S, L, D)."""
        if not (self.unpadded and self.training):
            return self._read(inputs_SLD, batch.positions_SL, batch.segments_SL)
        read = []
        for row, end in enumerate(batch.lengths):
            parts = (whole[row, None, :end] for whole in (inputs_SLD, batch.positions_SL, batch.segments_SL))
            read.append(F.pad(self._read(*parts), (0, 0, 0, inputs_SLD.shape[1] - end)))
        return torch.cat(read)

    def _read(self, inputs_SLD: Tensor, positions_SL: Tensor, segments_SL: Tensor) -> Tensor:
        return self.mllm.model.language_model(
            inputs_embeds=inputs_SLD,
            position_ids=positions_SL,
            attention_mask=self._attention_mask(segments_SL, inputs_SLD.dtype),
            use_cache=False,
        ).last_hidden_state

    def _attention_mask(self, segments_SL: Tensor, dtype: torch.dtype) -> Tensor | BlockMask:
        full = self.config.mllm.prefix_attention == "full"
        if self.config.mllm.attention == "flex" and self.training:
            return flex_mask(segments_SL, full_prefix=full)
        return block_mask(segments_SL, dtype, full_prefix=full)

    def candidate_states(self, batch: Batch, h_SLD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns h_c of the targets (I, K, D) and, without gradient, of the class queries (Q, K, D)."""
        if any(query.answer is None for query in batch.queries):
            raise ValueError("a query without an answer has no candidate states")
        h_c_IKD = h_SLD[batch.sequence_of_target_I[:, None], batch.candidates_IK].to(self.head_dtype)
        class_c_QKD = h_SLD.detach()[batch.class_sequence_Q[:, None], batch.class_candidates_QK].to(self.head_dtype)
        return h_c_IKD, class_c_QKD

    def text_logits(self, states_ND: Tensor) -> Tensor:
        """Returns the next token's logits (N, V); `<image>` occurs in inputs only and is never the next token."""
        padding = -len(states_ND) % self.config.mllm.pad_to
        logits_NV = self.mllm.lm_head(F.pad(states_ND, (0, 0, 0, padding)))[: len(states_ND)]
        logits_NV[..., self.processor.image_id] = float("-inf")
        return logits_NV

    def _similarity(self, h_SLD: Tensor, sequence_I: Tensor, h_seg_ID: Tensor) -> Tensor:
        start = self.processor.image_start
        h_img_STD = h_SLD[:, start : start + self.processor.image_tokens]
        return similarity_map(h_img_STD[sequence_I], h_seg_ID)

    def _box_start(self, batch: Batch, similarity_IT: Tensor) -> Tensor | None:
        if self.config.box_start == "centre":
            return None
        mllm = self.config.mllm
        over = "frame" if mllm.image_tokens == "seg_head" else mllm.vision_input
        places_BT4 = torch.stack([token_places(frame, self.processor.image_grid, over) for frame in batch.frames])
        return map_box(similarity_IT, places_BT4.to(similarity_IT.device)[batch.image_of_target_I])

    def _prompts(self, batch: Batch, h_seg_ID: Tensor, centred_I4: Tensor, *, box: bool) -> tuple[Prompts, Tensor]:
        """Returns what prompts the mask decoder for the J targets, and their images."""
        # Gradients flow through the predicted box into the box decoder; the true box prompts where the batch says so.
        image_of_mask_J = batch.image_of_target_I[batch.masked_J]
        frames = [batch.frames[batch.image_of_target[index]] for index in batch.masked]
        place = partial(boxes_to_frame, frames=frames, scale=self.config.box_frame)
        centred_J4 = centred_I4[batch.masked_J]
        if self.config.box_dtype == "bfloat16":  # all that follows is rounded, also in the prompt encoder
            boxes_J4 = cxcywh_to_xyxy(place(centred_J4).bfloat16())
        else:
            boxes_J4 = place(cxcywh_to_xyxy(centred_J4))
        if batch.boxes_I4 is not None:
            true_J4 = place(batch.boxes_I4[batch.masked_J]).to(boxes_J4.dtype)
            boxes_J4 = torch.where(batch.true_box_I[batch.masked_J, None], true_J4, boxes_J4)
        prompts = Prompts(
            text=self.text_projection(h_seg_ID[batch.masked_J]) if "text" in self.config.prompts else None,
            boxes=boxes_J4 if box and "box" in self.config.prompts else None,
        )
        return prompts, image_of_mask_J

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        bits: int | None = None,
        device_map: str | None = None,
    ) -> MediSee:
        """Loads a checkpoint, strictly, in evaluation mode.

        Args:
            folder_or_hub_id: a folder that `save_pretrained` or training wrote, or the hub id it was pushed to.
            revision: branch, tag or commit of a hub id.
            device: where the model goes; None: the CPU, or where its language model is if that cannot be moved.
            bits: holds the layers of a published language model in 4 or 8 bits, which needs an NVIDIA GPU and
                bitsandbytes; None: as the checkpoint says.
            device_map: "auto" spreads those layers over all GPUs and main memory; None: as the checkpoint says.

        Raises:
            InputError: not a checkpoint, or one that cannot be loaded; see `load_checkpoint` and `placed`.
        """
        folder = local_checkpoint(folder_or_hub_id, revision)
        return load_checkpoint(folder, cls, bits=bits, device_map=device_map).placed(device).eval()

    @property
    def pinned_device(self) -> torch.device | None:
        """The device of a language model that cannot be moved; None if it can."""
        return pinned_device(self.mllm)

    def placed(self, device: torch.device | str | None) -> MediSee:
        """Moves the model (None: to the CPU). A language model in 4 or 8 bits or over several devices stays in place.

        Raises:
            InputError: such a language model takes its inputs on another device.
        """
        pinned = self.pinned_device
        wanted = torch.device(device or pinned or "cpu")
        if pinned is not None and (wanted.type != pinned.type or wanted.index not in (None, pinned.index)):
            raise InputError(
                f"device = {wanted}: the language model is held in 4 or 8 bits, or spread over devices, and takes its "
                f"inputs on {pinned}; leave the device out, or choose GPUs with CUDA_VISIBLE_DEVICES."
            )
        return self.to(pinned or wanted)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a checkpoint folder atomically, in place of an older checkpoint there.

        Raises:
            InputError: the folder holds something else.
        """
        save_checkpoint(self, Path(folder).resolve())

    def push_to_hub(self, hub_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads a checkpoint to the Hugging Face hub and returns the commit's address.

        Args:
            hub_id: "owner/name" of a repository, created if it does not exist.
            private: of a new repository; None: the owner's default.
            token: of the hub; None: the one of `hf auth login`.

        Raises:
            InputError: the hub refuses it or cannot be reached.
        """
        return push_checkpoint(self, hub_id, private=private, token=token)
