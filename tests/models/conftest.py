"""Tiny models with random weights, and random images and queries for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from medisee.config import config_from
from medisee.model_config import Model
from medisee.models.medisee import MediSee
from medisee.models.tokenizer import add_candidate_tokens, train_tokenizer
from medisee.processing import Example, Query

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
