"""A run's configuration: frozen sections that refuse unknown keys, one docstring per field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from medisee.config.model import Count, Model, PathText, Section, Share

RELEASE: dict[str, Any] = {  # defaults under `compat: release`; each can still be set alone
    "model": {
        "box_frame": "frame",
        "box_dtype": "bfloat16",
        "mllm": {"vision_input": "centre_crop"},
        "seg_head": {"resize": "longest", "pixels": "sam"},
    },
    "loss": {"box": 2.0},
    "data": {"select": "test"},
    "eval": {"forced_answer": "{candidates}."},
}

MaskResolution = Literal["original", "decoder"] | int  # see `Loss.mask_resolution`
LEAST_MASK_SIDE = 32
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
Steps = Annotated[int, Field(ge=0, le=1_000_000_000)]


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested mapping `old` with the values of `new` in it."""
    merged = dict(old)
    for key, value in new.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


class Loss(Section):
    """Weights of L_end (equation 4), of L_sim (fine-tuning), and of our additions, which are 0 in the paper's run."""

    text: Weight = 1.0
    """L_txt: cross-entropy on the answer."""
    bce: Weight = 2.0
    """Lambda_bce."""
    dice: Weight = 0.5
    """Lambda_dice."""
    box: Weight = 1.0
    """Factor on L_bbox (release: 2.0)."""
    l1: Weight = 1.0
    """Lambda_L1, on normalised xyxy."""
    giou: Weight = 1.0
    """Lambda_giou."""
    similarity: Weight = 0.0
    """Cross-entropy between sim(h_img, h_seg) and the true mask on the image tokens."""
    js: Weight = 0.0
    """L_sim: Jensen-Shannon divergence of sim(h_img, h_seg) between an implicit query and a query that names its
    class."""
    mse: Weight = 0.0
    """L_sim: mean squared difference of the same maps."""
    mask_resolution: MaskResolution = "original"
    """Where the mask loss is computed. `original`: at the image's size (release). A number such as 512: the same, with
    larger images scaled down to that longer side. `decoder`: at the mask decoder's output size, which is cheaper."""

    @field_validator("mask_resolution", mode="before")
    @classmethod
    def _check_resolution(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= LEAST_MASK_SIDE
        if number or value in ("original", "decoder"):
            return value
        raise ValueError(
            f"expected original, decoder, or the most pixels of an image's longer side ({LEAST_MASK_SIDE} or more)"
        )

    @model_validator(mode="after")
    def _check(self) -> Loss:
        if not any(
            (self.text, self.bce, self.dice, self.box * (self.l1 + self.giou), self.similarity, self.js, self.mse)
        ):
            raise ValueError("all weights are 0, so nothing would be learnt")
        return self


class Source(Section):
    """One manifest of a training mixture."""

    records: PathText
    """JSONL manifest."""
    root: PathText | None = None
    """Folder that its paths are relative to; null: the manifest's folder."""
    weight: int = Field(default=1, ge=1, le=100_000)
    """Share in the mixture."""
    from_step: Steps = 0
    """First optimizer step that draws from this source; at least one source starts at 0."""


class Data(Section):
    """Manifests and how they are read."""

    train: tuple[Source, ...] = ()
    """Training manifests."""
    val: PathText | None = None
    """Manifest on which the best checkpoint is chosen."""
    test: PathText | None = None
    """Manifest that replaces `val` under `select: test`; training uses it for nothing else."""
    select: Literal["val", "test"] = "val"
    """What the best checkpoint is chosen on. `test` makes the test scores optimistic (release)."""
    root: PathText | None = None
    """Folder that the paths of `val` and `test` are relative to; null: the manifest's folder."""
    categories: PathText | None = None
    """JSON file {category: [names that count as naming it]}; null: the category's own name only."""
    targets_per_image: Count = 3
    """Targets drawn per image, at most."""
    word_dropout: Share = 0.0
    """Share of the question's words that training leaves out."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Loader processes."""
    cache: PathText | None = None
    """Folder for the frozen encoder's features; null: the encoder runs at every step."""
    cache_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Precision in which cached features are computed; they are stored in float16."""
    skip_corrupt: bool = False
    """Whether training counts and leaves out records that it cannot use (image, mask, box, words); false: it stops."""

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.train and min(source.from_step for source in self.train) > 0:
            raise ValueError("at least one training source needs from_step 0")
        if self.train and self.select == "test" and self.test is None:
            raise ValueError("select test (set by compat release) needs data.test, or set data.select=val")
        return self

    @property
    def selection(self) -> str | None:
        """The manifest on which the best checkpoint is chosen; None: the last checkpoint is kept."""
        return self.test if self.select == "test" else self.val


class Train(Section):
    """Optimisation (paper, section 5.1)."""

    out: PathText = "runs/medisee"
    """Folder that the run writes to."""
    init: PathText | None = None
    """Checkpoint folder or hub id whose weights and tokenizer the run starts from, for fine-tuning; its model section
    must be the same. null: the published weights, or random ones."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of weights, data order and noise."""
    steps: Count = 1500
    """Optimizer steps."""
    batch_size: Count = 15
    """Images per micro-batch on each rank."""
    accumulation: Count = 10
    """Micro-batches per optimizer step, all with the same weight (as in the release)."""
    global_batch: Count | None = None
    """Images per optimizer step over all ranks, which sets `accumulation`. null: ranks x batch_size x
    accumulation."""
    lr: float = Field(default=3e-4, gt=0, le=10)
    """Peak learning rate of AdamW."""
    lr_mask_decoder: float | None = Field(default=None, gt=0, le=10)
    """Peak learning rate of the mask decoder; null: `lr`."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """AdamW's weight decay."""
    warmup: Steps = 100
    """Steps of linear warm-up; a linear decay to 0 at `steps` follows (DeepSpeed's WarmupDecayLR)."""
    clip: float = Field(default=1.0, gt=0, le=1_000_000_000)
    """Limit of the gradient's norm."""
    dtype: Literal["float32", "bfloat16", "auto"] = "bfloat16"
    """Compute precision; geometry, losses and optimizer state are always float32. `auto`: bfloat16 where the device is
    faster in it (GPUs since Ampere, CPUs with AMX or AVX512_BF16), float32 elsewhere."""
    recompute_layers: bool | Annotated[int, Field(ge=0, le=1_000)] = False
    """Activation checkpointing in the language model. true: in all layers (a third more arithmetic). A number N: in the
    first N. The paper's run needs it on 48 GB; see --plan."""
    unpadded: bool = False
    """Whether the language model reads a micro-batch's sequences one by one, without padding. Not under ZeRO 3."""
    compile_layers: bool = False
    """Whether torch.compile fuses the language model's layers between their matrix products; only rounding and
    dropout's choices differ. A CPU needs a C++ compiler. Not under ZeRO 3, which gathers weights within layers."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage under DeepSpeed's launcher. 1 divides the optimizer's state among the ranks, 2 also the gradients (the
    paper), 3 also the weights."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What DeepSpeed keeps in CPU memory. `optimizer`: its state (ZeRO 1 to 3). `parameters`: weights too (ZeRO 3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed settings that override ours, such as {zero_optimization: {overlap_comm: true}}."""
    mask_from: Steps = 0
    """Last step that trains text and boxes only, without the mask decoder."""
    coarse_masks_until: Steps = 0
    """Last step at which the mask decoder reads features of half the side, at a quarter of the cost."""
    masks_per_image: Count | None = None
    """Targets per image whose masks are decoded and learned, drawn at random each time; null: all."""
    true_box: float = Field(default=0.0, ge=0, le=1)
    """Probability that the true box prompts the mask decoder, linearly falling to 0 at `true_box_until`."""
    true_box_until: Steps = 0
    """Step at which `true_box` has fallen to 0."""
    log_every: Count = 10
    """Steps between log lines."""
    save_every: Count = 500
    """Steps between the states saved for --resume."""
    keep_last: Count = 2
    """Saved states to keep; an older one serves if the newest is damaged."""
    val_every: Count = 500
    """Steps between validations."""
    val_limit: Count | None = None
    """Images of `val` that choose the best checkpoint; null: all."""

    @model_validator(mode="after")
    def _check(self) -> Train:
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload {self.offload} needs zero_stage {needed} or more")
        for name in ("unpadded", "compile_layers"):
            if getattr(self, name) and self.zero_stage == 3:
                raise ValueError(f"{name} needs zero_stage 2 or less")
        if self.true_box and not self.true_box_until:
            raise ValueError("true_box has no effect without true_box_until")
        try:
            json.dumps(self.deepspeed, allow_nan=False)
        except ValueError as error:
            raise ValueError("deepspeed holds a number that is not finite") from error
        return self


class Eval(Section):
    """Evaluation and inference."""

    forced_answer: str = "It is {candidates}."
    """Answer given to the model in forced decoding; {candidates} becomes the list of candidate tokens."""
    max_new_tokens: int = Field(default=64, ge=1, le=16_384)
    """Longest generated answer, tokens."""
    batch_size: Count = 8
    """Images per forward pass."""
    resamples: int = Field(default=1000, ge=1, le=1_000_000)
    """Bootstrap resamples of the 95% intervals."""

    @field_validator("forced_answer")
    @classmethod
    def _check_answer(cls, value: str) -> str:
        rest = value.replace("{candidates}", "")
        if rest == value or "{" in rest or "}" in rest:
            raise ValueError("expected a text with {candidates} and no other braces")
        return value


class Config(Section):
    """One run: model, loss, data, training, evaluation."""

    compat: Literal["none", "release"] = "none"
    """`release` computes as the authors' release does: RELEASE holds the defaults; true boxes end at the mask's last
    pixel; one box without area takes the GIoU gradient from all boxes of its image; training draws are unseeded, so a
    run cannot be repeated or resumed exactly; written answers are decoded without routers and box prompt."""
    model: Model = Model()
    """The model's parts and sizes."""
    loss: Loss = Loss()
    """Weights of the loss terms."""
    data: Data = Data()
    """Manifests and how they are read."""
    train: Train = Train()
    """Optimisation."""
    eval: Eval = Eval()
    """Evaluation and inference."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.data.cache is not None and self.model.seg_head.lora is not None:
            raise ValueError(
                "data.cache needs a frozen encoder, but model.seg_head.lora lets it learn; remove one of them"
            )
        if self.train.coarse_masks_until and self.model.seg_head.grid % 2:
            raise ValueError(
                f"train.coarse_masks_until halves the seg head's grid, which is odd ({self.model.seg_head.grid}); "
                "change model.seg_head.size by 16"
            )
        if self.release and "text" not in self.model.prompts:
            raise ValueError("compat release needs text in model.prompts; add it, or set compat: none")
        return self

    @property
    def release(self) -> bool:
        """Whether to compute as the authors' release does; see `compat`."""
        return self.compat == "release"

    @model_validator(mode="before")
    @classmethod
    def _compat(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("compat") == "release":
            return merge(RELEASE, values)
        return values
