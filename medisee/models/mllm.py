"""The multi-modal language model G: transformers' Llava, published or built from sizes with random weights.

Candidate tokens enlarge its vocabulary; LoRA comes from peft. What learns is float32, whatever the frozen rest is.

Shapes: B images, T image tokens, D hidden, G side of the seg head's embedding, C its channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from medisee.config.model import Mllm
from medisee.foundation.errors import InputError
from medisee.models.packing import use_flex
from medisee.models.seg_head import SegHeadSpec
from medisee.weights.llava import DTYPES, general_kernel, load_pretrained, pretrained_tokenizer
from medisee.weights.tokenizer import IMAGE_TOKEN, add_candidate_tokens, token_id

POSITION_FREQUENCIES = 16
_ADAPTED = r".*language_model.*\.(q_proj|v_proj)"
_VOCABULARY = ("model.language_model.embed_tokens", "lm_head")


def load_tokenizer(config: Mllm, candidate_tokens: tuple[str, ...]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of `config.source` and adds the candidate tokens."""
    tokenizer = pretrained_tokenizer(config)
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    add_candidate_tokens(tokenizer, candidate_tokens)
    return tokenizer


def load_mllm(
    config: Mllm, tokenizer: PreTrainedTokenizerBase, seg: SegHeadSpec, candidate_tokens: Sequence[str] = ()
) -> LlavaForConditionalGeneration:
    """Loads or builds the Llava and prepares what learns in it.

    `seg` describes the embedding of image tokens that come from the seg head; under `train_tokens: new` only the rows
    of `candidate_tokens` learn.
    """
    if config.source is None:
        llava = LlavaForConditionalGeneration(_llava_config(config, tokenizer, seg))
        llava.set_attn_implementation(general_kernel(config))
        if config.dtype != "auto":
            llava.to(DTYPES[config.dtype])  # pyright: ignore[reportArgumentType]
    else:
        loaded = load_pretrained(config)
        llava = loaded.llava
        if config.image_tokens == "vision_tower":
            _check_vision(llava, config)
        _add_rows(llava, loaded.vocabulary, len(tokenizer))
        llava.config.image_token_id = token_id(tokenizer, IMAGE_TOKEN)
    if config.image_tokens == "seg_head":
        llava.model.vision_tower = nn.Identity()
        if config.source is not None:
            vision: Any = llava.config.vision_config
            vision.hidden_size = _seg_token_width(config, seg)
            llava.model.multi_modal_projector = LlavaMultiModalProjector(llava.config).to(llava.device, llava.dtype)
    if config.attention == "flex":
        use_flex(llava, training=True)
    _choose_trained(llava, config, [token_id(tokenizer, token) for token in candidate_tokens])
    _hold_in_float32(llava, config)
    return llava


@torch.no_grad()
def _add_rows(llava: LlavaForConditionalGeneration, old: int, new: int) -> None:
    # New tokens start with the mean row, so that no logit is out of range. Rows are never removed: some vocabularies
    # are padded.
    embedding: Any = llava.get_input_embeddings()
    if new > embedding.num_embeddings:
        llava.resize_token_embeddings(new, mean_resizing=False)
    layer: Any
    for layer in (llava.get_input_embeddings(), llava.get_output_embeddings()):
        layer.weight[old:new] = layer.weight[:old].float().mean(dim=0).to(layer.weight.dtype)


class _Rows(nn.Embedding):
    """An embedding that learns in float32 before layers of another type."""

    def __init__(self, embedding: nn.Embedding, layers: nn.Module) -> None:
        weight = embedding.weight
        super().__init__(*weight.shape, padding_idx=embedding.padding_idx, _weight=weight)
        # In a tuple, so that it is not a submodule.
        self.layers = (layers,)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(next(self.layers[0].parameters()).dtype)


class _Head(nn.Linear):
    """An output layer that learns in float32 after layers of another type."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


def _hold_in_float32(llava: LlavaForConditionalGeneration, config: Mllm) -> None:
    # In 16 bit most weights are spaced wider than a usual learning rate's step, which would be lost.
    for parameter in llava.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    norm: Any = llava.model.language_model.norm
    if norm.weight.dtype == torch.float32 or config.train_tokens == "new":
        # Rows that learn alone are rounded to the type of the others when they are put in place.
        return
    embedding: Any = llava.get_input_embeddings()
    llava.set_input_embeddings(_Rows(embedding, norm))
    old: Any = llava.get_output_embeddings()
    head = _Head(old.in_features, old.out_features, bias=False, device="meta")
    head.weight = old.weight
    llava.set_output_embeddings(head)


def _choose_trained(llava: LlavaForConditionalGeneration, config: Mllm, candidate_ids: list[int]) -> None:
    llava.requires_grad_(False)
    new = config.train_tokens == "new"
    if config.train == "lora" or new:
        lora = LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=_ADAPTED if config.train == "lora" else DUMMY_TARGET_MODULES,
            trainable_token_indices=dict.fromkeys(_VOCABULARY, candidate_ids) if new else None,
        )
        inject_adapter_in_model(lora, llava)
        # peft puts an adapter where its layer's weights are, but those of an offloaded layer are nowhere.
        for layer in llava.modules():
            hook: Any = getattr(layer.base_layer, "_hf_hook", None) if isinstance(layer, LoraLayer) else None
            if isinstance(layer, LoraLayer) and hook is not None:
                for part in (layer.lora_A, layer.lora_B):
                    part.to_empty(device=hook.execution_device)
                layer.reset_lora_parameters("default", init_lora_weights=True)
    if config.train == "full":
        llava.model.language_model.requires_grad_(True)
    # A projector that starts at random must learn; a pretrained one is frozen as in the paper.
    starts_at_random = config.source is None or config.image_tokens == "seg_head"
    if starts_at_random if config.train_projector is None else config.train_projector:
        llava.model.multi_modal_projector.requires_grad_(True)
    if not new:
        llava.get_input_embeddings().requires_grad_(True)
        llava.get_output_embeddings().requires_grad_(True)


def _llava_config(config: Mllm, tokenizer: PreTrainedTokenizerBase, seg: SegHeadSpec) -> LlavaConfig:
    size = config.size
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=32768,
        rms_norm_eps=size.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        sliding_window=None,
        attention_dropout=size.dropout,
        initializer_range=size.initial_std,
        bos_token_id=token_id(tokenizer, str(tokenizer.bos_token)),
        eos_token_id=token_id(tokenizer, str(tokenizer.eos_token)),
        pad_token_id=token_id(tokenizer, str(tokenizer.pad_token)),
        tie_word_embeddings=False,
    )
    seg_tokens = config.image_tokens == "seg_head"
    vision = CLIPVisionConfig(
        hidden_size=_seg_token_width(config, seg) if seg_tokens else config.vision_hidden,
        intermediate_size=4 if seg_tokens else config.vision_intermediate or 4 * config.vision_hidden,
        num_hidden_layers=1 if seg_tokens else config.vision_layers,
        num_attention_heads=1 if seg_tokens else config.vision_head_count,
        image_size=config.vision_size,
        patch_size=config.vision_patch,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token_id(tokenizer, IMAGE_TOKEN),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _seg_token_width(config: Mllm, seg: SegHeadSpec) -> int:
    return seg.channels * (seg.grid // config.image_grid) ** 2 + 4 * POSITION_FREQUENCIES


def _check_vision(llava: LlavaForConditionalGeneration, config: Mllm) -> None:
    settings: Any = llava.config
    vision, kind = settings.vision_config, settings.vision_feature_select_strategy
    sizes = {"vision_size": vision.image_size, "vision_patch": vision.patch_size}
    problems = [
        f"model.mllm.{name} = {getattr(config, name)}: {config.source} was trained at {size}; set it to {size}."
        for name, size in sizes.items()
        if getattr(config, name) != size
    ]
    if kind != "default":
        problems.append(
            f"{config.source}: vision_feature_select_strategy is {kind!r}; expected 'default' (no class token). "
            "Give LLaVA-Med v1.5 or LLaVA v1.5."
        )
    if problems:
        raise InputError(problems)


def seg_head_tokens(embedding_BCGG: Tensor, grid: int) -> Tensor:
    """Turns the seg head's frozen embedding into the projector's input (B, grid^2, C (G/grid)^2 + 64), row by row.

    A token holds all features of its cell, each channel standardised over the image, and the sines and cosines of its
    centre, so that positions need not be learned.
    """
    cell = embedding_BCGG.shape[-1] // grid
    # Half of LiteMedSAM's variance is constant channel offsets, which would hide what tells places apart.
    features = F.instance_norm(embedding_BCGG.float())
    cells = F.unfold(features, kernel_size=cell, stride=cell).transpose(1, 2)
    centres = (torch.arange(grid, device=cells.device) + 0.5) / grid
    frequencies = math.pi * torch.logspace(0, math.log2(grid), POSITION_FREQUENCIES, base=2, device=cells.device)
    angles = centres[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)
    position = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    # Both halves get equal length, or the many features would drown the few waves.
    position = F.normalize(position, dim=-1) * embedding_BCGG.shape[1] ** 0.5
    return torch.cat([cells / cell, position.expand(len(cells), -1, -1)], dim=-1)
