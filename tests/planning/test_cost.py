"""Measured costs: against a real step, against formulas, and against themselves."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from medisee.config import Config
from medisee.config.load import config_from
from medisee.models.losses import end_to_end_loss
from medisee.models.medisee import MediSee
from medisee.planning import cost
from medisee.planning.cost import StepCost, Tally, query_cost, training_cost
from medisee.planning.parameters import stand_in_tokenizer
from medisee.planning.workload import CACHED, OURS, RELEASE, add_pixels, make_batch, training_workload
from medisee.training.layers import recompute_layers


def small(layers: int = 2, **mllm: Any) -> Config:
    """A small run, whose weights all learn; its manifests are missing."""
    size = {"hidden": 64, "layers": layers, "heads": 4, "kv_heads": 2, "intermediate": 128}
    vision = {"vision_hidden": 32, "vision_layers": 2, "vision_size": 168}
    values = {
        "model": {
            "mllm": {"size": size, "vocabulary": 400, "train": "full", **vision, **mllm},
            "seg_head": {"vit": "micro", "size": 64},
            "router_hidden": 32,
            "box_hidden": 16,
        },
        "loss": {"mask_resolution": "decoder"},
        "data": {"targets_per_image": 2},
        "train": {"batch_size": 2, "dtype": "float32"},
    }
    return config_from(values, where="test")


def measure(config: Config, mode: Any = OURS, **more: Any) -> cost.StepCost:
    """Measures in float32."""
    return training_cost(config, training_workload(config), mode, dtype=torch.float32, **more)


@pytest.fixture(scope="module")
def ours() -> cost.StepCost:
    """The small run's micro-batch."""
    return measure(small())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_real_step_takes_what_was_measured(recompute: bool) -> None:
    config = small()
    measured = measure(config, recompute=recompute)
    model = MediSee(config.model, stand_in_tokenizer(config.model)).train()
    if recompute:
        recompute_layers(model.mllm)
    batch = add_pixels(make_batch(model, training_workload(config), config, OURS), model, OURS)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    held = [*model.parameters(), *model.buffers()]
    tally = Tally()
    tally.ignore([*held, *(value.grad for value in held if value.grad is not None)])
    own = [value for field in fields(batch) if isinstance(value := getattr(batch, field.name), torch.Tensor)]
    tally.add([*own, *batch.masks])
    with tally:
        loss = end_to_end_loss(model(batch), batch, config.loss).total
        kept = tally.now
        loss.backward()
    assert kept == pytest.approx(measured.kept, rel=0.01)
    assert tally.peak == pytest.approx(measured.peak, rel=0.01)
    assert tally.flops == pytest.approx(measured.flops, rel=1e-6)


def test_flops_follow_from_the_sizes(ours: cost.StepCost) -> None:
    config, sizes = small(), (64, 2, 4, 2, 128)
    hidden, layers, heads, kv_heads, intermediate = sizes
    measured, workload = ours, training_workload(config)
    model = MediSee(config.model, stand_in_tokenizer(config.model))
    sequences, length = make_batch(model, workload, config, OURS).input_ids_SL.shape
    matrices = hidden * hidden * 2 + 2 * hidden * hidden * kv_heads // heads + 3 * hidden * intermediate
    attention = 2 * sequences * length * length * hidden
    # Forward, and twice that backward; fused attention computes its scores once more.
    per_layer = 3 * 2 * sequences * length * matrices + (2 + 5) * attention
    assert measured.language_model == pytest.approx(layers * per_layer, rel=1e-9)
    supervised = sum(query.answer for queries in workload.images for query in queries)
    assert measured.lm_head == 3 * 2 * supervised * hidden * len(model.tokenizer)


def test_few_layers_tell_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(layers=5)
    for recompute in (False, True):
        line = measure(config, recompute=recompute)
        with monkeypatch.context() as patch:
            patch.setattr(cost, "_FEW", (4, 5))
            whole = measure(config, recompute=recompute)
        assert line.flops == pytest.approx(whole.flops, rel=1e-9)
        assert line.kept == pytest.approx(whole.kept, rel=1e-9)
        assert line.peak == pytest.approx(whole.peak, rel=0.01)


def test_recomputing_trades_memory_for_arithmetic() -> None:
    config = small(layers=4)
    kept, again = measure(config), measure(config, recompute=True)
    assert again.kept < 0.6 * kept.kept and again.peak < 0.8 * kept.peak
    # One more forward pass of the layers, all but what only its own end needs.
    assert 1.2 < again.language_model / kept.language_model < 1.34
    assert again.decoders == pytest.approx(kept.decoders, rel=1e-6)


def test_a_part_of_the_layers_recomputed_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(layers=4)
    kept, again = measure(config), measure(config, recompute=True)
    planned = cost.cost_on_line(kept, again, 0.5)
    monkeypatch.setattr(cost, "_FEW", (3, 4))
    monkeypatch.setattr(cost, "recompute_layers", lambda llava: recompute_layers(llava, 2))
    measured = measure(config, recompute=True)
    assert kept.flops < measured.flops < again.flops
    assert planned.flops == pytest.approx(measured.flops, rel=0.01)
    assert again.kept < measured.kept < kept.kept
    assert planned.kept == pytest.approx(measured.kept, rel=0.05)
    assert planned.peak == pytest.approx(measured.peak, rel=0.1)


def test_frozen_weights_have_no_gradients_of_their_own(ours: cost.StepCost) -> None:
    full, lora = ours, measure(small(train="lora", lora={"rank": 1}))
    assert 0.6 < lora.language_model / full.language_model < 0.9


def test_single_rows_cost_a_whole_vocabularys_arithmetic() -> None:
    """They are placed among the frozen rows, whose gradient is computed and left: what they save is memory."""
    every, new = (measure(small(train="lora", train_tokens=kind)) for kind in ("all", "new"))
    assert new.lm_head == every.lm_head
    assert new.flops == pytest.approx(every.flops, rel=1e-6)


def test_the_releases_mode_computes_more(ours: cost.StepCost) -> None:
    config = small()
    release, cached = measure(config, RELEASE), measure(config, CACHED)
    assert release.image_encoder == ours.image_encoder > cached.image_encoder == 0
    assert release.language_model > 1.1 * ours.language_model
    assert release.lm_head > 2 * ours.lm_head
    assert release.vision_tower == pytest.approx(2 * ours.vision_tower, rel=0.2)
    assert release.peak > ours.peak


def test_an_encoder_that_learns_has_a_backward_pass(ours: cost.StepCost) -> None:
    config = small()
    lora = config.model.seg_head.model_copy(update={"lora": config.model.mllm.lora})
    learning = config.model_copy(update={"model": config.model.model_copy(update={"seg_head": lora})})
    assert measure(learning).image_encoder > 1.8 * ours.image_encoder


def test_bfloat16_keeps_less(ours: cost.StepCost) -> None:
    config = small()
    workload = training_workload(config)
    half = training_cost(config, workload, OURS, dtype=torch.bfloat16)
    assert half.kept < 0.9 * ours.kept
    assert half.flops == pytest.approx(ours.flops, rel=0.01)


def test_reading_costs_a_third_of_training(ours: cost.StepCost) -> None:
    config = small()
    read = query_cost(config, training_workload(config), dtype=torch.float32)
    for field in fields(StepCost):
        assert getattr(read, field.name) <= getattr(ours, field.name)
    assert read.lm_head == ours.lm_head / 3
    assert read.peak < ours.peak
