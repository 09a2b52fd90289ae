"""The language model: what is built or loaded, where LoRA is, what learns, where the new tokens are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from medisee.config.model import Mllm, Model
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.models.mllm import POSITION_FREQUENCIES, load_mllm, load_tokenizer, seg_head_tokens
from medisee.models.processing import Example
from medisee.models.seg_head import SegHeadSpec
from medisee.weights.tokenizer import IMAGE_TOKEN, add_candidate_tokens, train_tokenizer

BuildModel: TypeAlias = Callable[..., MediSee]

SPEC = SegHeadSpec(size=64, resize="longest", pixels="minmax", channels=32, grid=4)
CANDIDATES = ("[SEG]", "[BBOX]")
TEXTS = ["[INST] Where is the left lung? [/INST]", "Find the spleen in this scan of the chest."]
SMALL: dict[str, Any] = {
    "size": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64},
    "vocabulary": 300,
    "vision_hidden": 64,
    "vision_layers": 2,
    "vision_size": 28,
    "image_grid": 2,
}


def mllm_config(**changes: Any) -> Mllm:
    return Mllm.model_validate(SMALL | changes)


def plain_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 300)


def new_tokenizer(candidates: tuple[str, ...] = CANDIDATES) -> PreTrainedTokenizerBase:
    tokenizer = plain_tokenizer()
    add_candidate_tokens(tokenizer, candidates)
    return tokenizer


def built(**changes: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return load_mllm(mllm_config(**changes), new_tokenizer(), SPEC).eval()


def token_ids(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    assert isinstance(ids, list)
    return ids


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_lora(name: str) -> bool:
    return ".lora_" in name


@pytest.mark.parametrize("candidates", [("[SEG]",), CANDIDATES, ("[SEG]", "[BBOX]", "[TGT3]")])
def test_candidate_tokens_stand_in_order_before_the_image_token(candidates: tuple[str, ...]) -> None:
    tokenizer = new_tokenizer(candidates)
    size = len(plain_tokenizer())
    ids = token_ids(tokenizer, *candidates, IMAGE_TOKEN)
    assert ids == list(range(size, size + len(candidates) + 1))
    assert len(tokenizer) == size + len(candidates) + 1
    for token, number in zip(candidates, ids, strict=False):
        assert number in tokenizer(f"It is {token}.", add_special_tokens=False).input_ids


def test_adding_candidate_tokens_twice_changes_nothing() -> None:
    tokenizer = new_tokenizer()
    before = tokenizer.get_vocab()
    add_candidate_tokens(tokenizer, CANDIDATES)
    assert tokenizer.get_vocab() == before


def test_image_token_count() -> None:
    assert mllm_config().image_token_count == 4
    assert Mllm().image_token_count == 576
    assert mllm_config(image_tokens="seg_head", image_grid=3).image_token_count == 9


def test_sizes_reach_the_llava() -> None:
    llava: Any = built()
    text = llava.config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (32, 2, 4)
    assert (text.num_key_value_heads, text.intermediate_size, text.vocab_size) == (2, 64, len(new_tokenizer()))
    assert text.sliding_window is None
    embedding, output = llava.get_input_embeddings().weight, llava.get_output_embeddings().weight
    assert embedding.shape == output.shape == (len(new_tokenizer()), 32)
    assert embedding.data_ptr() != output.data_ptr()


def test_mistral_7b_is_the_default() -> None:
    size = Mllm().size
    assert (size.hidden, size.layers, size.heads, size.kv_heads, size.intermediate) == (4096, 32, 32, 8, 14336)
    assert size.rope_theta == 1e6
    assert (Mllm().lora.rank, Mllm().lora.alpha, Mllm().lora.dropout) == (8, 16, 0.05)


@pytest.mark.parametrize("image_tokens", ["vision_tower", "seg_head"])
def test_lora_sits_on_the_language_models_q_and_v_only(image_tokens: str) -> None:
    """CLIP has modules of the same names."""
    llava = built(image_tokens=image_tokens)
    adapters = {name.split(".lora_")[0] for name, _ in llava.named_parameters() if is_lora(name)}
    layers = range(2)
    expected = {f"model.language_model.layers.{i}.self_attn.{part}_proj" for i in layers for part in "qv"}
    assert adapters == expected
    clip = [name for name, _ in llava.named_modules() if "vision_tower" in name and name.endswith("q_proj")]
    assert bool(clip) == (image_tokens == "vision_tower")


def test_lora_has_its_rank_and_scale_and_starts_at_zero() -> None:
    llava = built(lora={"rank": 3, "alpha": 12, "dropout": 0.25})
    layer: Any = llava.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.scaling["default"] == 4
    assert layer.lora_dropout["default"].p == 0.25
    x = torch.randn(1, 32)
    assert torch.equal(layer(x), layer.base_layer(x))


TRAINED_PROJECTOR = {f"model.multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
TRAINED_TOKENS = {"model.language_model.embed_tokens.weight", "lm_head.weight"}


def test_what_learns_with_lora() -> None:
    names = learning(built(train="lora"))
    assert {name for name in names if not is_lora(name)} == TRAINED_TOKENS | TRAINED_PROJECTOR
    assert sum(map(is_lora, names)) == 2 * 2 * 2


def test_what_learns_in_full() -> None:
    llava = built(train="full")
    language = {name for name, _ in llava.named_parameters() if name.startswith("model.language_model.")}
    assert learning(llava) == language | TRAINED_TOKENS | TRAINED_PROJECTOR
    assert not any(map(is_lora, learning(llava)))


def test_what_learns_when_frozen() -> None:
    assert learning(built(train="frozen")) == TRAINED_TOKENS | TRAINED_PROJECTOR


@pytest.mark.parametrize("train", ["lora", "full", "frozen"])
def test_the_vision_tower_never_learns(train: str) -> None:
    assert not any("vision_tower" in name for name in learning(built(train=train)))


def test_a_vision_tower_from_the_seg_head_has_no_weights() -> None:
    llava = built(image_tokens="seg_head")
    assert not [name for name, _ in llava.named_parameters() if "vision_tower" in name]
    embedding = torch.randn(2, SPEC.channels, SPEC.grid, SPEC.grid)
    tokens = seg_head_tokens(embedding, 2)
    assert tokens.shape[:2] == (2, 4)
    assert llava.model.multi_modal_projector.linear_1.in_features == tokens.shape[2]


def test_seg_head_tokens_are_row_by_row_and_know_their_place() -> None:
    embedding = torch.randn(1, SPEC.channels, SPEC.grid, SPEC.grid)
    swapped = embedding.clone()
    swapped[:, :, :2, 2:], swapped[:, :, 2:, :2] = embedding[:, :, 2:, :2], embedding[:, :, :2, 2:]
    waves = 4 * POSITION_FREQUENCIES
    before, after = seg_head_tokens(embedding, 2)[0], seg_head_tokens(swapped, 2)[0]
    torch.testing.assert_close(after[:, :-waves], before[[0, 2, 1, 3], :-waves])
    assert (before[1, :-waves] - before[2, :-waves]).abs().max() > 0.1
    assert torch.equal(after[:, -waves:], before[:, -waves:])
    assert len({tuple(place) for place in before[:, -waves:].tolist()}) == 4


@torch.no_grad()
def test_vision_features_are_the_second_last_layer_without_the_class_token() -> None:
    llava = built()
    pixels = torch.randn(1, 3, 28, 28)
    tower: Any = llava.model.vision_tower
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    expected = llava.model.multi_modal_projector(hidden[-2][:, 1:])
    features: Any = llava.get_image_features(pixels)
    torch.testing.assert_close(torch.stack(list(features.pooler_output)), expected)
    assert expected.shape == (1, 4, 32)


@dataclass
class Saved:
    folder: Path
    llava: LlavaForConditionalGeneration
    ids: Tensor
    pixels: Tensor

    @torch.no_grad()
    def logits(self, llava: LlavaForConditionalGeneration, image_id: int) -> Tensor:
        """Logits of a text behind an image, whatever the image token's id."""
        ids = torch.cat([torch.full((1, 4), image_id), self.ids], dim=1)
        return llava(input_ids=ids, pixel_values=self.pixels.to(llava.dtype)).logits


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A Llava as others publish it: saved by transformers, its image token last, without candidate tokens."""
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    torch.manual_seed(1)
    llava = load_mllm(mllm_config(train="full"), tokenizer, SPEC).eval()
    with torch.no_grad():
        for parameter in llava.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    llava.save_pretrained(tmp_path / "llava")
    tokenizer.save_pretrained(tmp_path / "llava")
    ids = torch.tensor([tokenizer("Where is the left lung?", add_special_tokens=False).input_ids])
    return Saved(tmp_path / "llava", llava, ids, torch.randn(1, 3, 28, 28))


@pytest.mark.parametrize("train", ["lora", "full", "frozen"])
def test_a_saved_llava_keeps_its_logits(saved: Saved, train: str) -> None:
    config = mllm_config(source=str(saved.folder), train=train)
    tokenizer = load_tokenizer(config, CANDIDATES)
    llava = load_mllm(config, tokenizer, SPEC).eval()
    old = len(plain_tokenizer()) + 1
    before = saved.logits(saved.llava, old - 1)
    after = saved.logits(llava, token_ids(tokenizer, IMAGE_TOKEN)[0])
    assert after.shape[-1] == old + 2
    torch.testing.assert_close(after[..., :old], before, rtol=1e-5, atol=1e-5)


def test_a_saved_llava_brings_its_tokenizer(saved: Saved) -> None:
    config = mllm_config(source=str(saved.folder))
    tokenizer = load_tokenizer(config, CANDIDATES)
    old = len(plain_tokenizer()) + 1
    assert token_ids(tokenizer, IMAGE_TOKEN, *CANDIDATES) == [old - 1, old, old + 1]
    text = "Where is the left lung?"
    assert tokenizer(text, add_special_tokens=False).input_ids == saved.ids[0].tolist()
    assert tokenizer.pad_token_id == 0


def test_a_pretrained_projector_is_frozen(saved: Saved) -> None:
    config = mllm_config(source=str(saved.folder))
    names = learning(load_mllm(config, load_tokenizer(config, CANDIDATES), SPEC))
    assert {name for name in names if not is_lora(name)} == TRAINED_TOKENS


def test_new_embeddings_are_finite_and_of_the_size_of_old_ones(saved: Saved) -> None:
    config = mllm_config(source=str(saved.folder))
    llava: Any = load_mllm(config, load_tokenizer(config, CANDIDATES), SPEC)
    weight = llava.get_input_embeddings().weight
    assert torch.isfinite(weight).all()
    assert weight[-2:].norm(dim=1).max() < 3 * weight[:-2].norm(dim=1).max()


@pytest.mark.parametrize("source", ["no/such-folder/at all", ""])
def test_an_unreadable_source_is_an_input_error(tmp_path: Path, source: str) -> None:
    config = mllm_config(source=str(tmp_path / source))
    for load in (lambda: load_tokenizer(config, CANDIDATES), lambda: load_mllm(config, new_tokenizer(), SPEC)):
        with pytest.raises(InputError, match=r"model\.mllm\.source") as caught:
            load()
        assert len(caught.value.problems) == 1


@torch.no_grad()
def test_a_llava_saved_in_bfloat16_answers(saved: Saved, make_example: Callable[..., Example]) -> None:
    """Published models are stored in 16 bit; validation, evaluation and inference run without autocast."""
    saved.llava.bfloat16().save_pretrained(saved.folder)
    head = {"vit": "micro", "size": 64}
    config = Model.model_validate({"mllm": SMALL | {"source": str(saved.folder)}, "seg_head": head})
    model = MediSee(config, load_tokenizer(config.mllm, CANDIDATES)).eval()
    output = model(model.processor([make_example(["Where is the left lung?"], answer="It is [SEG] and [BBOX].")]))
    assert torch.isfinite(output.boxes_I4).all()


def test_both_kinds_of_image_tokens_build_a_whole_model(build_tiny: BuildModel) -> None:
    for image_tokens in ("vision_tower", "seg_head"):
        model = build_tiny(mllm={"image_tokens": image_tokens})
        assert model.processor.prefix.count(model.processor.image_id) == 4
        names = {name.split(".")[0] for name in learning(model)}
        expected = {"mllm", "seg_router", "box_router", "box_decoder", "text_projection", "seg_head"}
        assert names == expected


@torch.no_grad()
def test_a_saved_llava_can_take_image_tokens_from_the_seg_head(
    saved: Saved, make_example: Callable[..., Example]
) -> None:
    changes = {"source": str(saved.folder), "image_tokens": "seg_head"}
    config = Model.model_validate({"mllm": SMALL | changes, "seg_head": {"vit": "micro", "size": 64}})
    model = MediSee(config, load_tokenizer(config.mllm, CANDIDATES)).eval()
    output = model(model.processor([make_example(["Where is the left lung?"], answer="It is [SEG] and [BBOX].")]))
    assert torch.isfinite(output.boxes_I4).all()
    assert "mllm.model.multi_modal_projector.linear_1.weight" in learning(model)


def test_another_vision_size_than_the_saved_one_is_an_input_error(saved: Saved) -> None:
    config = mllm_config(source=str(saved.folder), vision_size=42)
    with pytest.raises(InputError, match=r"vision_size = 42: .* was trained at 28; set it to 28"):
        load_mllm(config, load_tokenizer(config, CANDIDATES), SPEC)


def test_another_number_of_image_tokens_than_the_saved_one_is_an_input_error(saved: Saved) -> None:
    path = saved.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_feature_select_strategy": "full"}))
    config = mllm_config(source=str(saved.folder), vision_patch=7)
    with pytest.raises(InputError) as caught:
        load_mllm(config, load_tokenizer(config, CANDIDATES), SPEC)
    patch, strategy = caught.value.problems
    assert "vision_patch = 7" in patch and "set it to 14" in patch
    assert "vision_feature_select_strategy is 'full'; expected 'default'" in strategy
