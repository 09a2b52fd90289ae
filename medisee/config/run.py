"""A run's configuration: closed data, one docstring per field, one place for each default.

`compat: release` computes what the authors' release computes: RELEASE lists its values, and each can still be set by
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from medisee.config.model import Model, Section

RELEASE: dict[str, Any] = {
    "model": {
        "box_frame": "frame",
        "box_dtype": "bfloat16",
        "mllm": {"vision_input": "centre_crop"},
        "seg_head": {"resize": "longest", "pixels": "sam"},
    },
    "loss": {"box": 2.0, "degenerate_giou": "constant"},
    "data": {"boxes": "inclusive", "draws": "unseeded", "select": "test"},
    "eval": {"forced_answer": "{candidates}.", "decoding": "plain"},
}
"""What `compat: release` sets: what the release does otherwise than we do."""

MaskResolution = Literal["original", "decoder"] | int
"""See Loss.mask_resolution."""
Decoding = Literal["routed", "plain"]
"""See Eval.decoding."""
LEAST_MASK_SIDE = 32


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested mapping `old` with the values of `new` in it."""
    merged = dict(old)
    for key, value in new.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


class Loss(Section):
    """Weights of L_end (equation 4), of L_sim in fine-tuning, and of our named additions, which are 0 in the paper's run."""

    text: float = 1.0
    """L_txt: cross-entropy on the answer."""
    bce: float = 2.0
    """Lambda_bce."""
    dice: float = 0.5
    """Lambda_dice."""
    box: float = 1.0
    """Factor on L_bbox; the release's default is 2.0."""
    l1: float = 1.0
    """Lambda_L1, on normalised xyxy."""
    giou: float = 1.0
    """Lambda_giou."""
    degenerate_giou: Literal["finite", "constant"] = "finite"
    """GIoU of boxes without area. `finite`: every box has its own value and gradient. `constant`: one such box takes the
    gradient of all boxes of its image (release)."""
    similarity: float = 0.0
    """Cross-entropy between sim(h_img, h_seg) and the true mask on the image-token grid. Not in the paper: it gives a
    model that starts from random weights a direct signal of where things are."""
    js: float = Field(default=0.0, ge=0)
    """L_sim's Jensen-Shannon divergence between the map sim(h_img, h_seg) of an implicit query and that of a question
    that names the class; 2.0 in the paper's fine-tuning, 0 before it."""
    mse: float = Field(default=0.0, ge=0)
    """L_sim's mean squared difference of the same two maps; 1.0 in the paper's fine-tuning, 0 before it. The paper
    leaves the maps' scale open: ours are dot products over sqrt(D), as in attention."""
    mask_resolution: MaskResolution = "original"
    """`original`: the mask loss at the image's own size (release). A number such as 512: the same, but images whose
    longer side has more pixels are scaled down to it. `decoder`: at the mask decoder's output size, which is cheaper."""

    @field_validator("mask_resolution", mode="before")
    @classmethod
    def _check_resolution(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= LEAST_MASK_SIDE
        if number or value in ("original", "decoder"):
            return value
        raise ValueError(
            f"expected original, decoder, or the most pixels of an image's longer side ({LEAST_MASK_SIDE} or more)"
        )


class Source(Section):
    """One manifest of a training mixture."""

    records: str
    """JSONL manifest."""
    root: str | None = None
    """Folder its paths are relative to; null: the manifest's own folder."""
    weight: int = Field(default=1, ge=1)
    """Share in the mixture (the paper: 7 for SA-Med2D-20M, 3 for MLMR-SD)."""
    from_step: int = Field(default=0, ge=0)
    """Steps before the source is drawn from; at least one source starts at 0. 0 in the paper's run."""


class Data(Section):
    """What is read."""

    train: tuple[Source, ...] = ()
    """Training manifests."""
    val: str | None = None
    """Manifest on which the best checkpoint is chosen."""
    test: str | None = None
    """Manifest that chooses in the place of `val` with `select: test`; training reads it for nothing else."""
    select: Literal["val", "test"] = "val"
    """What the best checkpoint is chosen on. `test`: the test file, whose scores then say too much (release)."""
    root: str | None = None
    """Folder the paths of `val` and `test` are relative to; null: the manifest's own folder."""
    categories: str | None = None
    """JSON file {category: [names that count as naming it]}; null: the category itself."""
    boxes: Literal["half_open", "inclusive"] = "half_open"
    """Right and lower end of the true boxes in training. `half_open`: behind the mask's last pixel. `inclusive`: at it,
    so that the last row and column are left out (release). Scores always take half-open boxes."""
    draws: Literal["epochs", "unseeded"] = "epochs"
    """`epochs`: every record of a source comes once before one comes again, in an order that follows from the seed.
    `unseeded`: each draw takes a source by weight and any record of it, anew in every run: no epochs, no run that can
    be repeated or resumed exactly (release)."""
    targets_per_image: int = Field(default=3, ge=1)
    """Up to this many targets are drawn per image (release: 3)."""
    word_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of question words left out while training; 0 in the paper's run."""
    workers: int = Field(default=0, ge=0)
    """Loader processes."""
    cache: str | None = None
    """Folder for the frozen encoder's features; null: the encoder runs every time."""
    cache_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Precision in which cached features are computed; they are stored in 16 bit."""
    skip_corrupt: bool = False
    """Whether training names, counts and replaces records whose image or mask cannot be read; false: it stops."""

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.train and min(source.from_step for source in self.train) > 0:
            raise ValueError("at least one training source needs from_step 0")
        if self.train and self.select == "test" and self.test is None:
            raise ValueError(
                "select test (compat release sets it) needs data.test to name a manifest, or data.select=val"
            )
        return self

    @property
    def selection(self) -> str | None:
        """The manifest on which the best checkpoint is chosen; None: the last one is taken."""
        return self.test if self.select == "test" else self.val


class Train(Section):
    """Optimisation (paper, section 5.1)."""

    out: str = "runs/medisee"
    """Folder of this run."""
    init: str | None = None
    """Checkpoint folder, or hub id, whose weights and tokenizer the run starts from, as fine-tuning does from the first
    stage's; the model's configuration must be the same. null: the published weights, or random ones."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    steps: int = Field(default=1500, ge=1)
    """Optimizer steps (paper: 10 epochs of 150)."""
    batch_size: int = Field(default=15, ge=1)
    """Images per rank and micro-batch."""
    accumulation: int = Field(default=10, ge=1)
    """Micro-batches per optimizer step; each counts the same, as in the release."""
    global_batch: int | None = Field(default=None, ge=1)
    """Images per optimizer step over all ranks: `accumulation` then follows from the number of ranks, so that the
    effective batch stays when it changes. null: ranks x batch_size x accumulation (the paper: 4 x 15 x 10)."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate of AdamW."""
    lr_mask_decoder: float | None = None
    """Peak learning rate of the mask decoder; null: `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    warmup: int = Field(default=100, ge=0)
    """Linear warm-up steps of WarmupDecayLR; then linear decay to 0 at `steps`."""
    clip: float = 1.0
    """Gradient norm limit."""
    dtype: Literal["float32", "bfloat16", "auto"] = "bfloat16"
    """Compute precision; geometry, losses and optimizer state stay in float32. `auto`: bfloat16 where the device
    multiplies it faster than float32 (GPUs since Ampere, CPUs with AMX or AVX512_BF16), float32 elsewhere."""
    recompute_layers: bool | Annotated[int, Field(ge=0)] = False
    """Which of the language model's layers keep their inputs only and compute again in the backward pass (activation
    checkpointing): true: all, with a third more arithmetic and far less memory; a number: so many, the first ones. The
    paper's run needs it on 48 GB; --plan tells."""
    unpadded: bool = False
    """Whether the language model reads the sequences of a micro-batch one after another, each at its own length (rounded
    up to `model.mllm.pad_to`): no padding to the longest is computed, which is 15% of all positions in the mix of class
    and implicit questions. Not under ZeRO 3, where all ranks must read equally often."""
    compile_layers: bool = False
    """Whether torch.compile fuses what the language model's layers do between their matrix products: the same but for
    rounding and for which values dropout drops. A CPU needs a C++ compiler. Not under ZeRO 3, which gathers within."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage, under its launcher: 1 cuts the optimizer's state among the ranks, 2 the gradients too (the
    paper), 3 the weights too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What DeepSpeed keeps in the CPU's memory: `optimizer`: AdamW's state and step (ZeRO 1 to 3). `parameters`: the
    weights as well (ZeRO 3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """More of DeepSpeed's own settings, merged over ours, such as {zero_optimization: {overlap_comm: true}}."""
    mask_from: int = Field(default=0, ge=0)
    """Last step that trains text and boxes only, without the mask decoder. 0 in the paper's run."""
    coarse_masks_until: int = Field(default=0, ge=0)
    """Last step at which the mask decoder reads features of half the side, at about a quarter of the cost. 0 in the
    paper's run."""
    masks_per_image: int | None = Field(default=None, ge=1)
    """Masks are decoded and learnt for this many of an image's targets, drawn anew each time; null: all, the paper's
    way. The mask decoder is the dearest part of a small model's step."""
    true_box: float = Field(default=0.0, ge=0, le=1)
    """Probability that the mask decoder is prompted with the true box, falling linearly to 0 at `true_box_until`. 0 in
    the paper's run."""
    true_box_until: int = 0
    """Step at which `true_box` has fallen to 0."""
    log_every: int = Field(default=10, ge=1)
    """Steps between log lines."""
    save_every: int = Field(default=500, ge=1)
    """Steps between saved states for --resume."""
    keep_last: int = Field(default=2, ge=1)
    """Saved states that stay: were the newest damaged, the one before would serve."""
    val_every: int = Field(default=500, ge=1)
    """Steps between validations."""
    val_limit: int | None = None
    """Images of val used for choosing the checkpoint; null: all."""

    @model_validator(mode="after")
    def _check(self) -> Train:
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload {self.offload} needs zero_stage {needed} or more")
        if self.unpadded and self.zero_stage == 3:
            raise ValueError("unpadded needs zero_stage 2 or less: under stage 3 all ranks must read equally often")
        if self.compile_layers and self.zero_stage == 3:
            raise ValueError("compile_layers needs zero_stage 2 or less: stage 3 gathers weights within layers")
        return self


class Eval(Section):
    """Evaluation and inference."""

    forced_answer: str = "It is {candidates}."
    """Answer given in teacher-forced scoring; {candidates} is the list of candidate tokens."""
    max_new_tokens: int = 64
    """Longest generated answer."""
    decoding: Decoding = "routed"
    """How generated answers become boxes and masks. `routed`: with routers and prompts, as in training. `plain`: h_seg is
    the first candidate token's state, h_det the last one's, and the mask decoder gets no box (release)."""
    batch_size: int = Field(default=8, ge=1)
    """Images per forward pass."""
    resamples: int = 1000
    """Bootstrap resamples of the 95% intervals."""


class Config(Section):
    """One run: model, loss, data, training, evaluation."""

    compat: Literal["none", "release"] = "none"
    """`release`: what is not set otherwise takes the values with which the authors' release computes. `none`: ours,
    which correct its defects."""
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
        if self.eval.decoding == "plain" and "text" not in self.model.prompts:
            raise ValueError(
                "eval.decoding plain (compat release sets it) needs text in model.prompts, or eval.decoding=routed"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _compat(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("compat") == "release":
            return merge(RELEASE, values)
        return values
