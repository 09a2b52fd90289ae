"""`box_start: map`: boxes begin where the similarity map of their own query and image lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn

from medisee.models.geometry import cxcywh_to_xyxy, token_places
from medisee.models.heads import START_EDGE, map_box
from medisee.models.medisee import MediSee
from medisee.models.processing import Example

BuildModel: TypeAlias = Callable[..., MediSee]
MakeExample: TypeAlias = Callable[..., Example]

QUESTIONS = ["Where is the left lung?", "Find the spleen.", "What could cause the pain on the right side of this scan?"]
FORCED = "It is [SEG] and [BBOX]."


def correcting_nothing(model: MediSee) -> MediSee:
    last: Any = model.box_decoder.layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("mllm", "over"),
    [
        ({"image_tokens": "seg_head", "image_grid": 4}, "frame"),
        ({"image_tokens": "vision_tower", "vision_input": "pad"}, "pad"),
        ({"image_tokens": "vision_tower", "vision_input": "centre_crop"}, "centre_crop"),
    ],
)
def test_a_box_starts_where_its_own_images_map_lies(
    build_tiny: BuildModel, make_example: MakeExample, mllm: dict[str, Any], over: Any
) -> None:
    """Also of non-square images, two in a batch."""
    model = correcting_nothing(build_tiny(mllm=mllm, box_start="map"))
    examples = [
        make_example(QUESTIONS[:2], size=(64, 40), answer=FORCED),
        make_example(QUESTIONS[2:], size=(30, 70), seed=1, answer=FORCED),
    ]
    batch = model.processor(examples)
    output = model(batch)
    for index, image in enumerate((0, 0, 1)):
        places = token_places(batch.frames[image], model.processor.image_grid, over)
        expected = map_box(output.similarity_IT[index, None], places[None])
        assert ((expected > START_EDGE) & (expected < 1 - START_EDGE)).sum() >= 3
        expected = cxcywh_to_xyxy(expected.clamp(START_EDGE, 1 - START_EDGE))
        torch.testing.assert_close(output.boxes_I4[index, None], expected)
    assert not torch.allclose(output.boxes_I4[0], output.boxes_I4[2], atol=1e-2)


@pytest.mark.parametrize("box_start", ["centre", "map"])
def test_only_a_map_lets_boxes_teach_the_image_tokens(
    build_tiny: BuildModel, make_example: MakeExample, box_start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients at the language model's last states: those of image tokens are read by the map alone."""
    model = build_tiny(box_start=box_start)
    kept: list[Tensor] = []
    read = model.read_sequences

    def keep(inputs_SLD: Tensor, batch: Any) -> Tensor:
        kept.append(read(inputs_SLD, batch))
        kept[0].retain_grad()
        return kept[0]

    monkeypatch.setattr(model, "read_sequences", keep)
    batch = model.processor([make_example(QUESTIONS, answer=FORCED)])
    model(batch, masks="none").boxes_I4.square().sum().backward()
    gradient = kept[0].grad
    assert gradient is not None
    start, count = model.processor.image_start, model.processor.image_tokens
    assert bool(gradient[:, start : start + count].any()) == (box_start == "map")
    assert gradient[0, batch.candidates_IK.flatten()].any(dim=1).all()


def test_the_map_stays_exact_under_autocast(build_tiny: BuildModel, make_example: MakeExample) -> None:
    """Boxes are read off it: in 16 bit it would step by hundredths."""
    model = build_tiny(box_start="map")
    batch = model.processor([make_example(QUESTIONS, answer=FORCED)])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, masks="none")
    assert output.similarity_IT.dtype == output.boxes_I4.dtype == torch.float32
    assert not torch.equal(output.similarity_IT, output.similarity_IT.bfloat16().float())
