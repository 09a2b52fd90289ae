"""Tiny models with random weights, and random images and queries for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_checkpoint import OriginalCheckpoint, original_settings, original_shapes, random_tensors
from sentencepiece import SentencePieceTrainer

from medisee.config.load import config_from
from medisee.config.model import Model
from medisee.models.medisee import MediSee
from medisee.models.processing import Example, Query
from medisee.weights.tokenizer import add_candidate_tokens, train_tokenizer

TEXTS = (
    "[INST] Where is the left lung in this scan? [/INST]",
    "Find the spleen. [/INST] It is the organ behind the stomach.",
    "What could cause the pain on the right side? Please give a mask and a box.",
)

SIZES: dict[str, Any] = {
    "mllm": {
        "size": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64, "rope_theta": 1e4},
        "vocabulary": 300,
        "image_tokens": "seg_head",
        "image_grid": 2,
        "vision_hidden": 64,
        "vision_layers": 2,
        "vision_size": 28,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
    },
    "seg_head": {"vit": "micro", "size": 64, "resize": "longest"},
    "router_hidden": 16,
    "box_hidden": 16,
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with nested changes."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def tiny_config(**changes: Any) -> Model:
    """Returns the sizes of a model that runs in milliseconds."""
    return config_from({"model": merged(SIZES, changes)}, where="test").model


def tiny_medisee(seed: int = 0, **changes: Any) -> MediSee:
    """Builds a model in evaluation mode whose heads are far from their symmetric start.

    The box decoder starts at zero and fresh tokens are small, so an untouched model would hide many mistakes.
    """
    config = tiny_config(**changes)
    tokenizer = train_tokenizer(TEXTS, config.mllm.vocabulary)
    add_candidate_tokens(tokenizer, config.candidate_tokens)
    torch.manual_seed(seed)
    model = MediSee(config, tokenizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "box_decoder" in name or "lora_B" in name:
                parameter.normal_(0, 0.5)
            elif "language_model" in name and parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., MediSee]:
    """The builder itself, for tests that need another size or their own copy."""
    return tiny_medisee


@pytest.fixture
def tiny_model() -> MediSee:
    """A tiny model of this test's own."""
    return tiny_medisee()


@pytest.fixture(scope="session")
def make_example() -> Callable[..., Example]:
    """Makes a random image with one query for each question, with rectangles as truth."""

    def make(
        questions: list[str], *, size: tuple[int, int] = (48, 40), seed: int = 0, answer: str | None = None
    ) -> Example:
        rng = np.random.default_rng(seed)
        height, width = size
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        queries = []
        for number, question in enumerate(questions):
            mask = np.zeros(size, dtype=bool)
            mask[number + 3 : height // 2 + number, 5 : width - 2 * number - 2] = True
            queries.append(Query(record=f"r{seed}", target=f"t{number}", question=question, answer=answer, mask=mask))
        return Example(image, height, width, tuple(queries))

    return make


SENTENCES = (
    "It is [SEG] and [BBOX].",
    "Where is the left lung in this scan?",
    "Find the spleen. It lies behind the stomach, on the left side.",
    "[INST] What could cause the pain on the right side? [/INST]",
    "Please give a mask and a box, and explain why.",
)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model of Llama's kind: 400 pieces, <unk> 0, <s> 1, </s> 2, unknown letters as bytes."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(SENTENCES * 3),
        model_prefix=str(prefix),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def make_original(tmp_path: Path, sentencepiece_file: Path) -> Callable[..., OriginalCheckpoint]:
    """Writes an original checkpoint of four shards; `kind` is safetensors or bin."""

    def make(
        language: str = "mistral",
        *,
        kind: str = "safetensors",
        vision: bool = True,
        dtype: torch.dtype = torch.float32,
        shards: int = 4,
    ) -> OriginalCheckpoint:
        folder = tmp_path / "llava-tiny"
        folder.mkdir(exist_ok=True)
        tensors = random_tensors(original_shapes(rows=400, vision=vision), dtype)
        # What older versions of the libraries saved beside the weights.
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        if vision:
            name = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
            tensors[name] = torch.arange(5)[None]
        checkpoint = OriginalCheckpoint(folder, tensors, original_settings(language))
        checkpoint.write(kind=kind, shards=shards)
        checkpoint.configure()
        shutil.copy(sentencepiece_file, folder / "tokenizer.model")
        return checkpoint

    return make
