"""`train_tokens: new`: only the candidate tokens' rows of the embedding and the output layer learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medisee.config import Loss
from medisee.config.load import load_config
from medisee.config.model import Mllm
from medisee.foundation.errors import InputError
from medisee.models.losses import end_to_end_loss
from medisee.models.medisee import MediSee
from medisee.models.processing import Batch, Example
from medisee.planning.parameters import count_parts, meta_model

BuildModel = Callable[..., MediSee]
MakeExample = Callable[..., Example]

QUESTIONS = ["Where is the left lung?", "Find the spleen."]
FORCED = "It is [SEG] and [BBOX]."
LAYERS = ("model.language_model.embed_tokens", "lm_head")
DELTA = "token_adapter.trainable_tokens_delta.default"


@pytest.fixture
def rows_model(build_tiny: BuildModel) -> MediSee:
    return build_tiny(mllm={"train_tokens": "new"})


def batch_of(model: MediSee, make_example: MakeExample) -> Batch:
    return model.processor([make_example(QUESTIONS, answer=FORCED)])


def vocabulary(model: MediSee) -> list[Tensor]:
    """Returns what the embedding and the output layer compute with."""
    llava: Any = model.mllm
    return [layer.weight.detach().clone() for layer in (llava.get_input_embeddings(), llava.get_output_embeddings())]


def learning(model: MediSee) -> dict[str, Tensor]:
    return {name: value for name, value in model.mllm.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("train", ["lora", "frozen"])
def test_what_learns(train: str, build_tiny: BuildModel) -> None:
    new, every = (build_tiny(mllm={"train": train, "train_tokens": kind}) for kind in ("new", "all"))
    own = {name: tuple(value.shape) for name, value in learning(new).items()}
    for layer in LAYERS:
        assert own.pop(f"{layer}.{DELTA}") == (2, 32)
    others = learning(every)
    assert {f"{layer}.weight" for layer in LAYERS} == set(others) - set(own)
    assert set(own) <= set(others)
    assert any("lora_" in name for name in own) == (train == "lora")


def step(model: MediSee, batch: Batch) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    end_to_end_loss(model(batch), batch, Loss()).total.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["new", "all"])
def test_a_step_changes_the_candidates_rows_only(kind: str, build_tiny: BuildModel, make_example: MakeExample) -> None:
    model = build_tiny(mllm={"train_tokens": kind}).train()
    before, batch = vocabulary(model), batch_of(model, make_example)
    step(model, batch)
    candidates = set(model.processor.candidate_ids)
    changed = [
        set((new != old).any(dim=1).nonzero().flatten().tolist())
        for new, old in zip(vocabulary(model), before, strict=True)
    ]
    if kind == "new":
        assert changed == [candidates, candidates]
    else:
        assert all(candidates < rows for rows in changed)


def test_it_computes_and_learns_what_all_rows_do(build_tiny: BuildModel, make_example: MakeExample) -> None:
    every, new = (build_tiny(mllm={"train_tokens": kind}) for kind in ("all", "new"))
    ids = every.processor.candidate_ids
    state = every.state_dict()
    for layer in LAYERS:
        weight = state.pop(f"mllm.{layer}.weight")
        # Other values under the rows that learn: they must count for nothing.
        state[f"mllm.{layer}.token_adapter.base_layer.weight"] = weight.clone().index_fill_(0, torch.tensor(ids), 7.0)
        state[f"mllm.{layer}.{DELTA}"] = weight[ids]
    new.load_state_dict(state)
    batch = batch_of(every, make_example)
    outputs = [model(batch) for model in (new, every)]
    for field in fields(outputs[0]):
        mine, yours = (getattr(output, field.name) for output in outputs)
        assert (mine is None) == (yours is None), field.name
        if mine is not None and yours is not None:
            assert torch.equal(mine, yours), field.name
    for output in outputs:
        end_to_end_loss(output, batch, Loss()).total.backward()
    ours, theirs = dict(new.mllm.named_parameters()), dict(every.mllm.named_parameters())
    for layer in LAYERS:
        gradient, whole = ours[f"{layer}.{DELTA}"].grad, theirs[f"{layer}.weight"].grad
        assert gradient is not None and whole is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, whole[ids], rtol=1e-5, atol=1e-7)


def test_saved_and_loaded_models_agree(rows_model: MediSee, make_example: MakeExample, tmp_path: Path) -> None:
    batch = batch_of(rows_model, make_example)
    step(rows_model.train(), batch)
    rows_model.eval().save_pretrained(tmp_path / "saved")
    loaded = MediSee.from_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        ours, theirs = rows_model(batch), loaded(batch)
    assert torch.equal(ours.text_logits_NV, theirs.text_logits_NV)
    assert torch.equal(ours.boxes_I4, theirs.boxes_I4)
    for mine, yours in zip(vocabulary(rows_model), vocabulary(loaded), strict=True):
        assert torch.equal(mine, yours)


@pytest.mark.parametrize("what", ["missing", "misshapen"])
def test_lost_rows_are_named(rows_model: MediSee, tmp_path: Path, what: str) -> None:
    rows_model.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    state = load_file(weights)
    name = f"mllm.lm_head.{DELTA}"
    if what == "missing":
        del state[name]
    else:
        state[name] = state[name][:1].clone()
    save_file(state, weights)
    message = {"missing": f"missing tensor {name}", "misshapen": rf"{name} has shape \(1, 32\)"}[what]
    with pytest.raises(InputError, match=message):
        MediSee.from_pretrained(tmp_path / "saved")


def test_generation_writes_with_the_learnt_rows(rows_model: MediSee, make_example: MakeExample) -> None:
    batch = rows_model.processor([make_example(QUESTIONS[:1])], packed=False)
    head = dict(rows_model.mllm.named_parameters())[f"lm_head.{DELTA}"]
    with torch.no_grad():
        state = rows_model.hidden_states(batch, rows_model.embed_images(batch))[0, -1]
        assert not rows_model.generate(batch, max_new_tokens=1).texts[0].startswith("[SEG]")
        head[0] = 100 * state
    assert rows_model.generate(batch, max_new_tokens=1).texts[0].startswith("[SEG]")


def test_all_rows_cannot_learn_beside_it() -> None:
    with pytest.raises(ValidationError, match="train_tokens: new needs lora or frozen"):
        Mllm.model_validate({"train": "full", "train_tokens": "new"})


def test_the_papers_model_learns_two_rows() -> None:
    model = load_config(
        Path(__file__).parents[2] / "configs" / "medisee_7b.yaml", ["model.mllm.train_tokens=new"]
    ).model
    counts = {one.part: one for one in count_parts(meta_model(model))}
    for part in ("embedding", "output layer"):
        assert counts[part].trainable == 2 * 4096
        assert counts[part].total == (32000 + 3 + 2) * 4096
        # 16 bits a frozen value, 32 one that learns.
        assert counts[part].stored == 2 * counts[part].total + 2 * counts[part].trainable
    assert sum(one.trainable for one in counts.values()) == pytest.approx(306.6e6 - 2 * 32001 * 4096, abs=1e5)
