"""SAM's weights in transformers' format: the same numbers both ways, folders, hub ids, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SamConfig, SamModel

from medisee.config.model import Model, SamSizes, SegHeadConfig
from medisee.foundation.errors import InputError
from medisee.models.seg_head import Prompts, SamHead, sam_head
from medisee.weights import sam_format
from medisee.weights.checkpoints import frozen_bases
from medisee.weights.sam_format import (
    POSITIONS,
    SHARED_POSITIONS,
    TIED_POSITIONS,
    is_transformers,
    to_transformers,
    transformers_name,
    weights_file,
)

SIZES = SamSizes(
    width=32,
    depth=3,
    heads=2,
    global_attention=(1,),
    window=3,
    channels=32,
    decoder_heads=2,
    decoder_mlp=48,
    iou_hidden=24,
)
HEAD = SegHeadConfig(sizes=SIZES, size=64)
THEIRS = {
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "global_attn_indexes": [1],
        "window_size": 3,
        "image_size": 64,
        "output_channels": 32,
        "num_pos_feats": 16,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64},
    "mask_decoder_config": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "mlp_dim": 48,
        "iou_head_hidden_dim": 24,
    },
}
PUBLISHED = {
    "b": ({}, 93_735_472),
    "l": (
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "global_attn_indexes": [5, 11, 17, 23],
        },
        312_342_832,
    ),
    "h": (
        {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "global_attn_indexes": [7, 15, 23, 31],
        },
        641_090_608,
    ),
}


@pytest.fixture(scope="module")
def theirs() -> SamModel:
    torch.manual_seed(0)
    model = SamModel(SamConfig(**THEIRS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(theirs: SamModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam") / "sam-vit-tiny"
    theirs.save_pretrained(folder)
    return folder


def load(source: Path | str) -> SamHead:
    return sam_head(HEAD.model_copy(update={"checkpoint": str(source)})).eval()


@torch.no_grad()
def test_embedding_and_masks_are_those_of_transformers(theirs: SamModel, folder: Path) -> None:
    head = load(folder)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[[3.0, 5.0, 40.0, 60.0]], [[10.0, 0.0, 64.0, 33.0]]])
    expected: Any = theirs(pixel_values=pixels, input_boxes=boxes, multimask_output=False)
    embedding = head.encode(pixels)
    torch.testing.assert_close(embedding, theirs.get_image_embeddings(pixels), rtol=1e-4, atol=1e-4)
    masks = head.decode(embedding, Prompts(boxes=boxes[:, 0]), torch.tensor([0, 1]))
    torch.testing.assert_close(masks, expected.pred_masks[:, 0, 0], rtol=1e-4, atol=1e-4)
    assert masks.std() > 0.01


@torch.no_grad()
def test_back_again_is_equal_to_the_last_bit(theirs: SamModel, folder: Path) -> None:
    back, expected = to_transformers(load(folder).state_dict()), theirs.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in back.items())
    fresh = SamModel(SamConfig(**THEIRS))
    fresh.load_state_dict(back)
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("vit", ["b", "l", "h"])
def test_names_and_shapes_at_full_size(vit: Any) -> None:
    changes, count = PUBLISHED[vit]
    with torch.device("meta"):
        head = sam_head(SegHeadConfig(vit=vit))
        theirs = SamModel(SamConfig(vision_config=changes))
    back, expected = to_transformers(head.state_dict()), theirs.state_dict()
    assert {name: value.shape for name, value in back.items()} == {n: value.shape for n, value in expected.items()}
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_every_name_has_its_own() -> None:
    names = list(load_blank().state_dict())
    renamed = [transformers_name(name) for name in names]
    assert len(set(renamed)) == len(names)
    assert transformers_name(POSITIONS) == SHARED_POSITIONS
    assert is_transformers(dict.fromkeys(renamed))
    assert not is_transformers(dict.fromkeys(names))


def load_blank() -> SamHead:
    with torch.device("meta"):
        return sam_head(HEAD)


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[transformers_name(name)] for name in load_blank().state_dict()}


@pytest.mark.parametrize("form", ["folder with .bin", "file", "file of .pth", "own names", "tied too", "only tied"])
def test_other_places_of_the_same_weights(folder: Path, tmp_path: Path, form: str) -> None:
    state, path = load_file(folder / "model.safetensors"), tmp_path / "sam.safetensors"
    if form == "folder with .bin":
        path = tmp_path / "folder"
        path.mkdir()
        (path / "config.json").write_bytes((folder / "config.json").read_bytes())
        torch.save(state, path / "pytorch_model.bin")
    elif form == "file of .pth":
        path = path.with_suffix(".pth")
        torch.save(state, path)
    elif form == "own names":
        save_file(own_names(state), path)
    elif form == "tied too":
        save_file({**state, TIED_POSITIONS: state[SHARED_POSITIONS].clone()}, path)
    elif form == "only tied":
        save_file(
            {**{n: v for n, v in state.items() if n != SHARED_POSITIONS}, TIED_POSITIONS: state[SHARED_POSITIONS]}, path
        )
    else:
        save_file(state, path)
    expected = load(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load(path).state_dict().items())


def problems(source: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        load(source)
    return "\n".join(caught.value.problems)


def rename(state: dict[str, Tensor]) -> None:
    state["vision_encoder.layers.0.attention.qkv.weight"] = state.pop("vision_encoder.layers.0.attn.qkv.weight")


def reshape(state: dict[str, Tensor]) -> None:
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)


def untie(state: dict[str, Tensor]) -> None:
    state[TIED_POSITIONS] = state[SHARED_POSITIONS] + 1


def drop_positions(state: dict[str, Tensor]) -> None:
    del state[SHARED_POSITIONS]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            rename,
            [
                "missing tensor vision_encoder.layers.0.attn.qkv.weight",
                "left-over tensor vision_encoder.layers.0.attention.qkv.weight",
            ],
        ),
        (reshape, ["mask_decoder.iou_token.weight has shape (1, 7), expected (1, 32)"]),
        (untie, [f"{SHARED_POSITIONS} and {TIED_POSITIONS} differ"]),
        (drop_positions, [f"missing tensor {SHARED_POSITIONS}"]),
        (dict.clear, ["holds 0 tensors, too few for 3 blocks"]),
    ],
)
def test_problems_are_named_as_in_the_file(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], expected: list[str]
) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "sam.safetensors")
    text = problems(tmp_path / "sam.safetensors")
    for part in expected:
        assert f"{tmp_path / 'sam.safetensors'}: {part}" in text
    assert len(text.splitlines()) <= 9


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"config.json": None}, "config.json: missing; give the folder of a transformers SAM"),
        ({"config.json": "{"}, "config.json: not JSON"),
        ({"config.json": '{"model_type": "sam2"}'}, "config.json: model_type = 'sam2', expected 'sam'"),
        ({"config.json": "[1]"}, "config.json: holds no JSON object"),
        ({"model.safetensors": None}, "neither model.safetensors nor pytorch_model.bin is there"),
        ({"model.safetensors": "cos\nsystem\n"}, "model.safetensors: truncated or not a safetensors file"),
    ],
)
def test_a_damaged_folder_is_named(folder: Path, tmp_path: Path, change: dict[str, str | None], expected: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, text in change.items():
        (tmp_path / name).unlink()
        if text is not None:
            (tmp_path / name).write_text(text)
    assert expected in problems(tmp_path)


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        reason = "truncated or not a safetensors file" if length else "an empty file"
        assert f"cut.safetensors: {reason}" in problems(tmp_path / "cut.safetensors")


def test_a_hub_id_is_fetched_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def fetch(hub_id: str) -> Path:
        requested.append(hub_id)
        return folder

    sam_format._fetched.cache_clear()
    monkeypatch.setattr(sam_format, "fetch", fetch)
    expected = load(folder).state_dict()
    head = load("facebook/sam-vit-tiny")
    assert all(torch.equal(value, expected[name]) for name, value in head.state_dict().items())
    config = Model.model_validate({"seg_head": {"checkpoint": "facebook/sam-vit-tiny"}})
    (base,) = frozen_bases(config)
    (same,) = frozen_bases(Model.model_validate({"seg_head": {"checkpoint": str(folder)}}))
    assert (base.source, base.sha256) == ("facebook/sam-vit-tiny", same.sha256)
    assert base.sha256
    assert requested == ["facebook/sam-vit-tiny"]
    assert weights_file("weights/medsam_vit_b.pth") == Path("weights/medsam_vit_b.pth")  # a file, though absent
    assert requested == ["facebook/sam-vit-tiny"]
    sam_format._fetched.cache_clear()


def test_a_hub_out_of_reach_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(hub_id: str) -> None:
        raise InputError(f"{hub_id}: cannot be fetched: no network.")

    sam_format._fetched.cache_clear()
    monkeypatch.setattr(sam_format, "fetch", fail)
    text = problems("facebook/sam-vit-tiny")
    assert "'facebook/sam-vit-tiny': no such file or folder here, and not on the hub:" in text
    assert "no network" in text
    assert "no such weights file" in problems("not an id")


def test_a_folder_says_what_it_is(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["model_type"] == "sam"
    assert TIED_POSITIONS not in load_file(folder / "model.safetensors")  # transformers drops one of the two copies
