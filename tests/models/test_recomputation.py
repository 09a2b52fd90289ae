"""Layers that compute again give the same gradients, and keep less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from medisee.config import Loss
from medisee.models.medisee import MediSee
from medisee.models.objective import end_to_end_loss
from medisee.models.recomputation import recompute_layers
from medisee.processing import Example


@pytest.mark.parametrize("train", ["lora", "full"])
def test_gradients_stay_and_less_is_kept(
    train: str, build_tiny: Callable[..., MediSee], make_example: Callable[..., Example]
) -> None:
    kept: dict[bool, int] = {}
    gradients: dict[bool, dict[str, torch.Tensor]] = {}
    for again in (False, True):
        model = build_tiny(mllm={"train": train}).train()
        if again:
            recompute_layers(model.mllm)
        batch = model.processor([make_example(["Where is it?", "And this?"], answer="It is [SEG] and [BBOX].")])
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = end_to_end_loss(model(batch), batch, Loss()).total
        kept[again] = sum(sizes)
        loss.backward()
        gradients[again] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert kept[True] < kept[False]
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[True].items():
        torch.testing.assert_close(gradient, gradients[False][name], rtol=1e-5, atol=1e-6, msg=name)
