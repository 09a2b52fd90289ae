"""What an original LLaVA checkpoint's files mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_checkpoint import OriginalCheckpoint, original_settings
from tokenizers import pre_tokenizers
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

from medisee.foundation.errors import InputError
from medisee.weights.llava_format import (
    LLAVA_DROPPED,
    LLAVA_NAMES,
    is_original,
    llava_config,
    named_back,
    original_tokenizer,
    renamed,
    vision_config,
)
from medisee.weights.shards import TensorFacts

MakeOriginal = Callable[..., OriginalCheckpoint]

LLAVA_MED = original_settings("mistral") | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}


@pytest.mark.parametrize(
    ("settings", "original"),
    [
        (original_settings("mistral"), True),
        (original_settings("llama"), True),
        ({"model_type": "llava_mistral", "mm_vision_tower": "x"}, True),
        ({"model_type": "llava", "mm_vision_tower": "x"}, True),
        ({"model_type": "llava", "text_config": {}, "architectures": ["LlavaForConditionalGeneration"]}, False),
        ({"model_type": "llava_next", "text_config": {}}, False),
        ({"model_type": "mistral"}, False),
        ({}, False),
    ],
)
def test_it_is_recognised_by_its_config(settings: dict[str, Any], original: bool) -> None:
    assert is_original(settings) is original


def test_names_lead_to_transformers_and_back() -> None:
    for name, new in {
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.31.mlp.up_proj.weight": "model.language_model.layers.31.mlp.up_proj.weight",
        "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias": "model.vision_tower.post_layernorm.bias",
        "lm_head.weight": "lm_head.weight",
    }.items():
        assert renamed(name, LLAVA_NAMES) == new
        assert named_back(new, LLAVA_NAMES) == name
    assert renamed("model.mm_projector.1.weight", LLAVA_NAMES) is None
    assert renamed("base_model.model.lm_head.weight", LLAVA_NAMES) is None
    assert LLAVA_DROPPED.fullmatch("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not LLAVA_DROPPED.fullmatch("model.layers.3.self_attn.q_proj.weight")


def test_llava_med_has_the_sizes_of_mistral_7b() -> None:
    vision = CLIPVisionConfig(image_size=336, patch_size=14)
    config: Any = llava_config(Path("config.json"), LLAVA_MED, vision)
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads, text.head_dim) == (4096, 32, 8, 128)
    assert (text.sliding_window, text.rope_parameters["rope_theta"], text.rms_norm_eps) == (None, 1e6, 1e-5)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy, config.image_seq_length) == (
        -2,
        "default",
        576,
    )
    with torch.device("meta"):
        language = LlavaForConditionalGeneration(config).model.language_model
    assert sum(p.numel() for p in language.parameters()) == 7_110_660_096


def clip_facts(width: int, layers: int, side: int) -> dict[str, TensorFacts]:
    tower = "model.vision_tower."
    shapes: dict[str, tuple[int, ...]] = {"embeddings.patch_embedding.weight": (width, 3, 14, 14)}
    shapes["embeddings.position_embedding.weight"] = (1 + side**2, width)
    shapes |= {f"encoder.layers.{n}.mlp.fc1.weight": (4 * width, width) for n in range(layers)}
    return {tower + name: TensorFacts(shape, torch.float16) for name, shape in shapes.items()}


def test_the_vision_towers_sizes_are_read_from_its_tensors() -> None:
    config = vision_config(Path(), LLAVA_MED, clip_facts(1024, 24, 24), None)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 24, 16)
    assert (config.intermediate_size, config.image_size, config.patch_size) == (4096, 336, 14)
    assert config.hidden_act == "quick_gelu"


def test_another_vision_tower_needs_its_own_config(tmp_path: Path) -> None:
    settings = LLAVA_MED | {"mm_vision_tower": "someone/eva-clip"}
    with pytest.raises(InputError, match=r"someone/eva-clip.*model\.mllm\.vision_source"):
        vision_config(tmp_path, settings, clip_facts(1280, 2, 16), None)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 16, "hidden_act": "gelu"}))
    config = vision_config(tmp_path, settings, clip_facts(1280, 2, 16), tmp_path)
    assert (config.num_attention_heads, config.hidden_act) == (16, "gelu")


def test_rope_scaling_is_kept() -> None:
    settings = LLAVA_MED | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    config: Any = llava_config(Path("c"), settings, CLIPVisionConfig())
    assert config.text_config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}


def test_every_problem_of_a_config_is_reported_at_once() -> None:
    broken = {key: value for key, value in LLAVA_MED.items() if key != "vocab_size"} | {"mm_projector_type": "linear"}
    with pytest.raises(InputError) as caught:
        llava_config(Path("config.json"), broken, CLIPVisionConfig())
    assert len(caught.value.problems) == 2


def test_added_tokens_are_read_in_the_order_of_their_ids(make_original: MakeOriginal) -> None:
    folder = make_original().folder
    (folder / "added_tokens.json").write_text(json.dumps({"<two>": 401, "<one>": 400, "<s>": 1}))
    tokenizer = original_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids(["<one>", "<two>"]) == [400, 401]
    (folder / "added_tokens.json").write_text(json.dumps({"<two>": 402}))
    with pytest.raises(InputError, match="'<two>' has id 402"):
        original_tokenizer(folder)


@pytest.mark.parametrize(("legacy", "kept"), [(True, True), (None, True), (False, False)])
def test_the_tokenizers_kind_is_read_from_its_config(
    make_original: MakeOriginal, legacy: bool | None, kept: bool
) -> None:
    folder = make_original().folder
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer = original_tokenizer(folder)
    tokenizer.add_tokens(["[SEG]"], special_tokens=True)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("[SEG].", add_special_tokens=False).input_ids)
    assert tokens == (["[SEG]", "\u2581", "."] if kept else ["[SEG]", "."])


def test_tokenizer_json_alone_is_enough(make_original: MakeOriginal) -> None:
    folder = make_original().folder
    expected: Any = original_tokenizer(folder)
    expected.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    found = original_tokenizer(folder)
    text = "Where is the left lung? </s>"
    assert found(text, add_special_tokens=False).input_ids == expected(text, add_special_tokens=False).input_ids
    assert found.eos_token_id == 2


def test_tokenizer_json_alone_keeps_the_slow_ones_spaces(make_original: MakeOriginal) -> None:
    folder = make_original().folder
    expected: Any = original_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    described: Any = original_tokenizer(folder)
    backend = described.backend_tokenizer
    # What transformers writes for a tokenizer of the legacy kind.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=False)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    found = original_tokenizer(folder)
    for tokenizer in (expected, found):
        tokenizer.add_tokens(["[SEG]", "[BBOX]"], special_tokens=True)
    text = "It is [SEG] and [BBOX]."
    assert found(text, add_special_tokens=False).input_ids == expected(text, add_special_tokens=False).input_ids


def test_a_class_token_has_no_place() -> None:
    with pytest.raises(InputError, match="mm_vision_select_feature = 'cls_patch' is not supported"):
        llava_config(Path("config.json"), LLAVA_MED | {"mm_vision_select_feature": "cls_patch"}, CLIPVisionConfig())
