"""The release's tensors in our model: names, the routers' order, the vocabulary, and what has no place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from medisee.foundation.errors import InputError
from medisee.models.heads import Router
from medisee.models.medisee import MediSee
from medisee.weights.medisee_release import (
    PARTS,
    Report,
    our_name,
    our_values,
    place,
    release_key,
    why_dropped,
)
from medisee.weights.shards import Shard, TensorFacts

BuildModel: TypeAlias = Callable[..., MediSee]

SEG_FIRST, BBOX_FIRST = ("[SEG]", "[BBOX]"), ("[BBOX]", "[SEG]")
LANGUAGE = "mllm.model.language_model."
SIZES = [
    {},
    {"router_hidden": 24, "box_hidden": 20, "mllm": {"train": "frozen", "size": {"hidden": 48, "layers": 3}}},
    {
        "mllm": {"vision_patch": 7, "vision_layers": 4, "lora": {"rank": 3}, "size": {"heads": 2, "kv_heads": 1}},
        "seg_head": {
            "size": 96,
            "sizes": {"width": 48, "depth": 3, "heads": 3, "global_attention": [2], "window": 4, "channels": 48},
        },
    },
]


def shard_of(tensors: dict[str, Tensor]) -> Shard:
    facts = {key: TensorFacts(tuple(value.shape), value.dtype) for key, value in tensors.items()}
    return Shard(Path("model.bin"), facts, tensors.__getitem__)


def shapes_of(model: MediSee) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def released(model: MediSee) -> dict[str, Tensor]:
    """Writes a model as the release would: two candidate tokens change places, and `<image>` has no row."""
    state = {}
    for name, value in model.state_dict().items():
        vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        state[release_key(name)] = value[:-1] if vocabulary else our_values(name, value, model.config.candidate_tokens)
    return state


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("lm_head.weight", "mllm.lm_head.weight"),
        ("model.embed_tokens.weight", f"{LANGUAGE}embed_tokens.weight"),
        ("model.norm.weight", f"{LANGUAGE}norm.weight"),
        ("model.layers.3.mlp.up_proj.weight", f"{LANGUAGE}layers.3.mlp.up_proj.weight"),
        ("model.layers.3.self_attn.k_proj.weight", f"{LANGUAGE}layers.3.self_attn.k_proj.weight"),
        ("model.layers.3.self_attn.q_proj.weight", f"{LANGUAGE}layers.3.self_attn.q_proj.base_layer.weight"),
        ("model.layers.3.self_attn.v_proj.base_layer.weight", f"{LANGUAGE}layers.3.self_attn.v_proj.base_layer.weight"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight",) * 2,
        ("model.mm_projector.2.bias", "mllm.model.multi_modal_projector.linear_2.bias"),
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight",
            "mllm.model.vision_tower.encoder.layers.1.self_attn.q_proj.weight",
        ),
        (
            "model.visual_model.mask_decoder.transformer.layers.0.self_attn.q_proj.weight",
            "seg_head.mask_decoder.transformer.layers.0.self_attn.q_proj.weight",
        ),
        ("model.router_seg.gate.2.bias", "seg_router.gate.2.bias"),
        ("model.router_box.gate.0.weight", "box_router.gate.0.weight"),
        ("model.bbox_decoder.layers.1.weight", "box_decoder.layers.2.weight"),
        ("model.text_hidden_fcs.0.2.weight", "text_projection.2.weight"),
        ("model.text_hidden_fcs.1.2.weight", None),
        ("model.something.weight", None),
    ],
)
def test_names(key: str, ours: str | None) -> None:
    if ours == key:
        ours = f"{LANGUAGE}{key.removeprefix('model.')}"
    assert our_name(key, lora=True) == ours
    assert our_name(f"base_model.model.{key}", lora=True) == ours
    unadapted = ours.replace(".base_layer", "") if ours else None
    assert our_name(key, lora=False) == unadapted


@pytest.mark.parametrize("sizes", SIZES)
def test_every_tensor_goes_there_and_back(build_tiny: BuildModel, sizes: dict) -> None:
    """Any sizes: the whole state has a place, part by part, and every value comes back."""
    sizes = {**sizes, "mllm": {"image_tokens": "vision_tower", **sizes.get("mllm", {})}}
    model, report = build_tiny(**sizes), Report()
    shard = shard_of(released(model))
    plan = place(shard, expected=shapes_of(model), config=model.config, report=report)
    state = model.state_dict()
    assert plan.tensors.keys() == plan.old_names.keys() == state.keys()
    for name, value in state.items():
        read = our_values(name, shard.read(plan.old_names[name]), model.config.candidate_tokens)
        assert plan.tensors[name] == TensorFacts(tuple(read.shape), read.dtype)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert (read[-1] == 0).all()
            read, value = read[:-1], value[:-1]
        assert torch.equal(read, value), name
    assert sum(report.placed.values()) == len(state)
    assert all(report.placed[part] and report.parameters[part] for part in PARTS)
    assert report.parameters["box decoder"] == sum(p.numel() for p in model.box_decoder.parameters())
    assert report.dtypes == {"float32": len(state)}
    assert f"text projection      4 tensors {report.parameters['text projection']:>14,} values" in report.lines()


@pytest.mark.parametrize("order", [SEG_FIRST, BBOX_FIRST])
def test_the_routers_weigh_the_same_states(order: tuple[str, ...]) -> None:
    """The release's router, written out on the concatenation of [BBOX] and [SEG], equals ours in any order of tokens."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    theirs = {"0.weight": random(5, 6), "0.bias": random(5), "2.weight": random(2, 5), "2.bias": random(2)}
    states = dict(zip(BBOX_FIRST, random(2, 4, 3), strict=True))
    joined = torch.cat([states["[BBOX]"], states["[SEG]"]], dim=1)
    inner = torch.nn.functional.gelu(joined @ theirs["0.weight"].T + theirs["0.bias"])
    gates = (inner @ theirs["2.weight"].T + theirs["2.bias"]).sigmoid()
    expected = (gates[:, :1] * states["[BBOX]"] + gates[:, 1:] * states["[SEG]"]) / gates.sum(1, keepdim=True)
    router = Router(3, 2, width=5, mode="soft", pick=0)
    values = {f"gate.{k}": our_values(f"seg_router.gate.{k}", v, order) for k, v in theirs.items()}
    router.load_state_dict(values)
    fused = router(torch.stack([states[token] for token in order], dim=1))
    torch.testing.assert_close(fused, expected)
    if order == SEG_FIRST:
        assert not torch.equal(values["gate.2.bias"], theirs["2.bias"])


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "computed from the sizes"),
        ("model.vision_tower.vision_tower.vision_model.embeddings.position_ids", "computed from the sizes"),
        ("model.visual_model.pixel_mean", "a constant of SAM"),
        ("model.norm.weight", None),
    ],
)
def test_what_is_left_out_has_a_reason(build_tiny: BuildModel, key: str, reason: str | None) -> None:
    assert why_dropped(f"base_model.model.{key}") == why_dropped(key) == reason
    if reason is None:
        return
    model, report = build_tiny(mllm={"image_tokens": "vision_tower"}), Report()
    shard = shard_of({**released(model), key: torch.zeros(3)})
    plan = place(shard, expected=shapes_of(model), config=model.config, report=report)
    assert len(plan.tensors) == len(model.state_dict())
    assert f"left out: {key} ({reason})" in report.lines()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.stranger.weight", torch.zeros(1), "unknown tensor model.stranger.weight; expected the authors'"),
        ("model.visual_model.adapter", torch.zeros(1), "unknown tensor model.visual_model.adapter"),
        ("model.norm.weight", torch.zeros(7), r"model.norm.weight has shape \(7,\), .* expects \(32,\)"),
        ("model.router_seg.gate.2.bias", torch.zeros(3), r"router_seg.gate.2.bias has shape \(3,\), .* expects \(2,\)"),
        ("model.router_seg.gate.0.weight", torch.zeros(16, 96), r"has shape \(16, 96\), .* expects \(16, 64\)"),
        (
            "lm_head.weight",
            torch.zeros(500, 32),
            r"lm_head.weight has 500 rows of 32, but the tokenizer has \d+ tokens",
        ),
    ],
)
def test_what_has_no_place_is_named(build_tiny: BuildModel, key: str, value: Tensor, message: str) -> None:
    model = build_tiny(mllm={"image_tokens": "vision_tower"})
    with pytest.raises(InputError, match=f"model.bin: .*{message}"):
        place(shard_of({key: value}), expected=shapes_of(model), config=model.config, report=Report())


def test_lora_without_lora_names_the_setting(build_tiny: BuildModel) -> None:
    adapted = build_tiny(mllm={"image_tokens": "vision_tower"})
    model = build_tiny(mllm={"image_tokens": "vision_tower", "train": "frozen"})
    with pytest.raises(InputError, match=r"lora_A.default.weight; .* set model.mllm.train=lora") as caught:
        place(shard_of(released(adapted)), expected=shapes_of(model), config=model.config, report=Report())
    assert len(caught.value.problems) == 8


def test_many_problems_are_counted(build_tiny: BuildModel) -> None:
    model = build_tiny(mllm={"image_tokens": "vision_tower"})
    strangers = {f"model.stranger.{number}": torch.zeros(1) for number in range(20)}
    with pytest.raises(InputError) as caught:
        place(shard_of(strangers), expected=shapes_of(model), config=model.config, report=Report())
    assert len(caught.value.problems) == 9
    assert caught.value.problems[-1] == "model.bin: and 12 more"
