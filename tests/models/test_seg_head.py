"""SamHead against segment_anything's own forward, what is frozen, and which weights are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from segment_anything import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from torch import Tensor, nn

from medisee import MediSee
from medisee.config.load import config_from, load_config
from medisee.config.model import Lora, SegHeadConfig
from medisee.foundation.errors import InputError
from medisee.models.image_encoder import package_encoder
from medisee.models.processing import Example
from medisee.models.seg_head import Prompts, SamHead, sam_head, vit_sizes

SIZE = 64
BOXES = torch.tensor([[3.0, 5.0, 40.0, 60.0], [0.0, 0.0, 64.0, 64.0], [20.5, 10.25, 21.5, 33.0]])


def build(seed: int = 0, **changes: Any) -> SamHead:
    """A head whose normal layers, positions and biases are random too, so that nothing cancels out."""
    torch.manual_seed(seed)
    head = sam_head(SegHeadConfig(vit="micro", size=SIZE, **changes)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


@pytest.fixture(scope="module")
def head() -> SamHead:
    return build()


@pytest.fixture(scope="module")
def embedding() -> Tensor:
    return torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(1))


def own_masks(head: SamHead, embedding_1CGG: Tensor, text: Tensor | None = None, **geometry: Any) -> Tensor:
    """The package's own prompt encoder and mask decoder, for one image, with the text token joined by hand."""
    arguments = {"points": None, "boxes": None, "masks": None} | geometry
    sparse, dense = head.prompt_encoder(**arguments)
    if text is not None:
        dense = dense[:1].expand(len(text), -1, -1, -1)
        sparse = torch.cat([sparse, text[:, None]], dim=1) if sparse.shape[1] else text[:, None]
    masks, _ = head.mask_decoder(
        image_embeddings=embedding_1CGG,
        image_pe=head.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return masks[:, 0]


def words(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_boxes_equal_the_packages_own_forward(head: SamHead, embedding: Tensor) -> None:
    ours = head.decode(embedding[:1], Prompts(boxes=BOXES), torch.zeros(3, dtype=torch.long))
    assert ours.shape == (3, 16, 16)
    same(ours, own_masks(head, embedding[:1], boxes=BOXES))
    assert (ours[0] - ours[2]).abs().max() > 1e-3


@torch.no_grad()
def test_text_stands_behind_the_box_corners(head: SamHead, embedding: Tensor) -> None:
    text = words(3)
    ours = head.decode(embedding[:1], Prompts(text=text, boxes=BOXES), torch.zeros(3, dtype=torch.long))
    same(ours, own_masks(head, embedding[:1], text, boxes=BOXES))
    sparse = head._sparse(Prompts(text=text, boxes=BOXES))
    corners = head.prompt_encoder(points=None, boxes=BOXES, masks=None)[0]
    assert torch.equal(sparse, torch.cat([corners, text[:, None]], dim=1))


@torch.no_grad()
def test_text_alone_is_one_token(head: SamHead, embedding: Tensor) -> None:
    text = words(2)
    assert torch.equal(head._sparse(Prompts(text=text)), text[:, None])
    ours = head.decode(embedding[:1], Prompts(text=text), torch.zeros(2, dtype=torch.long))
    empty = {"boxes": None}
    same(ours, own_masks(head, embedding[:1], text, **empty))


def test_no_prompt_is_an_error(head: SamHead, embedding: Tensor) -> None:
    with pytest.raises(ValueError, match="at least one"):
        head.decode(embedding, Prompts(), torch.zeros(1, dtype=torch.long))


@torch.no_grad()
def test_batched_images_equal_each_alone(head: SamHead, embedding: Tensor) -> None:
    owner = torch.tensor([1, 0, 1])
    together = head.decode(embedding, Prompts(text=words(3), boxes=BOXES), owner)
    for target, image in enumerate(owner.tolist()):
        one = Prompts(text=words(3)[target : target + 1], boxes=BOXES[target : target + 1])
        alone = head.decode(embedding[image : image + 1], one, torch.zeros(1, dtype=torch.long))
        same(together[target], alone[0])
    swapped = head.decode(embedding, Prompts(text=words(3), boxes=BOXES), 1 - owner)
    assert (together - swapped).abs().max() > 1e-3


@torch.no_grad()
def test_encode_equals_the_packages_encoder(head: SamHead) -> None:
    pixels = torch.randn(2, 3, SIZE, SIZE)
    embedded = head.encode(pixels)
    assert embedded.shape == (2, head.spec.channels, head.spec.grid, head.spec.grid)
    theirs = package_encoder(vit_sizes(SegHeadConfig(vit="micro")), SIZE)
    theirs.load_state_dict(head.image_encoder.state_dict())
    same(embedded, theirs(pixels))


def test_only_the_mask_decoder_learns() -> None:
    head = build()
    learning = {name.split(".")[0] for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert learning == {"mask_decoder"}
    assert all(parameter.requires_grad for parameter in head.mask_decoder.parameters())
    assert not head.encode(torch.randn(1, 3, SIZE, SIZE, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("vit", "builder", "count"),
    [
        ("b", build_sam_vit_b, 93_735_472),
        ("l", build_sam_vit_l, 312_342_832),
        ("h", build_sam_vit_h, 641_090_608),
    ],
)
def test_full_sizes_are_those_of_the_package(vit: Any, builder: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        own, published = sam_head(SegHeadConfig(vit=vit)).state_dict(), builder()
    assert sum(parameter.numel() for parameter in published.parameters()) == count
    assert {name: value.shape for name, value in own.items()} == {
        name: value.shape for name, value in published.state_dict().items()
    }


def lora_head(seed: int = 0, **changes: Any) -> SamHead:
    """A head whose adapters are far from their start, where they change nothing."""
    head = build(seed, lora=Lora(rank=2, dropout=0.5), **changes)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return head


def test_lora_is_all_that_learns_in_the_encoder() -> None:
    head = lora_head()
    learning = [name for name, parameter in head.image_encoder.named_parameters() if parameter.requires_grad]
    assert learning == [f"blocks.{block}.attn.qkv.lora_{part}.default.weight" for block in (0, 1) for part in "AB"]
    assert head.encoder_learns
    assert not build().encoder_learns
    assert head.mask_decoder.iou_token.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in head.prompt_encoder.parameters())
    head.encode(torch.randn(2, 3, SIZE, SIZE)).square().mean().backward()
    for name, parameter in head.image_encoder.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == (name in learning), name
    with torch.no_grad():
        assert not head.encode(torch.randn(1, 3, SIZE, SIZE)).requires_grad


@torch.no_grad()
def test_lora_is_dropped_out_in_training_only() -> None:
    head, pixels = lora_head(), torch.randn(1, 3, SIZE, SIZE)
    assert torch.equal(head.encode(pixels), head.encode(pixels))
    assert not torch.equal(head.train().encode(pixels), head.encode(pixels))
    assert not any(module.training for module in head.prompt_encoder.modules())
    assert torch.equal(head.eval().encode(pixels), head.encode(pixels))


@torch.no_grad()
def test_lora_starts_at_the_published_encoder(tmp_path: Path) -> None:
    plain, pixels = build(seed=1), torch.randn(1, 3, SIZE, SIZE)
    torch.save(plain.state_dict(), tmp_path / "sam.pth")
    config = SegHeadConfig(vit="micro", size=SIZE, checkpoint=str(tmp_path / "sam.pth"), lora=Lora(rank=2))
    assert torch.equal(sam_head(config).eval().encode(pixels), plain.encode(pixels))


def test_a_checkpoint_holds_the_lora_and_no_published_weights(
    tmp_path: Path, build_tiny: Callable[..., MediSee], make_example: Callable[..., Example]
) -> None:
    torch.save(build(seed=1).state_dict(), tmp_path / "sam.pth")
    model = build_tiny(seg_head={"checkpoint": str(tmp_path / "sam.pth"), "lora": {"rank": 2}})
    model.save_pretrained(tmp_path / "checkpoint")
    with safe_open(str(tmp_path / "checkpoint" / "model.safetensors"), "pt") as file:
        saved = {name for name in file.keys() if name.startswith("seg_head.image_encoder.")}  # noqa: SIM118
    assert saved == {
        f"seg_head.image_encoder.blocks.{block}.attn.qkv.lora_{part}.default.weight"
        for block in (0, 1)
        for part in "AB"
    }
    loaded = MediSee.from_pretrained(tmp_path / "checkpoint")
    batch = model.processor([make_example(["Where?"], answer="It is [SEG] and [BBOX].")])
    with torch.inference_mode():
        ours, theirs = model(batch), loaded(batch)
        assert torch.equal(ours.masks_Jhh, theirs.masks_Jhh)
        assert torch.equal(ours.text_logits_NV, theirs.text_logits_NV)
        for name, value in loaded.seg_head.named_parameters():
            if "lora_B" in name:
                value.zero_()
        assert not torch.equal(loaded(batch).masks_Jhh, theirs.masks_Jhh)


def test_lora_learns_from_the_mask(build_tiny: Callable[..., MediSee], make_example: Callable[..., Example]) -> None:
    model = build_tiny(seg_head={"lora": {"rank": 2}})
    batch = model.processor([make_example(["Where?", "What?"], answer="It is [SEG] and [BBOX].")])
    masks = model(batch).masks_Jhh
    assert masks is not None
    masks.square().mean().backward()
    named = dict(model.seg_head.image_encoder.named_parameters())
    assert all(named[f"blocks.{block}.attn.qkv.lora_B.default.weight"].grad is not None for block in (0, 1))


def test_lora_is_not_for_every_head() -> None:
    with pytest.raises(InputError, match="lora needs kind sam, medsam or sam_med2d"):
        config_from({"model": {"seg_head": {"kind": "lite_medsam", "lora": {}}}}, where="test")


def test_the_lora_row_of_table_6() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "ablations" / "medsam_lora.yaml").model.seg_head
    assert config.lora is not None
    assert (config.kind, config.vit, config.size, config.lora.rank) == ("medsam", "b", 1024, 8)
    with torch.device("meta"):
        head = sam_head(config, weights=False)
    counted = sum(parameter.numel() for parameter in head.image_encoder.parameters() if parameter.requires_grad)
    assert counted == 12 * 8 * (768 + 3 * 768)


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    head = build()
    assert head.train() is head
    assert head.training
    assert head.mask_decoder.training
    for part in (head.image_encoder, head.prompt_encoder):
        assert not any(module.training for module in part.modules())
    head.eval()
    assert not head.mask_decoder.training


def test_gradients_flow_from_the_mask_to_box_and_text(head: SamHead, embedding: Tensor) -> None:
    boxes, text = BOXES.clone().requires_grad_(), words(3).requires_grad_()
    masks = head.decode(embedding[:1], Prompts(text=text, boxes=boxes), torch.zeros(3, dtype=torch.long))
    of_boxes, of_text = torch.autograd.grad(masks.square().mean(), (boxes, text))
    assert (of_boxes.abs().sum(1) > 0).all()
    assert (of_text.abs().sum(1) > 0).all()


def test_upscaling_has_the_packages_values_and_gradients(head: SamHead) -> None:
    layers = copy.deepcopy(head.mask_decoder.output_upscaling)
    source_IGGC, kernel_IU = torch.randn(3, 4, 4, 32, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    theirs = torch.einsum("ic,ichw->ihw", kernel_IU, layers(source_IGGC.permute(0, 3, 1, 2)))
    ours = head.upscale(source_IGGC, kernel_IU)
    assert ours.shape == (3, 16, 16)
    same(ours, theirs)
    weights = torch.randn_like(theirs)
    expected = torch.autograd.grad((weights * theirs).sum(), [source_IGGC, kernel_IU, *layers.parameters()])
    own = head.mask_decoder.output_upscaling.parameters()
    found = torch.autograd.grad((weights * ours).sum(), [source_IGGC, kernel_IU, *own])
    for gradient, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        assert scale > 0
        same(gradient / scale, other / scale)


@torch.no_grad()
def test_autocast_does_not_round_box_coordinates() -> None:
    """In bf16 a box at 900 of 1024 pixels would move in steps of 4 pixels."""
    head = sam_head(SegHeadConfig(vit="micro", size=1024))
    boxes = torch.tensor([[900.0, 700.0, 1000.0, 800.0], [900.5, 700.0, 1000.0, 800.0]])
    assert torch.equal(boxes[0].bfloat16(), boxes[1].bfloat16())
    exact = head._sparse(Prompts(boxes=boxes))
    assert (exact[0] - exact[1]).abs().max() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head._sparse(Prompts(boxes=boxes)), exact)


@torch.no_grad()
def test_decode_runs_in_bfloat16_with_a_float32_prompt(embedding: Tensor) -> None:
    """What DeepSpeed makes of the head: parameters in bf16, buffers (the coordinate code) in float32."""
    head = build()
    zero = torch.zeros(1, dtype=torch.long)
    exact = head.decode(embedding[:1], Prompts(text=words(1), boxes=BOXES[:1]), zero)
    with torch.autocast("cpu", torch.bfloat16):
        cast = head.decode(embedding[:1], Prompts(text=words(1), boxes=BOXES[:1]), zero)
        for parameter in head.parameters():
            parameter.data = parameter.data.bfloat16()
        halved = head.decode(embedding[:1], Prompts(text=words(1), boxes=BOXES[:1]), zero)
    for rounded in (cast, halved):
        assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_weights_round_trip(tmp_path: Path) -> None:
    source = build(seed=1)
    torch.save(source.state_dict(), tmp_path / "sam.pth")
    loaded = build(seed=2, checkpoint=str(tmp_path / "sam.pth"))
    fresh = sam_head(SegHeadConfig(vit="micro", size=SIZE, checkpoint=str(tmp_path / "sam.pth")))
    assert loaded.state_dict().keys() == fresh.state_dict().keys()
    for name, value in source.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    blank = sam_head(SegHeadConfig(vit="micro", size=SIZE, checkpoint=str(tmp_path / "absent.pth")), weights=False)
    assert blank.spec == fresh.spec


def problems(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        sam_head(SegHeadConfig(vit="micro", size=SIZE, checkpoint=str(path)))
    assert all(str(path) in problem for problem in caught.value.problems)
    return "\n".join(caught.value.problems)


def drop(state: dict[str, Tensor]) -> None:
    del state["mask_decoder.iou_token.weight"]


def add(state: dict[str, Tensor]) -> None:
    state["optimizer.extra"] = torch.zeros(1)


def reshape(state: dict[str, Tensor]) -> None:
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)


def all_three(state: dict[str, Tensor]) -> None:
    del state["mask_decoder.mask_tokens.weight"]
    add(state)
    reshape(state)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop, ["missing tensor mask_decoder.iou_token.weight"]),
        (add, ["left-over tensor optimizer.extra"]),
        (reshape, ["mask_decoder.iou_token.weight has shape (1, 7), expected (1, 32)"]),
        (
            all_three,
            ["missing tensor mask_decoder.mask_tokens", "left-over tensor optimizer.extra", "has shape (1, 7)"],
        ),
    ],
)
def test_weights_are_loaded_strictly(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], expected: list[str]
) -> None:
    state = dict(build().state_dict())
    change(state)
    torch.save(state, tmp_path / "sam.pth")
    text = problems(tmp_path / "sam.pth")
    for part in expected:
        assert part in text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such weights file" in problems(tmp_path / "absent.pth")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save(build().state_dict(), tmp_path / "sam.pth")
    whole = (tmp_path / "sam.pth").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        reason = "truncated or not a file of tensors" if length else "an empty file"
        assert f"cut.pth: {reason}" in problems(tmp_path / "cut.pth")


def test_what_is_not_a_state_is_refused(tmp_path: Path) -> None:
    torch.save({"models": [dict(build().state_dict())]}, tmp_path / "nested.pth")
    assert "expected names and tensors, found dict" in problems(tmp_path / "nested.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    assert "found Tensor" in problems(tmp_path / "tensor.pth")


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("writer", ["torch", "torch-legacy", "pickle"])
def test_a_pickle_with_code_executes_nothing(tmp_path: Path, writer: str) -> None:
    trace, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"mask_decoder.iou_token.weight": Malicious(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    pickle.loads(pickle.dumps(content))
    assert trace.exists()  # the file would have done harm
    trace.unlink()
    text = problems(path)
    assert "evil.pth: reading it needs getattr, which could run code" in text and "none of it was executed" in text
    assert not trace.exists()


@pytest.mark.parametrize("begin", ["", "module.", "sam_model.", "module._orig_mod.sam."])
@pytest.mark.parametrize("entry", [None, "model", "state_dict", "model_state_dict"])
def test_weights_may_be_a_part_of_a_training_checkpoint(tmp_path: Path, entry: str | None, begin: str) -> None:
    source = build(seed=1)
    optimizer = torch.optim.AdamW(source.mask_decoder.parameters())
    sum(value.sum() for value in source.mask_decoder.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = {name: value.clone() for name, value in source.state_dict().items()}
    named = {f"{begin}{name}": value for name, value in state.items()}
    rest = {"optimizer": optimizer.state_dict(), "epoch": 3, "scheduler": {}, "best_loss": torch.tensor(0.5)}
    torch.save({entry: named, **rest} if entry else named, tmp_path / "sam.pth")
    head = sam_head(SegHeadConfig(vit="micro", size=SIZE, checkpoint=str(tmp_path / "sam.pth")))
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())
