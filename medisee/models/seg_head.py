"""The promptable segmentation model, G_enc and G_dec of the paper, built on the segment-anything package.

Shapes: B images, I targets, P prompt tokens, C channels (256), G side of the embedding grid, S frame side,
h low-resolution mask side (4 G), U channels of the enlarged states (C / 8).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from medisee.config.model import SamSizes, SegHeadConfig
from medisee.foundation.errors import InputError, shortened
from medisee.models.image_encoder import image_encoder
from medisee.weights.sam_format import is_transformers, read_weights, transformers_name, weights_file, without_tied
from medisee.weights.shards import facts_of, misfits

_FIX = "check model.seg_head.vit and size"


@dataclass(frozen=True, slots=True)
class SegHeadSpec:
    """A seg head's input rule (size, resize, pixels: see `SegHeadConfig`) and embedding (channels C, side G = grid)."""

    size: int
    resize: Literal["longest", "stretch"]
    pixels: Literal["sam", "minmax"]
    channels: int
    grid: int


@dataclass(frozen=True, slots=True)
class Prompts:
    """What prompts the mask decoder for each of I targets, in this order: box corners, text."""

    text: Tensor | None = None  # projected h_seg (I, C)
    boxes: Tensor | None = None  # xyxy in frame pixels (I, 4), float32 or bfloat16


class SamHead(nn.Module):
    """SAM, MedSAM, SAM-Med2D and LiteMedSAM, which differ in image encoder and `spec`.

    Only the mask decoder and the image encoder's LoRA learn (paper, section 4.3).
    """

    def __init__(
        self, image_encoder: nn.Module, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder, spec: SegHeadSpec
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder.requires_grad_(False).eval()
        self.prompt_encoder = prompt_encoder.requires_grad_(False).eval()
        self.mask_decoder = mask_decoder
        self.spec = spec

    @property
    def encoder_learns(self) -> bool:
        """Whether the image encoder has LoRA."""
        return any(parameter.requires_grad for parameter in self.image_encoder.parameters())

    def train(self, mode: bool = True) -> SamHead:
        """Keeps the frozen parts in evaluation mode: batch norms must not move."""
        super().train(mode)
        self.image_encoder.train(mode and self.encoder_learns)
        self.prompt_encoder.eval()
        return self

    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """Embeds standardised images, (B, 3, S, S) -> (B, C, G, G); without a graph if the encoder is frozen."""
        dtype = next(self.image_encoder.parameters()).dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_learns):
            return self.image_encoder(pixels_B3SS.to(dtype))

    def decode(self, embedding_BCGG: Tensor, prompts: Prompts, image_of_target_I: Tensor) -> Tensor:
        """Predicts one mask per target: logits (I, h, h) of the whole frame.

        Unlike the package's own forward it takes targets of several images in one batch.
        """
        decoder = self.mask_decoder
        dtype = decoder.mask_tokens.weight.dtype
        sparse_IPC = self._sparse(prompts).to(dtype)
        targets = len(sparse_IPC)
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(targets, -1, -1), sparse_IPC], dim=1)
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        source = (embedding_BCGG + no_mask).to(dtype)[image_of_target_I]
        grid = embedding_BCGG.shape[-1]
        # The embedding's grid may be coarser than the encoder's.
        position = self.prompt_encoder.pe_layer((grid, grid)).to(dtype).expand(targets, -1, -1, -1)
        states, source = decoder.transformer(source, position, tokens)
        # Token 0 predicts the mask's quality, token 1 the single mask; the other three are for multi-mask output.
        kernel_IU = decoder.output_hypernetworks_mlps[0](states[:, 1])
        return self.upscale(source.unflatten(1, (grid, grid)), kernel_IU)

    def upscale(self, source_IGGC: Tensor, kernel_IU: Tensor) -> Tensor:
        """Upscales the image's states fourfold and weighs their channels with the kernels: mask logits (I, 4G, 4G).

        Equals `output_upscaling`, but faster: its transposed convolutions do not overlap, so each is a matrix product
        over the last dimension, and pixels are put in place only at the end, as single numbers.
        """
        layers: Any = self.mask_decoder.output_upscaling
        first, norm, _, second, _ = layers
        values = F.layer_norm(_enlarge(source_IGGC, first), norm.weight.shape, norm.weight, norm.bias, norm.eps)
        values = F.gelu(_enlarge(F.gelu(values), second))
        logits_IGG2222 = torch.einsum("ihwabcdu,iu->ihwabcd", values, kernel_IU)
        return logits_IGG2222.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 6).flatten(1, 3)

    def _sparse(self, prompts: Prompts) -> Tensor:
        parts = []
        if prompts.boxes is not None:
            # Autocast would round coordinates to bfloat16, which moves a box by pixels. Boxes that are rounded already
            # (`Model.box_dtype`) stay so until their position is encoded.
            with torch.autocast(prompts.boxes.device.type, enabled=False):
                parts.append(self.prompt_encoder(points=None, boxes=prompts.boxes, masks=None)[0])
        if prompts.text is not None:
            parts.append(prompts.text[:, None].to(parts[0].dtype if parts else prompts.text.dtype))
        if not parts:
            raise ValueError("Prompts need at least one of text and boxes")
        return torch.cat(parts, dim=1)


def _enlarge(values: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    # A transposed convolution of kernel and stride 2, over the last dimension: (..., C) -> (..., 2, 2, C').
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)
    bias = None if layer.bias is None else layer.bias.repeat(4)
    return F.linear(values, weight, bias).unflatten(-1, (2, 2, -1))


_VIT = {
    "b": SamSizes(),
    "l": SamSizes(width=1024, depth=24, heads=16, global_attention=(5, 11, 17, 23)),
    "h": SamSizes(width=1280, depth=32, heads=16, global_attention=(7, 15, 23, 31)),
    "micro": SamSizes(width=32, depth=2, heads=2, global_attention=(1,), channels=32),
}


def sam_parts(sizes: SamSizes, grid: int, size: int) -> tuple[PromptEncoder, MaskDecoder]:
    """Builds SAM's prompt encoder and mask decoder for a frame of side `size` and an embedding of side `grid`."""
    channels = sizes.channels
    prompt_encoder = PromptEncoder(
        embed_dim=channels,
        image_embedding_size=(grid, grid),
        input_image_size=(size, size),
        mask_in_chans=sizes.mask_hidden,
    )
    mask_decoder = MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(
            depth=2, embedding_dim=channels, mlp_dim=sizes.decoder_mlp, num_heads=sizes.decoder_heads
        ),
        transformer_dim=channels,
        iou_head_depth=3,
        iou_head_hidden_dim=sizes.iou_hidden,
    )
    return prompt_encoder, mask_decoder


def vit_sizes(config: SegHeadConfig) -> SamSizes:
    return config.sizes or _VIT[config.vit]


def sam_head(config: SegHeadConfig, *, weights: bool = True) -> SamHead:
    """Builds SAM or MedSAM; `weights=False` leaves it random, for a checkpoint that is loaded next."""
    return assemble(lambda: image_encoder(vit_sizes(config), config.size), config, weights=weights)


def assemble(encoder: Callable[[], nn.Module], config: SegHeadConfig, *, weights: bool) -> SamHead:
    """Joins a ViT with patches of 16 pixels and SAM's decoder, then loads `checkpoint` and adds LoRA as configured."""
    sizes, grid = vit_sizes(config), config.grid
    spec = SegHeadSpec(config.size, config.resize, config.pixels, sizes.channels, grid)

    def build() -> SamHead:
        return SamHead(encoder(), *sam_parts(sizes, grid, config.size), spec)

    head = with_weights(build, config.checkpoint, sizes.depth) if weights and config.checkpoint else build()
    if (lora := config.lora) is not None:
        adapters = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=["qkv"])
        inject_adapter_in_model(adapters, head.image_encoder)
    return head


def with_weights(build: Callable[[], SamHead], source: str | Path, depth: int = 1) -> SamHead:
    """Builds a head of `depth` blocks with published weights, strictly and without running code from the file.

    `source` (see `weights_file`) has segment_anything's names, or is a whole transformers SamModel. Its tensors are
    compared with the head's before memory is taken; what does not fit is named as in the file.
    """
    path = weights_file(source)
    state, begin = read_weights(path)
    if depth > len(state):
        raise InputError(f"{path}: holds {len(state)} tensors, too few for {depth} blocks; {_FIX}.")
    with torch.device("meta"):
        own = facts_of(build().state_dict())
    names = dict(zip(own, own, strict=True))
    if is_transformers(state):
        state, names = without_tied(state, path), {name: transformers_name(name) for name in own}
    expected = {begin + published: own[name] for name, published in names.items()}
    if problems := misfits(expected, facts_of({begin + name: value for name, value in state.items()}), path, _FIX):
        raise InputError(shortened(problems, str(path)))
    head = build()
    head.load_state_dict({name: state[published] for name, published in names.items()})
    return head
