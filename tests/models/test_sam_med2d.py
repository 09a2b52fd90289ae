"""SAM-Med2D: its adapters against plain functions, its published names and file, its input rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor
from torch.nn import functional as F

from medisee.config.load import load_config
from medisee.config.model import SegHeadConfig
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.models.sam_med2d import AdaptedBlock, sam_med2d_head
from medisee.models.seg_head import Prompts, SamHead, sam_head

CONFIG = SegHeadConfig(kind="sam_med2d", vit="micro", size=64)
CONFIGS = Path(__file__).parents[2] / "configs"


def build(seed: int = 0, **changes: Any) -> SamHead:
    torch.manual_seed(seed)
    head = sam_med2d_head(CONFIG.model_copy(update=changes)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


def block_by_hand(state: dict[str, Tensor], block: AdaptedBlock, values: Tensor) -> Tensor:
    """The block as published, channels first where the adapter works, with functions only."""
    width, (height, across) = values.shape[-1:], values.shape[1:3]
    attended = F.layer_norm(values, width, state["norm1.weight"], state["norm1.bias"], 1e-6)
    if block.window_size:
        windows, padded = window_partition(attended, block.window_size)
        attended = window_unpartition(block.attn(windows), block.window_size, padded, (height, across))
    else:
        attended = block.attn(attended)
    values = values + attended
    normal = F.layer_norm(values, width, state["norm2.weight"], state["norm2.bias"], 1e-6)
    hidden = F.gelu(F.linear(normal, state["mlp.lin1.weight"], state["mlp.lin1.bias"]))
    through_mlp = F.linear(hidden, state["mlp.lin2.weight"], state["mlp.lin2.bias"])
    first = normal.permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(first, 1).flatten(1)
    squeezed = F.relu(F.linear(pooled, state["Adapter.channel.0.weight"]))
    gate = torch.sigmoid(F.linear(squeezed, state["Adapter.channel.2.weight"]))
    small = F.relu(F.conv2d(first * gate[..., None, None], state["Adapter.spatial.0.weight"], stride=2, padding=1))
    mixed = F.relu(F.conv_transpose2d(small, state["Adapter.spatial.2.weight"], stride=2, padding=1))
    joined = (first + mixed).permute(0, 2, 3, 1)
    adapted = F.layer_norm(joined, width, state["Adapter.norm.weight"], state["Adapter.norm.bias"], 1e-5)
    return values + through_mlp + adapted


@torch.no_grad()
def test_blocks_equal_the_published_order_of_operations() -> None:
    values = torch.randn(2, 4, 4, 32)
    blocks = build().image_encoder.get_submodule("blocks")
    outputs = []
    for block in blocks.children():
        assert isinstance(block, AdaptedBlock)
        outputs.append(block(values))
        torch.testing.assert_close(outputs[-1], block_by_hand(block.state_dict(), block, values), rtol=1e-5, atol=1e-5)
    assert {block.window_size for block in blocks.children()} == {0, 14}
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_head_decodes_from_its_embedding() -> None:
    head = build()
    embedding = head.encode(torch.randn(2, 3, 64, 64))
    assert embedding.shape == (2, 32, 4, 4)
    boxes = torch.tensor([[3.0, 5.0, 40.0, 60.0], [10.0, 0.0, 64.0, 64.0]])
    masks = head.decode(embedding, Prompts(boxes=boxes), torch.tensor([0, 1]))
    assert masks.shape == (2, 16, 16)
    assert {name.split(".")[0] for name, p in head.named_parameters() if p.requires_grad} == {"mask_decoder"}


def test_the_published_names_and_sizes() -> None:
    with torch.device("meta"):
        state = sam_med2d_head(SegHeadConfig(kind="sam_med2d")).state_dict()
        plain = sam_head(SegHeadConfig(size=256)).state_dict()
    adapters = {name: tuple(value.shape) for name, value in state.items() if ".Adapter." in name}
    assert {name: tuple(value.shape) for name, value in state.items() if name not in adapters} == {
        name: tuple(value.shape) for name, value in plain.items()
    }
    assert adapters == {
        f"image_encoder.blocks.{block}.Adapter.{name}": shape
        for block in range(12)
        for name, shape in {
            "norm.weight": (768,),
            "norm.bias": (768,),
            "channel.0.weight": (192, 768),
            "channel.2.weight": (768, 192),
            "spatial.0.weight": (768, 768, 3, 3),
            "spatial.2.weight": (768, 768, 4, 4),
        }.items()
    }
    assert state["image_encoder.pos_embed"].shape == (1, 16, 16, 768)


def published(head: SamHead, form: str) -> Any:
    state = dict(head.state_dict())
    if form == "flat":
        return state
    if form == "model":
        return {"model": state}
    parameters = [torch.nn.Parameter(value) for value in state.values()]
    optimizer = (torch.optim.AdamW if form == "adamw" else torch.optim.Adam)(parameters, lr=1e-4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # moments are in the published file as well
    return {"model": state, "optimizer": optimizer}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", ["flat", "model", "adam", "adamw"])
def test_the_published_file_is_loaded_strictly(tmp_path: Path, form: str, zipped: bool) -> None:
    source, path = build(seed=1), tmp_path / "sam-med2d_b.pth"
    torch.save(published(source, form), path, _use_new_zipfile_serialization=zipped)
    loaded = sam_med2d_head(CONFIG.model_copy(update={"checkpoint": str(path)}))
    expected = source.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(InputError, match=r"missing tensor|left-over tensor|reading it needs torch\.optim"):
        sam_head(SegHeadConfig(vit="micro", size=64, checkpoint=str(path)))


def test_a_plain_sam_is_refused(tmp_path: Path) -> None:
    torch.save(sam_head(SegHeadConfig(vit="micro", size=64)).state_dict(), tmp_path / "sam.pth")
    with pytest.raises(InputError, match=r"sam\.pth: missing tensor image_encoder\.blocks\.0\.Adapter\."):
        build(checkpoint=str(tmp_path / "sam.pth"))


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_beside_the_model_executes_nothing(tmp_path: Path, zipped: bool) -> None:
    content = {"model": build().state_dict(), "optimizer": Malicious(tmp_path / "executed")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"evil\.pth: reading it needs getattr.*none of it was executed"):
        build(checkpoint=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "executed").exists()


def test_its_input_rule() -> None:
    head = sam_med2d_head(SegHeadConfig.model_validate({"kind": "sam_med2d", "vit": "micro"}))
    assert (head.spec.size, head.spec.resize, head.spec.pixels, head.spec.grid) == (256, "stretch", "sam", 16)
    own = SegHeadConfig.model_validate({"kind": "sam_med2d", "size": 512, "pixels": "minmax"})
    assert (own.size, own.resize, own.pixels) == (512, "stretch", "minmax")
    lite = SegHeadConfig.model_validate({"kind": "lite_medsam"})
    assert (lite.size, lite.resize, lite.pixels) == (256, "longest", "minmax")
    for kind, rule in {"medsam": (1024, "stretch", "minmax"), "sam": (1024, "longest", "sam")}.items():
        plain = SegHeadConfig.model_validate({"kind": kind})
        assert (plain.size, plain.resize, plain.pixels) == rule
    assert SegHeadConfig() == SegHeadConfig.model_validate({"kind": "medsam"})


def test_the_model_builds_the_head_of_its_kind(build_tiny: Callable[..., MediSee]) -> None:
    adapted = [build_tiny(seg_head={"kind": kind}).seg_head.image_encoder for kind in ("sam_med2d", "sam", "medsam")]
    assert [any(isinstance(part, AdaptedBlock) for part in one.modules()) for one in adapted] == [True, False, False]


def test_its_row_of_table_6() -> None:
    config = load_config(CONFIGS / "ablations" / "sam_med2d.yaml").model.seg_head
    assert (config.kind, config.size, config.resize, config.pixels) == ("sam_med2d", 256, "stretch", "sam")
    with torch.device("meta"):
        assert sam_med2d_head(config, weights=False).spec.grid == 16
