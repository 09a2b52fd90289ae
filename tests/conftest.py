"""A tiny manifest and a micro model trained on it for two steps, made once for all tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from tiny_models import build_tiny, make_example, make_original, sentencepiece_file, tiny_model  # noqa: F401

from medisee.records.masks import encode_mask
from medisee.records.records import QA, Record, Target, write_records

# How long an example takes is no matter of right or wrong.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SIZES = ((48, 64), (64, 40), (56, 72), (40, 64))
CATEGORIES = {"liver": ["liver", "hepatic tissue"], "left kidney": ["left kidney", "ren sinister"]}


@pytest.fixture(scope="session")
def tiny_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a manifest of four images, none square, with two targets of two questions each.

    The liver's mask is a file, the kidney's an RLE. categories.json lies beside it.
    """
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "categories.json").write_text(json.dumps(CATEGORIES), encoding="utf-8")
    records = [_record(folder, index, *size) for index, size in enumerate(SIZES)]
    write_records(folder / "tiny.jsonl", records)
    return folder / "tiny.jsonl"


def _record(folder: Path, index: int, height: int, width: int) -> Record:
    rows, columns = np.ogrid[:height, :width]
    liver = (rows >= 4) & (rows < height // 2) & (columns >= 3 + index) & (columns < width // 2)
    kidney = (rows - 0.75 * height) ** 2 + (columns - 0.7 * width) ** 2 < (height / 6) ** 2
    noise = np.random.default_rng(index).integers(0, 40, (height, width))
    image = (noise + 150 * liver + 90 * kidney).astype(np.uint8)
    Image.fromarray(image).save(folder / f"{index}.png")
    Image.fromarray(liver).save(folder / f"{index}_liver.png")
    return Record(
        id=f"r{index}",
        image=f"{index}.png",
        modality="ct",
        source="tiny",
        case=f"case{index}",
        plane="axial" if index % 2 else "coronal",
        targets=(
            Target(
                id="a",
                category="liver",
                mask=f"{index}_liver.png",
                qa=_questions("liver", "Which organ makes bile?", "Which large organ lies at the upper left here?"),
            ),
            Target(
                id="b",
                category="left kidney",
                mask=encode_mask(kidney),
                qa=_questions("left kidney", "What filters the blood?", "Which round organ lies at the lower right?"),
            ),
        ),
    )


def _questions(name: str, attribute: str, location: str) -> tuple[QA, QA]:
    answer = f"It is [SEG] and [BBOX]. This is the {name}."
    return QA(attribute, answer, "attribute", "short"), QA(location, answer, "location", "long")


@pytest.fixture(scope="session")
def tiny_config(tiny_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the values of a micro run on the tiny manifest; copy them before you change any."""
    language = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 64}
    return {
        "model": {
            "mllm": {
                "size": language,
                "vocabulary": 400,
                "image_tokens": "seg_head",
                "image_grid": 4,
                "train": "full",
            },
            "seg_head": {"kind": "medsam", "vit": "micro", "size": 64, "resize": "longest"},
            "router_hidden": 16,
            "box_hidden": 16,
        },
        "data": {
            "train": [{"records": str(tiny_manifest)}],
            "categories": str(tiny_manifest.with_name("categories.json")),
        },
        "train": {
            "out": str(tmp_path_factory.mktemp("run") / "tiny"),
            "steps": 2,
            "batch_size": 2,
            "accumulation": 1,
            "warmup": 0,
            "dtype": "float32",
        },
        "eval": {"max_new_tokens": 8, "batch_size": 2, "resamples": 20},
    }


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_config: dict[str, Any]) -> Path:
    """Returns the checkpoint of the micro run."""
    from medisee.config.load import config_from
    from medisee.train import train

    return train(config_from(tiny_config, where="tiny_config"))


@pytest.fixture
def every_step(tiny_config: dict[str, Any], tiny_manifest: Path) -> dict[str, Any]:
    """A tiny run of eight steps that logs each, saves every third and validates every fourth."""
    train_section = {"steps": 8, "log_every": 1, "save_every": 3, "val_every": 4, "warmup": 2, "accumulation": 2}
    data = {**tiny_config["data"], "val": str(tiny_manifest)}
    return {**tiny_config, "data": data, "train": {**tiny_config["train"], **train_section}}
