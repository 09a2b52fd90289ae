"""Counts of the 7B model, against sums written down here from its sizes alone; nothing is loaded or allocated."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from medisee.config.load import config_from, load_config
from medisee.config.model import Model
from medisee.foundation.errors import InputError
from medisee.planning.parameters import count_parts, meta_model, quantised_weights, stand_in_tokenizer

CONFIG_7B = Path(__file__).parents[2] / "configs" / "medisee_7b.yaml"
README = Path(__file__).parents[2] / "configs" / "README.md"

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, ROWS = 4096, 32, 32, 8, 14336, 32000 + 3
KEYS = HIDDEN // HEADS * KV_HEADS


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with a bias."""
    return inputs * outputs + outputs


def vision_tower() -> int:
    """CLIP ViT-L/14 at 336: 24 layers of 1024, 577 positions, a norm before and one behind."""
    norm = 2 * 1024
    layer = 4 * linear(1024, 1024) + linear(1024, 4096) + linear(4096, 1024) + 2 * norm
    return 24 * layer + 1024 * 3 * 14 * 14 + 1024 + 577 * 1024 + 2 * norm


def image_encoder() -> int:
    """SAM ViT-B: 12 blocks of 768 (4 of them global), decomposed relative positions, a neck of two convolutions."""
    block = linear(768, 3 * 768) + linear(768, 768) + linear(768, 3072) + linear(3072, 768) + 4 * 768
    positions = 8 * 2 * (2 * 14 - 1) * 64 + 4 * 2 * (2 * 64 - 1) * 64
    neck = 768 * 256 + 256 * 256 * 9 + 2 * 2 * 256
    return 12 * block + positions + linear(3 * 16 * 16, 768) + 64 * 64 * 768 + neck


def mask_decoder() -> int:
    """SAM's: two two-way blocks, a last attention, five tokens, upscaling, four hypernetworks, the quality head."""
    same = 4 * linear(256, 256)
    cross = 3 * linear(256, 128) + linear(128, 256)
    block = same + 2 * cross + linear(256, 2048) + linear(2048, 256) + 4 * 512
    upscaling = 256 * 64 * 4 + 64 + 2 * 64 + 64 * 32 * 4 + 32
    hypernetwork = 2 * linear(256, 256) + linear(256, 32)
    quality = 2 * linear(256, 256) + linear(256, 4)
    return 2 * block + cross + 512 + 5 * 256 + upscaling + 4 * hypernetwork + quality


def prompt_encoder() -> int:
    """SAM's: four point embeddings, two for nothing, the mask branch."""
    branch = 4 * 4 + 4 + 2 * 4 + 4 * 16 * 4 + 16 + 2 * 16 + linear(16, 256)
    return 4 * 256 + 2 * 256 + branch


EXPECTED = {
    "language model": (
        LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN) + HIDDEN,
        0,
    ),
    "LoRA": (LAYERS * 8 * (2 * HIDDEN + HIDDEN + KEYS),) * 2,
    "embedding": (ROWS * HIDDEN,) * 2,
    "output layer": (ROWS * HIDDEN,) * 2,
    "vision tower": (vision_tower(), 0),
    "projector": (linear(1024, HIDDEN) + linear(HIDDEN, HIDDEN), 0),
    "routers": (2 * (linear(2 * HIDDEN, 1024) + linear(1024, 2)),) * 2,
    "box decoder": (linear(HIDDEN, 512) + linear(512, 512) + linear(512, 4),) * 2,
    "text projection": (linear(HIDDEN, HIDDEN) + linear(HIDDEN, 256),) * 2,
    "image encoder": (image_encoder(), 0),
    "prompt encoder": (prompt_encoder(), 0),
    "mask decoder": (mask_decoder(),) * 2,
}


@pytest.fixture(scope="module")
def model_7b() -> Model:
    """The paper's model; no file that it names is here."""
    return load_config(CONFIG_7B).model


def test_counts_of_the_paper_follow_from_its_sizes(model_7b: Model) -> None:
    counts = count_parts(meta_model(model_7b))
    assert {one.part: (one.total, one.trainable) for one in counts} == EXPECTED
    assert sum(one.total for one in counts) == pytest.approx(7.70e9, rel=0.001)
    assert sum(one.trainable for one in counts) == pytest.approx(306.6e6, rel=0.001)


ROWS_OF_README = {
    "language model": ("language model",),
    "its LoRA": ("LoRA",),
    "embedding, output layer": ("embedding", "output layer"),
    "vision tower, projector": ("vision tower", "projector"),
    "two routers": ("routers",),
    "box decoder, text projection": ("box decoder", "text projection"),
    "MedSAM: image encoder, prompt encoder": ("image encoder", "prompt encoder"),
    "mask decoder": ("mask decoder",),
    "**together**": tuple(EXPECTED),
}
"""Rows of the table and the parts that they join."""


def test_the_readmes_table_holds_these_counts() -> None:
    text = README.read_text(encoding="utf-8")
    table = text.split("| million parameters | all | learning |")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    found = {name: (total, learning) for name, total, learning in lines}

    def millions(counts: Iterable[int], mark: str) -> str:
        count = sum(counts)
        return f"{mark}{count / 1e6:,.2f}{mark}" if count else ""

    expected = {}
    for name, parts in ROWS_OF_README.items():
        mark = "**" if name.startswith("**") else ""
        totals, learning = zip(*(EXPECTED[part] for part in parts), strict=True)
        expected[name] = (millions(totals, mark), millions(learning, mark))
    assert found == expected


def test_the_build_takes_no_memory_and_no_file(model_7b: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("planning must not reach for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    before = resident()
    model = meta_model(model_7b)
    assert resident() - before < 300 * 2**20  # of 16 GB
    assert {value.device.type for value in [*model.parameters(), *model.buffers()]} == {"meta"}


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_weights_are_stored_as_training_stores_them(model_7b: Model) -> None:
    stored = {one.part: one.stored / one.total for one in count_parts(meta_model(model_7b))}
    assert stored["language model"] == stored["vision tower"] == 2
    assert {stored[part] for part in ("LoRA", "embedding", "output layer", "routers", "mask decoder")} == {4}
    whole = count_parts(meta_model(model_7b, dtype=torch.float32))
    assert {one.stored / one.total for one in whole} == {4}


def test_only_frozen_matrices_of_the_layers_are_quantised(model_7b: Model) -> None:
    norms = (2 * LAYERS + 1) * HIDDEN
    assert quantised_weights(meta_model(model_7b)) == EXPECTED["language model"][0] - norms


def test_every_seg_head_can_be_counted(tiny_config: dict[str, Any]) -> None:
    heads: list[dict[str, Any]] = [
        {"kind": "medsam", "vit": "micro", "size": 64, "lora": {"rank": 2}},
        {"kind": "sam_med2d", "vit": "micro", "size": 64},
        {"kind": "lite_medsam", "size": 64},
    ]
    for head in heads:
        values = {**tiny_config["model"], "seg_head": head}
        counts = {one.part: one for one in count_parts(meta_model(config_from({"model": values}, where="test").model))}
        assert counts["mask decoder"].trainable == counts["mask decoder"].total > 0
        assert (counts["image encoder"].trainable > 0) == ("lora" in head)


TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 512,
}


def test_sizes_of_an_original_checkpoint_are_read(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    settings = {**TEXT, "model_type": "llava_mistral", "mm_vision_tower": "openai/clip", "torch_dtype": "float32"}
    counts = counts_of_source(tmp_path, settings, tiny_config)
    assert counts["embedding"].total == (512 + 3) * 64
    assert counts["embedding"].stored == 4 * counts["embedding"].total == counts["output layer"].stored
    assert counts["language model"].stored == 4 * counts["language model"].total


def test_sizes_of_a_transformers_llava_are_read(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    settings = {
        "model_type": "llava",
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**vision, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        "image_token_index": 500,
    }
    config = {**tiny_config, "model": {**tiny_config["model"], "mllm": {"image_tokens": "vision_tower"}}}
    counts = counts_of_source(tmp_path, settings, config)
    assert counts["embedding"].total == 512 * 64  # padded behind 500 tokens: the new ones need no row
    assert counts["projector"].total == linear(32, 64) + linear(64, 64)
    assert counts["projector"].trainable == 0


def counts_of_source(folder: Path, settings: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Counts the tiny model with a language model of which only config.json is there."""
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    mllm = {**config["model"]["mllm"], "source": str(folder)}
    model = config_from({"model": {**config["model"], "mllm": mllm}}, where="test").model
    return {one.part: one for one in count_parts(meta_model(model))}


def test_a_config_that_describes_no_llava_is_refused(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"config\.json: describes 'bert', which is not a Llava"):
        counts_of_source(tmp_path, {"model_type": "bert"}, tiny_config)


def test_stand_in_tokenizer_has_a_token_a_word(model_7b: Model) -> None:
    tokenizer = stand_in_tokenizer(model_7b)
    assert len(tokenizer) == ROWS
    assert tokenizer("word9 [SEG] word10", add_special_tokens=False).input_ids == [9, 32000, 10]
