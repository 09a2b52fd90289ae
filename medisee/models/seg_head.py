"""The promptable segmentation model: G_enc and G_dec of the paper, on the segment-anything package.

Shapes: B images, I targets, P prompt tokens, C channels (256), G side of the embedding grid, S frame side,
h low-resolution mask side (4 G).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from medisee.errors import InputError
from medisee.model_config import SamSizes, SegHeadConfig


@dataclass(frozen=True, slots=True)
class SegHeadSpec:
    """The input rule that a seg head brings along.

    Attributes:
        size: side S of the square input frame, pixels.
        resize: how an image is fitted into the frame.
        pixels: how its values are standardised.
        channels: C of the embedding and of prompt tokens.
        grid: side G of the embedding.
    """

    size: int
    resize: Literal["longest", "stretch"]
    pixels: Literal["sam", "minmax"]
    channels: int
    grid: int


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the mask decoder is told about each of I targets; None is left out. Order: points, box corners, text.

    Attributes:
        text: (I, C) projected h_seg.
        boxes: (I, 4) xyxy in frame pixels, float32.
        points: (I, N, 2) xy in frame pixels.
        labels: (I, N) 1 positive, 0 negative, -1 none.
    """

    text: Tensor | None = None
    boxes: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None


class SegHead(Protocol):
    """A frozen image encoder and a promptable mask decoder."""

    spec: SegHeadSpec

    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """Embeds standardised images: (B, 3, S, S) -> (B, C, G, G)."""
        ...

    def decode(self, embedding_BCGG: Tensor, prompts: Prompts, image_of_target_I: Tensor) -> Tensor:
        """Predicts low-resolution mask logits (I, h, h) of the whole frame, one mask a target."""
        ...


class SamHead(nn.Module):
    """SAM, MedSAM and LiteMedSAM: they differ by image encoder and by `spec`.

    The encoder and the prompt encoder are frozen, the mask decoder learns (paper, section 4.3).
    """

    def __init__(
        self, image_encoder: nn.Module, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder, spec: SegHeadSpec
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder.requires_grad_(False).eval()
        self.prompt_encoder = prompt_encoder.requires_grad_(False).eval()
        self.mask_decoder = mask_decoder
        self.spec = spec

    def train(self, mode: bool = True) -> SamHead:
        """Keeps the frozen parts in evaluation mode: batch norms must not move."""
        super().train(mode)
        self.image_encoder.eval()
        self.prompt_encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """See SegHead."""
        dtype = next(self.image_encoder.parameters()).dtype
        return self.image_encoder(pixels_B3SS.to(dtype))

    def decode(self, embedding_BCGG: Tensor, prompts: Prompts, image_of_target_I: Tensor) -> Tensor:
        """See SegHead. Batched over the targets of several images, which the package's own forward is not."""
        decoder = self.mask_decoder
        dtype = decoder.mask_tokens.weight.dtype
        sparse_IPC = self._sparse(prompts).to(dtype)
        targets = len(sparse_IPC)
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(targets, -1, -1), sparse_IPC], dim=1)
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        source = (embedding_BCGG + no_mask).to(dtype)[image_of_target_I]
        position = self.prompt_encoder.get_dense_pe().to(dtype).expand(targets, -1, -1, -1)
        states, source = decoder.transformer(source, position, tokens)
        grid = embedding_BCGG.shape[-1]
        upscaled = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, (grid, grid)))
        # Token 0 predicts the mask's quality, token 1 the single mask; the other three serve multi-mask output only.
        kernel = decoder.output_hypernetworks_mlps[0](states[:, 1])
        return torch.einsum("ic,ichw->ihw", kernel, upscaled)

    def _sparse(self, prompts: Prompts) -> Tensor:
        # The package's prompt encoder embeds geometry in float32; the text token joins behind it. Autocast would round
        # the coordinates to bf16, which moves a box by pixels.
        encoder = self.prompt_encoder
        points = None
        if prompts.points is not None and prompts.labels is not None:
            points = (prompts.points.float(), prompts.labels)
        parts = []
        if points is not None or prompts.boxes is not None:
            boxes = None if prompts.boxes is None else prompts.boxes.float()
            with torch.autocast(encoder.no_mask_embed.weight.device.type, enabled=False):
                parts.append(encoder(points=points, boxes=boxes, masks=None)[0])
        if prompts.text is not None:
            parts.append(prompts.text[:, None].to(parts[0].dtype if parts else prompts.text.dtype))
        if not parts:
            raise ValueError("Prompts need at least one of text, boxes, points")
        return torch.cat(parts, dim=1)


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
        embed_dim=channels, image_embedding_size=(grid, grid), input_image_size=(size, size), mask_in_chans=16
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


def sam_head(config: SegHeadConfig, *, weights: bool = True) -> SamHead:
    """Builds SAM or MedSAM; `weights=False` leaves a random encoder for a checkpoint that is loaded next.

    Raises:
        InputError: a size that the ViT's patches of 16 do not divide; a bad weights file.
    """
    if config.size % 16:
        raise InputError(f"model.seg_head.size = {config.size}: SAM's patches are 16 pixels; use a multiple of 16.")
    sizes = config.sizes or _VIT[config.vit]
    grid = config.size // 16
    encoder = ImageEncoderViT(
        img_size=config.size,
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        global_attn_indexes=sizes.global_attention,
        out_chans=sizes.channels,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=sizes.window,
        norm_layer=_LayerNorm,
    )
    head = SamHead(encoder, *sam_parts(sizes, grid, config.size), _spec(config, sizes.channels, grid))
    if weights and config.checkpoint is not None:
        load_weights(head, Path(config.checkpoint))
    return head


def load_weights(
    head: SamHead, path: Path, prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
) -> None:
    """Loads a .pth state strictly, reading data only, never code.

    Args:
        head: the head to fill.
        path: a torch file holding a state dict of image_encoder.*, prompt_encoder.*, mask_decoder.*.
        prepare: changes the state before it is loaded.

    Raises:
        InputError: a missing or foreign file; missing, left-over or misshapen keys.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such weights file; set model.seg_head.checkpoint to an existing .pth.") from error
    except Exception as error:  # torch raises many types for truncated, foreign and code-carrying files
        raise InputError(
            f"{path}: cannot be read as plain tensors ({type(error).__name__}); expected a state dict."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a flat state dict of tensors, found {type(state).__name__}.")
    state = prepare(state) if prepare is not None else state
    own = head.state_dict()
    problems = [f"{path}: missing tensor {key}" for key in own if key not in state]
    problems += [f"{path}: left-over tensor {key}" for key in state if key not in own]
    problems += [
        f"{path}: {key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}; check model.seg_head.vit and size"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise InputError(problems[:10])
    head.load_state_dict(state)


class _LayerNorm(nn.LayerNorm):
    # SAM's published encoders were trained with this epsilon.
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


def _spec(config: SegHeadConfig, channels: int, grid: int) -> SegHeadSpec:
    return SegHeadSpec(config.size, config.resize, config.pixels, channels, grid)
