"""MediSee: the paper's figure 5 as code. Read `forward` first.

Shapes: B images, S sequences, I targets, J targets whose masks are decoded, K candidate tokens, L sequence length, D hidden width, C prompt channels,
T image tokens, Q class queries, N supervised tokens, V vocabulary, G embedding grid, h decoder output side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedTokenizerBase

from medisee.config.model import Model
from medisee.config.run import Decoding
from medisee.foundation.errors import InputError
from medisee.models.generation import left_padded, read_prefix, write_answers
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


# No slots: DeepSpeed looks for a module's tensors by vars().
@dataclass(frozen=True)
class Output:
    """What one forward pass computes.

    Attributes:
        boxes_I4: normalised xyxy, float32.
        masks_Jhh: mask logits of the seg head's frame; None when masks were not asked for.
        text_logits_NV: logits at the supervised positions.
        similarity_IT: dot products of h_seg with the image tokens' last states, over sqrt(D). The paper leaves the scale
            open; this one, that of attention, is our choice.
        class_similarity_QT: the same maps for the class queries, without gradient; None when there are none.
    """

    boxes_I4: Tensor
    masks_Jhh: Tensor | None
    text_logits_NV: Tensor
    similarity_IT: Tensor
    class_similarity_QT: Tensor | None


@dataclass(frozen=True, slots=True)
class Generated:
    """Answers that the model wrote itself, one a query.

    Attributes:
        texts: decoded answers without special tokens.
        emitted: whether all candidate tokens were written.
        boxes_I4, masks_Jhh: as in Output; meaningless where nothing was emitted.
    """

    texts: tuple[str, ...]
    emitted: tuple[bool, ...]
    boxes_I4: Tensor
    masks_Jhh: Tensor


class MediSee(nn.Module):
    """The model: MLLM -> candidate states -> two routers -> box decoder, then mask decoder."""

    def __init__(self, config: Model, tokenizer: PreTrainedTokenizerBase, *, weights: bool = True) -> None:
        """Builds the model.

        Args:
            config: every size and choice.
            tokenizer: with the candidate tokens.
            weights: load the frozen parts' published weights.
        """
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.seg_head = build_seg_head(config, weights=weights)
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
        """Reads the answers given in the batch (teacher-forced) and predicts text, boxes and masks.

        Args:
            batch: from MediSeeProcessor; every query has an answer that holds the candidate tokens.
            masks: `full`: run the mask decoder. `coarse`: on features of half the side, at about a quarter of the cost.
                `none`: leave it out.
        """
        embedding_BCGG = self.embed_images(batch)
        hidden_SLD = self.hidden_states(batch, embedding_BCGG)
        tokens_IKD = hidden_SLD[batch.sequence_of_target_I[:, None], batch.candidates_IK].to(self.head_dtype)
        class_QKD = hidden_SLD.detach()[batch.class_sequence_Q[:, None], batch.class_candidates_QK].to(self.head_dtype)
        # One call, even without class queries: under ZeRO 3 every rank must gather the router's weights as often.
        segmentation_XD = self.seg_router(torch.cat([tokens_IKD, class_QKD]))
        segmentation_ID, class_QD = segmentation_XD.split([len(tokens_IKD), len(class_QKD)])
        similarity_IT = self._similarity(hidden_SLD, batch.sequence_of_target_I, segmentation_ID)
        centred_I4 = self.box_decoder(self.box_router(tokens_IKD), self._box_start(batch, similarity_IT))
        features_BCGG = F.avg_pool2d(embedding_BCGG, 2) if masks == "coarse" else embedding_BCGG
        masks_Jhh = None if masks == "none" else self.decode_masks(batch, features_BCGG, segmentation_ID, centred_I4)
        supervised_ND = hidden_SLD[batch.supervised_N2[:, 0], batch.supervised_N2[:, 1]]
        return Output(
            boxes_I4=cxcywh_to_xyxy(centred_I4),
            masks_Jhh=masks_Jhh,
            text_logits_NV=self.text_logits(supervised_ND),
            similarity_IT=similarity_IT,
            class_similarity_QT=self._class_similarity(batch, hidden_SLD, class_QD),
        )

    def train(self, mode: bool = True) -> MediSee:
        """Sets training or evaluation mode, and with it the attention kernel: flex attention is for training."""
        super().train(mode)
        if self.config.mllm.attention == "flex":
            use_flex(self.mllm, training=mode)
        return self

    @property
    def head_dtype(self) -> torch.dtype:
        """The type of routers and decoders: float32, even where the language model is stored in 16 bit."""
        return self.text_projection[0].weight.dtype  # type: ignore[return-value]

    def embed_images(self, batch: Batch) -> Tensor:
        """Returns f = G_enc(x_img), (B, C, G, G), from the cache where the batch brings it."""
        if batch.embedding_BCGG is not None:
            return batch.embedding_BCGG
        if batch.pixels_B3FF is None:
            raise ValueError("a batch needs pixels or cached embeddings")
        return self.seg_head.encode(batch.pixels_B3FF)

    def hidden_states(self, batch: Batch, embedding_BCGG: Tensor) -> Tensor:
        """Returns the language model's last states (S, L, D), after the final norm; one packed sequence an image."""
        inputs_SLD = self._embed_inputs(batch.input_ids_SL, batch.image_of_sequence_S, batch, embedding_BCGG)
        return self.read_sequences(inputs_SLD, batch)

    def read_sequences(self, inputs_SLD: Tensor, batch: Batch) -> Tensor:
        """Runs the language model's layers over a batch's embedded sequences, (S, L, D) -> (S, L, D)."""
        if not (self.unpadded and self.training):
            return self._read(inputs_SLD, batch.positions_SL, batch.segments_SL)
        read = [
            self._read(
                inputs_SLD[row, None, :end], batch.positions_SL[row, None, :end], batch.segments_SL[row, None, :end]
            )
            for row, end in enumerate(batch.lengths)
        ]
        return torch.cat([F.pad(states, (0, 0, 0, inputs_SLD.shape[1] - states.shape[1])) for states in read])

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

    def text_logits(self, states_ND: Tensor) -> Tensor:
        """Returns the next token's logits (N, V); `<image>` stands in inputs only and is never a next token."""
        padding = -len(states_ND) % self.config.mllm.pad_to
        logits_NV = self.mllm.lm_head(F.pad(states_ND, (0, 0, 0, padding)))[: len(states_ND)]
        logits_NV[..., self.processor.image_id] = float("-inf")
        return logits_NV

    def decode_masks(
        self,
        batch: Batch,
        embedding_BCGG: Tensor,
        segmentation_ID: Tensor,
        centred_I4: Tensor,
        *,
        box_prompt: bool = True,
    ) -> Tensor:
        """Returns M = G_dec(f, h_seg, B): mask logits (J, h, h) of the frame; without B where box_prompt is false.

        Gradients flow through the predicted box, (cx, cy, w, h), into the box decoder. Where the batch says so, the true
        box prompts.
        """
        # The release rounds the box before its corners and its place are computed: three roundings, not one.
        dtype = torch.bfloat16 if self.config.box_dtype == "bfloat16" else torch.float32
        boxes_I4 = cxcywh_to_xyxy(centred_I4.to(dtype))
        if batch.boxes_I4 is not None:
            boxes_I4 = torch.where(batch.true_box_I[:, None], batch.boxes_I4, boxes_I4)
        image_of_mask_J = batch.image_of_target_I[batch.masked_J]
        frames = [batch.frames[index] for index in image_of_mask_J.tolist()]
        text, box = ("text" in self.config.prompts, "box" in self.config.prompts and box_prompt)
        prompts = Prompts(
            text=self.text_projection(segmentation_ID[batch.masked_J]) if text else None,
            boxes=boxes_to_frame(boxes_I4[batch.masked_J], frames, self.config.box_frame).to(dtype) if box else None,
        )
        return self.seg_head.decode(embedding_BCGG, prompts, image_of_mask_J)

    @torch.inference_mode()
    def generate(self, batch: Batch, *, max_new_tokens: int, decoding: Decoding = "routed") -> Generated:
        """Writes the answers greedily with a KV cache and reads the states where the candidate tokens are written.

        Args:
            batch: unpacked (one query a sequence), without answers.
            max_new_tokens: longest answer.
            decoding: see `Eval.decoding`.
        """
        embedding_BCGG = self.embed_images(batch)
        prefix = len(self.processor.prefix)
        first_B = torch.stack(
            [(batch.image_of_sequence_S == image).int().argmax() for image in range(len(batch.frames))]
        )
        prefix_BP = batch.input_ids_SL[first_B, :prefix]
        inputs_BPD = self._embed_inputs(prefix_BP, batch.image_of_sequence_S[first_B], batch, embedding_BCGG)
        mask_BPP = self._attention_mask(batch.segments_SL[first_B, :prefix], inputs_BPD.dtype)
        read = read_prefix(self.mllm.model.language_model, inputs_BPD, mask_BPP)
        written = write_answers(
            self.mllm,
            read.cache,
            prefix_BP[0],
            left_padded(batch.input_ids_SL[:, prefix:], batch.segments_SL[:, prefix:]),
            image_of_sequence_S=batch.image_of_sequence_S,
            max_new_tokens=max_new_tokens,
            end_id=self.processor.end_id,
            pad_id=self.processor.pad_id,
            never=self.processor.image_id,
        )
        tokens_IKD, emitted = self._written_candidates(written.ids_SA, written.states_SAD.to(self.head_dtype))
        plain = decoding == "plain"
        box_route, seg_route = (router.picked if plain else router for router in (self.box_router, self.seg_router))
        segmentation_ID = seg_route(tokens_IKD)
        similarity_IT = self._similarity(read.states_BPD, batch.image_of_target_I, segmentation_ID)
        centred_I4 = self.box_decoder(box_route(tokens_IKD), self._box_start(batch, similarity_IT))
        masks_Jhh = self.decode_masks(batch, embedding_BCGG, segmentation_ID, centred_I4, box_prompt=not plain)
        texts = [decode(self.tokenizer, ids) for ids in self._without_padding(written.ids_SA)]
        return Generated(tuple(text.strip() for text in texts), emitted, cxcywh_to_xyxy(centred_I4), masks_Jhh)

    def _written_candidates(self, ids_SL: Tensor, states_SLD: Tensor) -> tuple[Tensor, tuple[bool, ...]]:
        wanted = torch.tensor(self.processor.candidate_ids, device=ids_SL.device)
        found_SKL = ids_SL[:, None, :] == wanted[None, :, None]
        first_SK = found_SKL.int().argmax(dim=2)
        rows = torch.arange(len(ids_SL), device=ids_SL.device)[:, None]
        return states_SLD[rows, first_SK], tuple(found_SKL.any(dim=2).all(dim=1).tolist())

    def _without_padding(self, ids_SL: Tensor) -> list[list[int]]:
        end = (self.processor.end_id, self.processor.pad_id)
        return [[token for token in row if token not in end] for row in ids_SL.tolist()]

    def _embed_inputs(
        self, input_ids_SL: Tensor, image_of_sequence_S: Tensor, batch: Batch, embedding_BCGG: Tensor
    ) -> Tensor:
        inputs_SLD = self.mllm.get_input_embeddings()(input_ids_SL)
        images_BTD = self._image_tokens(batch, embedding_BCGG)[image_of_sequence_S].to(inputs_SLD.dtype)
        image_SL = input_ids_SL == self.processor.image_id
        return inputs_SLD.masked_scatter(image_SL[..., None], images_BTD)

    def _image_tokens(self, batch: Batch, embedding_BCGG: Tensor) -> Tensor:
        if self.config.mllm.image_tokens == "seg_head":
            projector = self.mllm.model.multi_modal_projector
            features = seg_head_tokens(embedding_BCGG, self.config.mllm.image_grid)
            return projector(features.to(projector.linear_1.weight.dtype))
        if batch.vision_B3VV is None:
            raise ValueError("a batch needs pixels for the vision tower")
        features: Any = self.mllm.get_image_features(batch.vision_B3VV.to(self.mllm.dtype))
        return torch.stack(features.pooler_output)

    @torch.no_grad()
    def _class_similarity(self, batch: Batch, hidden_SLD: Tensor, class_QD: Tensor) -> Tensor | None:
        if not len(class_QD):
            return None
        return self._similarity(hidden_SLD, batch.class_sequence_Q, class_QD)

    def _similarity(self, states_SLD: Tensor, sequence_I: Tensor, segmentation_ID: Tensor) -> Tensor:
        start = self.processor.image_start
        image_STD = states_SLD[:, start : start + self.processor.image_tokens]
        return similarity_map(image_STD[sequence_I], segmentation_ID)

    def _box_start(self, batch: Batch, similarity_IT: Tensor) -> Tensor | None:
        if self.config.box_start == "centre":
            return None
        mllm = self.config.mllm
        over = "frame" if mllm.image_tokens == "seg_head" else mllm.vision_input
        places_BT4 = torch.stack([token_places(frame, self.processor.image_grid, over) for frame in batch.frames])
        return map_box(similarity_IT, places_BT4.to(similarity_IT.device)[batch.image_of_target_I])

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
            folder_or_hub_id: what `save_pretrained` or training wrote, or the hub id that it was pushed to.
            revision: branch, tag or commit of a hub id.
            device: where the model goes; None leaves it on the CPU, or with a language model that cannot be moved.
            bits: 4 or 8 holds the layers of a published language model in so many bits, which needs an NVIDIA GPU and
                bitsandbytes; None: as the checkpoint says.
            device_map: "auto" spreads those layers over all GPUs and main memory; None: as the checkpoint says.

        Raises:
            InputError: neither a folder nor a hub repository, or what it holds does not fit; see `load_checkpoint` and
                `placed`.
        """
        folder = local_checkpoint(folder_or_hub_id, revision)
        return load_checkpoint(folder, cls, bits=bits, device_map=device_map).placed(device).eval()

    @property
    def pinned_device(self) -> torch.device | None:
        """Where the whole model must be since its language model cannot be moved; None where it can."""
        return pinned_device(self.mllm)

    def placed(self, device: torch.device | str | None) -> MediSee:
        """Moves the model; layers of 4 or 8 bits, or spread over devices, stay, and all else goes to their inputs.

        Args:
            device: None: the CPU, or where such a language model takes its inputs.

        Raises:
            InputError: another device than that.
        """
        pinned = self.pinned_device
        wanted = torch.device(device or pinned or "cpu")
        if pinned is not None and (wanted.type != pinned.type or wanted.index not in (None, pinned.index)):
            raise InputError(
                f"device = {wanted}: the language model is held in 4 or 8 bits, or spread over devices, and takes its "
                f"inputs on {pinned}; leave the device out, or choose GPUs by CUDA_VISIBLE_DEVICES."
            )
        return self.to(pinned or wanted)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a checkpoint folder atomically; an older checkpoint there is replaced as a whole.

        Raises:
            InputError: the folder holds something else.
        """
        save_checkpoint(self, Path(folder).resolve())

    def push_to_hub(self, hub_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads a checkpoint to the Hugging Face hub, whose repository is made if need be.

        Args:
            hub_id: "owner/name".
            private: of a new repository; None takes the owner's default.
            token: of the hub; None takes the one of `hf auth login`.

        Returns:
            The address of the commit.

        Raises:
            InputError: the hub refuses it or is out of reach.
        """
        return push_checkpoint(self, hub_id, private=private, token=token)


def build_seg_head(config: Model, *, weights: bool = True) -> SamHead:
    """Builds the configured seg head."""
    builders = {
        "sam": sam_head,
        "medsam": sam_head,
        "sam_med2d": sam_med2d_head,
        "lite_medsam": lite_medsam_head,
    }
    return builders[config.seg_head.kind](config.seg_head, weights=weights)
