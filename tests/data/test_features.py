"""The feature cache: what the encoder computes, once, each encoder for itself, safe against interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from medisee.config.model import Lora, Model, SegHeadConfig
from medisee.data import features
from medisee.data.features import FeatureCache, encoder_key, fill_cache
from medisee.foundation.errors import InputError
from medisee.models.processing import MediSeeProcessor
from medisee.models.seg_head import SamHead, sam_head
from medisee.records.images import read_image
from medisee.weights.tokenizer import add_candidate_tokens, train_tokenizer


def head_of(seed: int = 0, **changes: Any) -> SamHead:
    torch.manual_seed(seed)
    head = sam_head(SegHeadConfig(vit="micro", size=64, resize="longest", **changes)).eval()
    with torch.no_grad():
        for parameter in head.image_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


@pytest.fixture
def head() -> SamHead:
    return head_of()


def processor_of(head: SamHead) -> MediSeeProcessor:
    config = Model.model_validate({"mllm": {"image_tokens": "seg_head", "image_grid": 2}})
    tokenizer = train_tokenizer(["Where?"], 300)
    add_candidate_tokens(tokenizer, config.candidate_tokens)
    return MediSeeProcessor(config, tokenizer, head.spec)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (30 + number, 50, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SHARD", 3)
    monkeypatch.setattr(features, "BATCH", 2)


def fill(images: list[Path], head: SamHead, folder: Path, dtype: torch.dtype = torch.float32) -> FeatureCache:
    return fill_cache(images, head, processor_of(head), folder, dtype)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def never(*_: object) -> None:
    raise AssertionError("the encoder ran")


def test_the_cache_returns_what_the_encoder_computes(images: list[Path], head: SamHead, tmp_path: Path) -> None:
    cache = fill(images, head, tmp_path / "cache")
    processor = processor_of(head)
    for image in images:
        expected = head.encode(processor.seg_pixels(read_image(image))[None])[0]
        stored = cache.read(image)
        assert image in cache
        assert stored.dtype == torch.float16
        assert stored.shape == (32, 4, 4)
        torch.testing.assert_close(stored.float(), expected, rtol=2e-3, atol=2e-3)
    assert not torch.equal(cache.read(images[0]), cache.read(images[1]))
    assert len(shards(tmp_path / "cache")) == 3


def test_a_second_fill_computes_nothing(
    images: list[Path],
    head: SamHead,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = fill(images, head, tmp_path / "cache")
    capsys.readouterr()
    monkeypatch.setattr(type(head.image_encoder), "forward", never)
    second = fill(images, head, tmp_path / "cache")
    assert capsys.readouterr().out == ""
    assert all(torch.equal(first.read(image), second.read(image)) for image in images)
    with pytest.raises(AssertionError, match="the encoder ran"):
        fill(images, head_of(seed=1), tmp_path / "cache")


def test_only_new_images_are_computed(
    images: list[Path], head: SamHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(images[:4], head, tmp_path / "cache")
    seen = []
    own = type(head.image_encoder).forward

    def counted(encoder: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return own(encoder, pixels)  # type: ignore[arg-type]

    monkeypatch.setattr(type(head.image_encoder), "forward", counted)
    cache = fill([*images, *images], head, tmp_path / "cache")
    assert sum(seen) == 3
    assert all(image in cache for image in images)


def test_the_size_is_said_beforehand(
    images: list[Path], head: SamHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(images, head, tmp_path / "cache")
    said = capsys.readouterr().out
    assert "7 images" in said
    assert str(tmp_path / "cache") in said


def test_images_go_by_their_content(images: list[Path], head: SamHead, tmp_path: Path) -> None:
    cache = fill(images[:1], head, tmp_path / "cache")
    copy = tmp_path / "elsewhere.png"
    copy.write_bytes(images[0].read_bytes())
    assert copy in FeatureCache(cache.folder)
    Image.new("RGB", (9, 9)).save(images[0])
    assert images[0] not in FeatureCache(cache.folder)


def test_another_encoder_has_another_folder(images: list[Path], head: SamHead, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    heads = [head, head_of(seed=1), head_of(pixels="sam")]
    caches = [fill(images[:1], one, folder) for one in heads]
    caches.append(fill(images[:1], head, folder, torch.bfloat16))
    assert len({cache.folder for cache in caches}) == 4
    assert not torch.equal(caches[0].read(images[0]), caches[1].read(images[0]))
    assert not torch.equal(caches[0].read(images[0]), caches[2].read(images[0]))
    assert fill(images[:1], head, folder).folder == caches[0].folder


def test_the_key_goes_by_every_weight_and_the_input_rule(head: SamHead) -> None:
    keys = {encoder_key(head), encoder_key(head_of(pixels="sam"))}
    decoder_changed = head_of()
    with torch.no_grad():
        decoder_changed.mask_decoder.mask_tokens.weight.add_(1)
    assert encoder_key(decoder_changed) in keys
    with torch.no_grad():
        next(iter(head.image_encoder.parameters())).flatten()[0].add_(1e-3)
    keys.add(encoder_key(head))
    assert len(keys) == 3


def test_an_encoder_that_learns_is_refused(images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.cache = .*needs a frozen encoder, but model\.seg_head\.lora"):
        fill(images, head_of(lora=Lora(rank=2)), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_interruption_keeps_complete_shards(
    images: list[Path], head: SamHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    own, calls = type(head.image_encoder).forward, []

    def interrupted(encoder: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if sum(calls) > 3:
            raise KeyboardInterrupt
        return own(encoder, pixels)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(head.image_encoder), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill(images, head, folder)
    (shard,) = shards(folder)
    kept = FeatureCache(shard.parent)
    assert [image in kept for image in images] == [True] * 3 + [False] * 4
    assert [path.name for path in shard.parent.iterdir()] == [shard.name]
    cache = fill(images, head, folder)
    assert len(shards(folder)) == 3
    assert all(image in cache for image in images)


def test_an_interruption_while_writing_leaves_no_half_shard(
    images: list[Path], head: SamHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_written(_: object, path: str, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "save_file", half_written)
        with pytest.raises(KeyboardInterrupt):
            fill(images, head, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert all(image in fill(images, head, tmp_path / "cache") for image in images)


def test_a_lost_shard_is_computed_again(images: list[Path], head: SamHead, tmp_path: Path) -> None:
    before = fill(images, head, tmp_path / "cache")
    expected = [before.read(image) for image in images]
    shards(tmp_path / "cache")[0].unlink()
    after = fill(images, head, tmp_path / "cache")
    for image, value in zip(images, expected, strict=True):
        torch.testing.assert_close(after.read(image), value)


def test_a_damaged_shard_is_computed_again(images: list[Path], head: SamHead, tmp_path: Path) -> None:
    expected = fill(images, head, tmp_path / "cache").read(images[0]).clone()
    for shard in shards(tmp_path / "cache"):
        shard.write_bytes(shard.read_bytes()[:100])
    assert torch.equal(fill(images, head, tmp_path / "cache").read(images[0]), expected)


def without_metadata(cache: FeatureCache) -> None:
    """Writes a cache in its old form: shards that do not name their images, and one index, which is not read."""
    for shard in cache.folder.glob("*.safetensors"):
        features = {name: value.clone() for name, value in load_file(shard).items()}
        shard.unlink()
        save_file(features, shard)
    (cache.folder / "index.json").write_text(json.dumps(cache._rows))


def test_an_old_cache_is_made_again(images: list[Path], head: SamHead, tmp_path: Path) -> None:
    cache = fill(images[:5], head, tmp_path / "cache")
    expected = [cache.read(image) for image in images[:5]]
    without_metadata(cache)
    assert not any(image in FeatureCache(cache.folder) for image in images)
    for new in (fill(images, head, tmp_path / "cache"), FeatureCache(cache.folder)):
        assert all(torch.equal(new.read(image), one) for image, one in zip(images[:5], expected, strict=True))
        assert all(image in new for image in images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_weights_do_not_change(
    images: list[Path], head: SamHead, tmp_path: Path, dtype: torch.dtype
) -> None:
    before = {name: value.clone() for name, value in head.state_dict().items()}
    cache = fill(images[:2], head, tmp_path / "cache", dtype)
    for name, value in head.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in head.image_encoder.parameters())
    expected = head.encode(processor_of(head).seg_pixels(read_image(images[0]))[None])[0]
    tolerance = 2e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(cache.read(images[0]).float(), expected, rtol=tolerance, atol=tolerance)
