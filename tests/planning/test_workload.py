"""Workloads: what is assumed, what is measured, and how a compute mode shapes the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medisee.config.load import config_from
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.planning.parameters import meta_model
from medisee.planning.workload import (
    CACHED,
    CLASS_QUERY,
    OURS,
    REASONING_QUERY,
    RELEASE,
    TEMPLATE_TOKENS,
    add_pixels,
    make_batch,
    training_workload,
)


def run(tiny_config: dict[str, Any], **train: Any) -> Any:
    """The tiny run with other training settings."""
    return config_from({**tiny_config, "train": {**tiny_config["train"], **train}}, where="test")


def without_data(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """The tiny run, whose manifests are missing."""
    return {**tiny_config, "data": {"train": [{"records": "nowhere.jsonl"}]}}


def test_assumed_images_are_the_papers_mixture(tiny_config: dict[str, Any]) -> None:
    workload = training_workload(run(without_data(tiny_config), batch_size=10))
    assert not workload.measured
    assert workload.images == ((CLASS_QUERY,) * 3,) * 7 + ((REASONING_QUERY,) * 3,) * 3


def test_measured_images_come_from_the_manifest(tiny_config: dict[str, Any], tiny_manifest: Path) -> None:
    workload = training_workload(run(tiny_config, batch_size=4))
    assert workload.measured and {len(queries) for queries in workload.images} == {2}
    question = "Which organ makes bile?", "Which large organ lies at the upper left here?"
    assert workload.images[0][0].question == round(sum(-(-len(text) // 4) for text in question) / 2)


def test_targets_are_limited(tiny_config: dict[str, Any], tiny_manifest: Path) -> None:
    values = {**tiny_config, "data": {**tiny_config["data"], "targets_per_image": 1}}
    assert {len(queries) for queries in training_workload(run(values)).images} == {1}


def test_a_broken_manifest_is_refused(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    values = {**tiny_config, "data": {"train": [{"records": str(path)}]}}
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="no record"):
        training_workload(run(values))
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.jsonl:1"):
        training_workload(run(values))


@pytest.fixture(scope="module")
def vision_config(tiny_config: dict[str, Any]) -> Any:
    """A run with a vision tower and four images."""
    mllm = {**tiny_config["model"]["mllm"], "image_tokens": "vision_tower", "vision_hidden": 32, "vision_size": 28}
    values = {**without_data(tiny_config), "model": {**tiny_config["model"], "mllm": mllm}}
    return run(values, batch_size=4)


@pytest.fixture(scope="module")
def vision_model(vision_config: Any) -> MediSee:
    """Its model, without weights."""
    return meta_model(vision_config.model)


def test_our_mode_is_one_sequence_per_image(vision_model: MediSee, vision_config: Any) -> None:
    workload = training_workload(vision_config)
    batch = add_pixels(make_batch(vision_model, workload, vision_config, OURS), vision_model, OURS)
    longest = max(
        sum(query.question + query.answer + TEMPLATE_TOKENS for query in queries) for queries in workload.images
    )
    prefix = len(vision_model.processor.prefix)
    # The template's first part is in the prefix, one token per word here.
    assert batch.input_ids_SL.shape == (4, prefix + longest - 3)
    assert len(batch.labels_N) == sum(query.answer for queries in workload.images for query in queries)
    assert batch.pixels_B3FF is not None and batch.pixels_B3FF.shape == (4, 3, 64, 64)
    assert batch.vision_B3VV is not None and batch.vision_B3VV.shape == (4, 3, 28, 28)


def test_the_release_reads_the_image_for_every_query(vision_model: MediSee, vision_config: Any) -> None:
    batch = make_batch(vision_model, training_workload(vision_config), vision_config, RELEASE)
    batch = add_pixels(batch, vision_model, RELEASE)
    assert batch.input_ids_SL.shape[0] == 12
    assert len(batch.labels_N) == len(batch.supervised_N2) == batch.input_ids_SL.numel()
    assert batch.vision_B3VV is not None and len(batch.vision_B3VV) == 12
    assert torch.equal(batch.image_of_sequence_S, torch.arange(12))
    assert batch.pixels_B3FF is not None and len(batch.pixels_B3FF) == 4


def test_cached_features_replace_pixels(vision_model: MediSee, vision_config: Any) -> None:
    batch = make_batch(vision_model, training_workload(vision_config), vision_config, CACHED)
    batch = add_pixels(batch, vision_model, CACHED)
    assert batch.pixels_B3FF is None
    assert batch.embedding_BCGG is not None and batch.embedding_BCGG.shape == (4, 32, 4, 4)
