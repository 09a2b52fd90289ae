"""Flex attention: its mask is the block mask, and what it computes and learns is what SDPA does.

Torch refuses its backward pass on the CPU, although its reference implementation has one. The tests go around the refusal;
the kernels that are compiled on GPUs are not tested here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torchs_flex
from torch.nn.attention.flex_attention import create_mask

from medisee.config import Loss
from medisee.config.load import config_from
from medisee.foundation.errors import InputError
from medisee.models import packing
from medisee.models.losses import end_to_end_loss
from medisee.models.medisee import MediSee
from medisee.models.packing import block_mask, check_flex, flex_mask, pack
from medisee.models.processing import Example
from medisee.planning.cost import training_cost
from medisee.planning.workload import OURS, training_workload
from medisee.train import train
from medisee.training.layers import recompute_layers

BuildModel = Callable[..., MediSee]
MakeExample = Callable[..., Example]

QUESTIONS = ["Where is the left lung?", "Find the spleen.", "What could cause the pain on the right side of this scan?"]
FORCED = "It is [SEG] and [BBOX]."

lengths = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets torch's reference implementation of flex attention run on the CPU, forward and backward."""
    monkeypatch.setattr(packing, "DEVICES", ("cpu",))
    monkeypatch.setattr(torchs_flex, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


def segments_of(rows: list[tuple[int, list[int]]]) -> Tensor:
    return pack([[1] * prefix for prefix, _ in rows], [[[2] * n for n in own] for _, own in rows], 0).segments_SL


@settings(max_examples=50)
@given(lengths, st.booleans())
def test_the_mask_is_the_block_mask(rows: list[tuple[int, list[int]]], full_prefix: bool) -> None:
    segments = segments_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "DEVICES", ("cpu",))
        mask = flex_mask(segments, full_prefix=full_prefix)
    sequences, length = segments.shape
    assert mask.shape == (sequences, 1, length, length)
    visible = create_mask(mask.mask_mod, sequences, 1, length, length, device="cpu")
    assert torch.equal(visible, block_mask(segments, torch.float32, full_prefix=full_prefix) == 0)


@pytest.mark.parametrize("full_prefix", [False, True])
def test_blocks_that_nothing_sees_are_left_out(full_prefix: bool, reference: None) -> None:
    """Blocks have 128 tokens."""
    segments = segments_of([(300, [130, 260, 128]), (10, [100])])
    mask = flex_mask(segments, full_prefix=full_prefix)
    visible = (block_mask(segments, torch.float32, full_prefix=full_prefix) == 0).float()
    beyond = -segments.shape[1] % 128
    padded = torch.nn.functional.pad(visible, (0, beyond, 0, beyond))
    expected = torch.nn.functional.max_pool2d(padded, 128)
    assert torch.equal(mask.to_dense().float(), expected)
    causal = torch.ones(expected.shape[-2:]).tril()
    assert (expected[0, 0] < causal).any()


def forward(model: MediSee, example: Example) -> dict[str, Tensor]:
    batch = model.processor([example])
    output = model(batch)
    loss = end_to_end_loss(output, batch, Loss(similarity=1.0))
    return {
        "states": model.hidden_states(batch, model.embed_images(batch)),
        "boxes": output.boxes_I4,
        "logits": output.text_logits_NV[:, : model.processor.image_id],
        "total": loss.total,
    }


@pytest.mark.parametrize("prefix", ["causal", "full"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_step_is_that_of_sdpa(
    prefix: str, recompute: bool, build_tiny: BuildModel, make_example: MakeExample, reference: None
) -> None:
    example = make_example(QUESTIONS, answer=FORCED)
    found: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for kernel in ("sdpa", "flex"):
        model = build_tiny(mllm={"attention": kernel, "prefix_attention": prefix}).train()
        if recompute:
            recompute_layers(model.mllm)
        values = forward(model, example)
        values["total"].backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        found[kernel] = values, gradients
    for part, (ours, theirs) in enumerate(zip(found["flex"], found["sdpa"], strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            ours_now, theirs_now = value.detach(), theirs[name].detach()
            scale = max(1.0, float(theirs_now.abs().max()))
            assert float((ours_now - theirs_now).abs().max()) < 1e-5 * scale, (part, name)
    assert any("lora_" in name and value.abs().max() > 0 for name, value in found["flex"][1].items())


def test_a_packed_step_is_the_unpacked_one(build_tiny: BuildModel, make_example: MakeExample, reference: None) -> None:
    model = build_tiny(mllm={"attention": "flex"}).train()
    example = make_example(QUESTIONS, answer=FORCED)
    gradients = {}
    for packed in (True, False):
        batch = model.processor([example], packed=packed)
        model.zero_grad()
        end_to_end_loss(model(batch), batch, Loss(similarity=1.0)).total.backward()
        gradients[packed] = {name: v.grad for name, v in model.named_parameters() if v.grad is not None}
    for name, value in gradients[True].items():
        scale = max(1.0, float(gradients[False][name].abs().max()))
        assert float((value - gradients[False][name]).abs().max()) < 1e-5 * scale, name


def test_another_mask_computes_something_else(
    build_tiny: BuildModel, make_example: MakeExample, reference: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny(mllm={"attention": "flex"}).train()
    batch = model.processor([make_example(QUESTIONS, answer=FORCED)])
    right = model(batch).boxes_I4
    own = flex_mask
    monkeypatch.setattr("medisee.models.medisee.flex_mask", lambda segments, **more: own(segments.clamp(max=1), **more))
    assert float((model(batch).boxes_I4 - right).abs().max()) > 1e-3


@torch.no_grad()
def test_outside_training_it_is_sdpa(build_tiny: BuildModel, make_example: MakeExample) -> None:
    """A checkpoint that was trained with flex attention answers on the CPU."""
    models = [build_tiny(mllm={"attention": kernel}) for kernel in ("flex", "sdpa")]
    example = make_example(QUESTIONS, answer=FORCED)
    boxes = [model(model.processor([example])).boxes_I4 for model in models]
    assert torch.equal(*boxes)
    question = make_example(QUESTIONS)
    written = [m.generate(m.processor([question], packed=False), max_new_tokens=4).texts for m in models]
    assert written[0] == written[1]


def test_only_the_language_model_has_it(build_tiny: BuildModel) -> None:
    model = build_tiny(mllm={"attention": "flex", "image_tokens": "vision_tower"})
    llava: Any = model.mllm
    kernels = {}
    for mode in (True, False):
        model.train(mode)
        parts = llava.model.language_model, llava.model.vision_tower
        kernels[mode] = [part.config._attn_implementation for part in parts]
    assert kernels == {True: ["flex_attention", "sdpa"], False: ["sdpa", "sdpa"]}


def test_the_cpu_cannot_train_with_it(
    build_tiny: BuildModel, make_example: MakeExample, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    model = build_tiny(mllm={"attention": "flex"}).train()
    message = r"model\.mllm\.attention = 'flex': .* no backward pass on 'cpu'; train on a GPU, or set it to sdpa"
    with pytest.raises(InputError, match=message):
        model(model.processor([make_example(QUESTIONS, answer=FORCED)]))
    mllm = {**tiny_config["model"]["mllm"], "attention": "flex"}
    section = {**tiny_config["train"], "out": str(tmp_path / "run")}
    values = {**tiny_config, "model": {**tiny_config["model"], "mllm": mllm}, "train": section}
    with pytest.raises(InputError, match=message):
        train(config_from(values, where="test"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("device", "able"), [("cuda", True), ("cuda:3", True), ("cpu", False), ("mps", False)])
def test_devices(device: str, able: bool) -> None:
    if able:
        check_flex(torch.device(device))
        return
    with pytest.raises(InputError, match=device):
        check_flex(torch.device(device))


def test_attention_dropout_is_refused(build_tiny: BuildModel) -> None:
    size = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 48, "dropout": 0.1}
    with pytest.raises(InputError, match=r"flex attention does not support the attention dropout of 0\.1"):
        build_tiny(mllm={"attention": "flex", "size": size})


def test_a_plan_takes_sdpas_cost(tiny_config: dict[str, Any]) -> None:
    costs = []
    for kernel in ("flex", "sdpa"):
        mllm = {**tiny_config["model"]["mllm"], "attention": kernel}
        config = config_from({**tiny_config, "model": {**tiny_config["model"], "mllm": mllm}}, where="test")
        costs.append(training_cost(config, training_workload(config), OURS, dtype=torch.float32))
    assert costs[0] == costs[1]
