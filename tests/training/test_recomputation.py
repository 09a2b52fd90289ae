"""Layers that compute again give the same gradients, and keep less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from medisee.config import Loss
from medisee.config.load import load_config
from medisee.foundation.errors import InputError
from medisee.models.losses import end_to_end_loss
from medisee.models.medisee import MediSee
from medisee.models.processing import Example
from medisee.training.layers import recompute_layers

LAYERS = 3
SIZE = {"hidden": 32, "layers": LAYERS, "heads": 2, "kv_heads": 1, "intermediate": 64}


@pytest.mark.parametrize("train", ["lora", "full"])
def test_gradients_stay_and_the_less_is_kept_the_more_layers_compute_again(
    train: str, build_tiny: Callable[..., MediSee], make_example: Callable[..., Example]
) -> None:
    kept: list[int] = []
    gradients: list[dict[str, torch.Tensor]] = []
    for count in (0, 1, 2, True):
        model = build_tiny(mllm={"train": train, "size": SIZE}).train()
        recompute_layers(model.mllm, count)
        batch = model.processor([make_example(["Where is it?", "And this?"], answer="It is [SEG] and [BBOX].")])
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = end_to_end_loss(model(batch), batch, Loss()).total
        kept.append(sum(sizes))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert kept == sorted(set(kept), reverse=True)
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("given", "expected"), [("true", True), ("false", False), ("12", 12), ("1", 1)])
def test_the_setting_is_a_switch_or_a_number(given: str, expected: bool | int) -> None:
    found = load_config(None, [f"train.recompute_layers={given}"]).train.recompute_layers
    assert found == expected and type(found) is type(expected)


def test_a_negative_number_of_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"recompute_layers"):
        load_config(None, ["train.recompute_layers=-1"])
