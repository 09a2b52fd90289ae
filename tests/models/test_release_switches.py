"""Every switch of `compat: release`, both ways: what the release computes, and what it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medisee.config.load import config_from, dump_config, load_config
from medisee.config.model import Model
from medisee.config.run import RELEASE, Config, Loss
from medisee.data.dataset import MicroBatchReader
from medisee.foundation.errors import InputError
from medisee.models.losses import end_to_end_loss, giou_loss, giou_loss_of_release
from medisee.models.medisee import Generated, MediSee
from medisee.models.processing import CLIP_MEAN, CLIP_STD, Example, Query
from medisee.train import train
from medisee.weights.tokenizer import IMAGE_TOKEN, add_candidate_tokens, train_tokenizer

ANSWER = "It is [SEG] and [BBOX]."
MODEL: dict[str, Any] = {
    "mllm": {
        "size": {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 48},
        "vision_hidden": 32,
        "vision_layers": 2,
        "vision_heads": 2,
        "vision_size": 28,
    },
    "seg_head": {"vit": "micro", "size": 64, "resize": "longest"},
    "router_hidden": 16,
    "box_hidden": 16,
}


def tiny(**changes: Any) -> MediSee:
    config = config_from({"model": {**MODEL, **changes}}, where="test").model
    tokenizer = train_tokenizer(["[INST] Where is it? [/INST]", ANSWER], 300)
    add_candidate_tokens(tokenizer, config.candidate_tokens)
    torch.manual_seed(0)
    return MediSee(config, tokenizer).eval()


def example(*boxes: tuple[int, int, int, int], height: int = 40, width: int = 80) -> Example:
    """Makes a black image with a white rectangle, and with one target, for each box in its pixels."""
    image, queries = np.zeros((height, width, 3), dtype=np.uint8), []
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        mask = np.zeros((height, width), dtype=bool)
        mask[y0:y1, x0:x1] = True
        image[mask] = 255
        queries.append(Query(record="r", target=str(number), question="Where is it?", answer=ANSWER, mask=mask))
    return Example(image, height, width, tuple(queries))


QUESTION = Query(record="r", target="0", question="Where is it?")


class Says(nn.Module):
    """A box decoder that says given boxes, (cx, cy, w, h), and learns them."""

    def __init__(self, *boxes: tuple[float, ...]) -> None:
        super().__init__()
        self.boxes_I4 = nn.Parameter(torch.tensor(boxes))

    def forward(self, _: Tensor, start_I4: Tensor | None = None) -> Tensor:
        return self.boxes_I4


def box_prompts(model: MediSee, given: Example, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Returns the box that the mask decoder is prompted with when the model predicts the true one."""
    seen: list[Tensor] = []
    decode = model.seg_head.decode
    monkeypatch.setattr(model.seg_head, "decode", lambda e, p, i: (seen.append(p.boxes), decode(e, p, i))[1])
    batch = model.processor([given])
    assert batch.boxes_I4 is not None
    x0, y0, x1, y1 = batch.boxes_I4[0].tolist()
    model.box_decoder = Says(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))  # type: ignore[assignment]
    model(batch)
    return seen[0][0].detach()


def edges(pixels: Tensor) -> list[float]:
    """Returns (x0, y0, x1, y1) of what is brighter than halfway between an image's darkest and brightest pixel."""
    bright = pixels > (pixels.min() + pixels.max()) / 2
    rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    return [float(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


@pytest.mark.parametrize(("height", "width"), [(40, 80), (80, 40)])
def test_the_box_prompt_lands_on_the_object(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the object is, is seen in the seg head's own input."""
    given = example((width // 2, height // 2, width - 4, height - 8), height=height, width=width)
    model = tiny()
    assert given.image is not None
    seen = edges(model.processor.seg_pixels(given.image)[0])
    assert box_prompts(model, given, monkeypatch).tolist() == pytest.approx(seen, abs=1)
    theirs = box_prompts(tiny(box_frame="frame"), given, monkeypatch)
    apart = (theirs - torch.tensor(seen)).abs()
    shorter = 1 if height < width else 0
    assert apart[[1 - shorter, 3 - shorter]].max() <= 1
    assert apart[[shorter, shorter + 2]].min() >= 12


def test_a_square_image_needs_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = example((10, 20, 30, 40), height=64, width=64)
    ours, theirs = (box_prompts(tiny(box_frame=frame), given, monkeypatch) for frame in ("resized", "frame"))
    assert torch.equal(ours, theirs)


def test_bfloat16_moves_the_box_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    given = example((201, 101, 333, 307), height=399, width=401)
    exact = box_prompts(tiny(), given, monkeypatch)
    rounded = box_prompts(tiny(box_dtype="bfloat16"), given, monkeypatch)
    assert rounded.dtype == torch.bfloat16
    assert 0.02 < (rounded.float() - exact).abs().max() < 0.5
    assert torch.tensor(0.7).bfloat16() * 1024 % 4 == 0


def positions(model: MediSee, given: Example, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Returns what the position code of the box's corners is computed from, (2, 2), in shares of the frame."""
    seen: list[Tensor] = []
    layer = model.seg_head.prompt_encoder.pe_layer
    encode = layer._pe_encoding
    monkeypatch.setattr(layer, "_pe_encoding", lambda coords: (seen.append(coords), encode(coords))[1])
    # Features instead of the image: its encoder says nothing about boxes.
    spec = model.seg_head.spec
    features = torch.zeros(spec.channels, spec.grid, spec.grid)
    monkeypatch.setattr(model, "embed_images", lambda batch: features[None])
    box_prompts(model, given, monkeypatch)
    (corners,) = (coords for coords in seen if coords.shape == (1, 2, 2))
    return corners[0].detach()


@pytest.mark.parametrize("side", [192, 1024])
@pytest.mark.parametrize("frame", ["frame", "resized"])
def test_a_bfloat16_box_is_rounded_as_the_release_rounds_it(
    side: int, frame: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Centre and size in pixels of the frame, the corners, half a pixel more, and their share of the frame."""
    head = {"vit": "micro", "size": side, "resize": "longest"}
    model, precise = (tiny(box_dtype=dtype, box_frame=frame, seg_head=head) for dtype in ("bfloat16", "float32"))
    sides = (side, side if frame == "frame" else model.processor.frame(399, 401).resized_height)
    for box in ((201, 101, 333, 307), (7, 3, 398, 396), (390, 11, 400, 18)):
        given = example(box, height=399, width=401)
        truth = model.processor([given]).boxes_I4
        assert truth is not None
        x0, y0, x1, y1 = truth[0].tolist()
        rounded = []
        for low, high, scale in ((x0, x1, sides[0]), (y0, y1, sides[1])):
            centre = (torch.tensor((low + high) / 2, dtype=torch.float32) * scale).bfloat16()
            size = (torch.tensor(high - low, dtype=torch.float32) * scale).bfloat16()
            ends = (centre - size * 0.5, centre + size * 0.5)
            rounded.append([float(((end + 0.5) / side).bfloat16()) for end in ends])
        expected = torch.tensor(rounded).T
        assert torch.equal(positions(model, given, monkeypatch), expected)
        exact = positions(precise, given, monkeypatch)
        assert 0 < (exact - expected).abs().max() < 0.01


BANDS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def bands(length: int, across: int, *, upright: bool) -> np.ndarray:
    """Makes an image of three bands, one after the other along its length."""
    image = np.repeat(np.array(BANDS, dtype=np.uint8), length // 3, axis=0)[None].repeat(across, axis=0)
    return np.ascontiguousarray(image.transpose(1, 0, 2)) if upright else image


@pytest.mark.parametrize("upright", [False, True])
def test_the_centre_crop_does_not_see_the_ends(upright: bool) -> None:
    image = bands(84, 28, upright=upright)
    mllm = {**MODEL["mllm"], "vision_input": "centre_crop"}
    seen = {}
    for name, model in {"pad": tiny(), "centre_crop": tiny(mllm=mllm)}.items():
        pixels = model.processor.vision_pixels(image)
        assert pixels.shape == (3, 28, 28)
        shown = pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
        seen[name] = (shown > 0.9).flatten(1).sum(1).tolist()
    assert seen["centre_crop"] == [0, 28 * 28, 0]
    assert min(seen["pad"]) > 50
    assert seen["pad"][0] == seen["pad"][2]


@pytest.mark.parametrize(("height", "width"), [(61, 60), (60, 61), (33, 97), (97, 33), (28, 28), (7, 200)])
def test_the_centre_crop_is_the_resized_centre(height: int, width: int) -> None:
    """A linear ramp stays one: its middle is in the middle, and its slope is that of the shorter side."""
    ramp = np.linspace(0, 1, width)[None] * np.linspace(0, 1, height)[:, None] * 255
    image = np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=2)
    model = tiny(mllm={**MODEL["mllm"], "vision_input": "centre_crop"})
    pixels = model.processor.vision_pixels(image)[0] * CLIP_STD[0] + CLIP_MEAN[0]
    side = min(height, width)
    places = [(np.arange(28) + 0.5) * side / 28 + (length - side) / 2 - 0.5 for length in (height, width)]
    expected = np.outer(places[0] / (height - 1), places[1] / (width - 1))
    # Cutting in whole pixels of the resized image is off by half of one.
    assert np.abs(pixels.numpy() - expected)[1:-1, 1:-1].max() < 0.03


def test_coverage_lies_where_the_vision_tower_looks() -> None:
    ends = example((0, 0, 20, 40), (30, 10, 50, 30))
    rules = ("pad", "centre_crop")
    pad, crop = (tiny(mllm={**MODEL["mllm"], "vision_input": rule}).processor([ends]).coverage_IT for rule in rules)
    assert pad is not None and crop is not None
    assert pad[0].tolist() == pytest.approx([0.25, 0, 0.25, 0])
    assert crop[0].tolist() == [0, 0, 0, 0]
    assert pad[1].tolist() == pytest.approx([0.0625] * 4)
    assert crop[1].tolist() == pytest.approx([0.25] * 4)


class Given:
    """Training data of one example."""

    def __init__(self, config: Config, example: Example) -> None:
        self.config, self.example, self.skipped = config, example, []

    def __getitem__(self, _: object) -> Example:
        return self.example


@pytest.mark.parametrize(("compat", "last"), [("none", (60, 30)), ("release", (59, 29))])
def test_true_boxes_end_behind_or_at_the_last_pixel(compat: str, last: tuple[int, int]) -> None:
    data: Any = Given(load_config(None, [f"compat={compat}"]), example((20, 10, 60, 30)))
    batch = MicroBatchReader(data, tiny().processor)[[None]].batch  # type: ignore[list-item]
    assert batch is not None and batch.boxes_I4 is not None
    assert batch.boxes_I4.tolist() == [pytest.approx([20 / 80, 10 / 40, last[0] / 80, last[1] / 40])]


def predicted(*boxes: tuple[float, ...]) -> Tensor:
    return torch.tensor(boxes).requires_grad_()


BOXES = ((0.1, 0.1, 0.4, 0.5), (0.2, 0.2, 0.2, 0.6), (0.5, 0.1, 0.9, 0.3))
TRUTH = torch.tensor([[0.2, 0.2, 0.5, 0.5], [0.3, 0.3, 0.6, 0.7], [0.4, 0.2, 0.8, 0.4]])


def test_one_box_without_area_takes_its_images_gradient_in_the_release() -> None:
    """Targets 0 and 1 are of image 4, target 2 of image 7; box 1 has no width."""
    boxes, images = predicted(*BOXES), torch.tensor([4, 4, 7])
    loss = giou_loss_of_release(boxes, TRUTH, images)
    loss.sum().backward()
    assert boxes.grad is not None
    assert loss[:2].tolist() == [1, 1]
    assert boxes.grad[:2].abs().sum() == 0
    assert boxes.grad[2].abs().sum() > 0
    assert loss[2] == giou_loss(boxes, TRUTH)[2]
    ours = predicted(*BOXES)
    giou_loss(ours, TRUTH).sum().backward()
    assert ours.grad is not None and torch.isfinite(ours.grad).all()
    assert (ours.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("flat", [(0.3, 0.3, 0.3, 0.7), (0.3, 0.5, 0.6, 0.5), (0.6, 0.3, 0.3, 0.7)])
def test_a_true_box_without_area_does_the_same(flat: tuple[float, ...]) -> None:
    truth, images = TRUTH.clone(), torch.tensor([0, 1, 1])
    truth[0] = torch.tensor(flat)
    boxes = predicted(BOXES[0], BOXES[2], BOXES[2])
    loss = giou_loss_of_release(boxes, truth, images)
    loss.sum().backward()
    assert boxes.grad is not None
    assert loss[0] == 1
    assert (boxes.grad.abs().sum(1) > 0).tolist() == [False, True, True]


def test_without_such_a_box_both_are_equal() -> None:
    boxes = torch.tensor([BOXES[0], BOXES[2], BOXES[0]])
    images = torch.tensor([0, 0, 1])
    assert torch.equal(giou_loss_of_release(boxes, TRUTH, images), giou_loss(boxes, TRUTH))


@pytest.mark.parametrize("release", [False, True])
def test_the_whole_loss_follows_the_switch(release: bool) -> None:
    """A target one pixel wide has no area when its box is inclusive, and no GIoU gradient with the release's rule."""
    model = tiny()
    model.box_decoder = Says((0.3, 0.3, 0.2, 0.2), (0.6, 0.6, 0.2, 0.2))  # type: ignore[assignment]
    batch = model.processor([example((20, 10, 21, 30), (40, 10, 60, 30))], release=True)
    weights = Loss(text=0, bce=0, dice=0, l1=0)
    terms = end_to_end_loss(model(batch), batch, weights, release=release)
    assert torch.isfinite(terms.total)
    terms.total.backward()
    gradient = model.box_decoder.boxes_I4.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    assert bool((gradient.abs().sum(1) > 0).all()) != release
    assert (terms.giou.item() == pytest.approx(1)) == release


@pytest.mark.parametrize("compat", ["none", "release"])
def test_a_run_computes_the_loss_of_its_compat(
    compat: str, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def stop(*_: object, release: bool, **__: object) -> None:
        seen.append(release)
        raise RuntimeError("enough seen")

    monkeypatch.setattr("medisee.train.TrainingLoss", stop)
    data = {**tiny_config["data"], "select": "val"}
    values = {**tiny_config, "compat": compat, "data": data, "train": {**tiny_config["train"], "out": str(tmp_path)}}
    with pytest.raises(RuntimeError, match="enough seen"):
        train(config_from(values, where="test"))
    assert seen == [compat == "release"]


class Prefers(nn.Module):
    """An output layer that likes one token best and another second."""

    def __init__(self, vocabulary: int, best: int, second: int) -> None:
        super().__init__()
        self.logits = torch.zeros(vocabulary)
        self.logits[best], self.logits[second] = 9, 5

    def forward(self, states: Tensor) -> Tensor:
        return self.logits.expand(*states.shape[:-1], -1).clone()


def test_the_image_token_is_never_written() -> None:
    """The release has no row for it: it takes no share of the text loss, learns nothing and is not generated."""
    model = tiny()
    image = model.processor.image_id
    batch = model.processor([example((20, 10, 40, 30))])
    reference = end_to_end_loss(model(batch), batch, Loss())
    with torch.no_grad():
        model.mllm.lm_head.weight[image] = 50
    output = model(batch)
    assert (output.text_logits_NV[:, image] == float("-inf")).all()
    terms = end_to_end_loss(output, batch, Loss())
    assert torch.equal(terms.text, reference.text)
    terms.total.backward()
    gradient = model.mllm.lm_head.weight.grad
    assert gradient is not None and torch.isfinite(gradient).all()
    assert gradient[image].abs().sum() == 0 and gradient.abs().sum() > 0
    asked = replace(example((20, 10, 40, 30)).queries[0], answer=None, mask=None)
    given = replace(example((20, 10, 40, 30)), queries=(asked,))
    model.mllm.set_output_embeddings(Prefers(len(model.tokenizer), image, model.processor.candidate_ids[0]))
    written = model.generate(model.processor([given], packed=False), max_new_tokens=3)
    assert IMAGE_TOKEN not in written.texts[0]
    assert written.texts[0].replace(" ", "") == "[SEG]" * 3


def written(model: MediSee, *, release: bool = False) -> Generated:
    """Asks about two images of different sizes; the model writes both candidate tokens in turn."""
    asked = [replace(example((20, 10, 40, 30), height=height), queries=(QUESTION,)) for height in (40, 60)]
    model.mllm.set_output_embeddings(Alternates(model))
    return model.generate(model.processor(asked, packed=False), max_new_tokens=4, release=release)


class Alternates(nn.Module):
    """An output layer that writes the first candidate token, then the second, and so on."""

    def __init__(self, model: MediSee) -> None:
        super().__init__()
        self.ids, self.vocabulary, self.calls = model.processor.candidate_ids, len(model.tokenizer), 0

    def forward(self, states: Tensor) -> Tensor:
        logits = torch.zeros(*states.shape[:-1], self.vocabulary)
        logits[..., self.ids[self.calls % len(self.ids)]] = 9
        self.calls += 1
        return logits


def test_written_answers_are_decoded_as_trained_or_as_the_release_does() -> None:
    """The release decodes as a model with hard fusion and no box prompt; ours has the routers' states and both
    prompts."""
    torch.manual_seed(1)
    states = tiny().state_dict()
    nn.init.normal_(states["box_decoder.layers.4.weight"])
    shared = {name: value for name, value in states.items() if "router" not in name}
    results: dict[str, Generated] = {}
    cases: dict[str, dict[str, Any]] = {
        "ours": {},
        "release": {},
        "hard": {"fusion": "hard", "prompts": ["text"]},
        "hard with box": {"fusion": "hard"},
    }
    for name, changes in cases.items():
        model = tiny(**changes)
        model.load_state_dict(shared, strict=False)
        results[name] = written(model, release=name == "release")
        assert results[name].emitted == (True, True)
    assert torch.equal(results["release"].boxes_I4, results["hard"].boxes_I4)
    assert torch.equal(results["release"].masks_Jhh, results["hard"].masks_Jhh)
    assert not torch.equal(results["release"].boxes_I4, results["ours"].boxes_I4)
    assert not torch.equal(results["release"].masks_Jhh, results["hard with box"].masks_Jhh)


def test_the_releases_decoding_needs_the_text_prompt() -> None:
    with pytest.raises(InputError, match=r"compat release needs text in model.prompts"):
        config_from({"model": {"prompts": ["box"]}, "compat": "release"}, where="test")


def test_the_best_checkpoint_is_chosen_on_val_or_on_the_test_file() -> None:
    data = {"train": [{"records": "train.jsonl"}], "val": "val.jsonl", "test": "test.jsonl"}
    assert config_from({"data": data}, where="test").data.selection == "val.jsonl"
    assert config_from({"data": data, "compat": "release"}, where="test").data.selection == "test.jsonl"
    own = {**data, "select": "val"}
    assert config_from({"data": own, "compat": "release"}, where="test").data.selection == "val.jsonl"
    with pytest.raises(InputError, match=r"select test .* needs data.test, or set data.select=val"):
        config_from({"data": {"train": data["train"], "val": "val.jsonl"}, "compat": "release"}, where="test")


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def value_of(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_compat_sets_every_switch_and_nothing_else() -> None:
    ours, theirs = load_config(None), load_config(None, ["compat=release"])
    assert ours == Config() and ours.compat == "none"
    changed = {name for name, value in leaves(theirs.model_dump()).items() if value != value_of(ours, name)}
    assert changed == {*leaves(RELEASE), "compat"}
    for name, value in leaves(RELEASE).items():
        assert value_of(theirs, name) == value, name
        assert (
            value_of(load_config(None, [f"{name}={value!r}" if "{" in str(value) else f"{name}={value}"]), name)
            == value
        )


@pytest.mark.parametrize("name", leaves(RELEASE))
def test_a_single_setting_wins_over_compat(name: str, tmp_path: Path) -> None:
    """Whether a file, its base or the command line says it, and whatever was said first."""
    own = value_of(Config(), name)
    text = f"'{own}'" if isinstance(own, str) else own
    section, *parts = name.split(".")
    (tmp_path / "base.yaml").write_text("compat: release\n")
    nested = ": {".join(parts) + f": {text}" + "}" * (len(parts) - 1)
    (tmp_path / "run.yaml").write_text(f"base: base.yaml\n{section}: {{{nested}}}\n")
    for config in (
        load_config(tmp_path / "run.yaml"),
        load_config(tmp_path / "base.yaml", [f"{name}={text}"]),
        load_config(None, [f"{name}={text}", "compat=release"]),
    ):
        assert config.compat == "release"
        others = {other: value for other, value in leaves(RELEASE).items() if other != name}
        assert value_of(config, name) == own
        assert {other: value_of(config, other) for other in others} == others


def test_the_printed_run_is_the_same_run(tmp_path: Path) -> None:
    config = load_config(None, ["compat=release", "loss.box=1.5"])
    printed = dump_config(config)
    assert "compat: release" in printed and "box_frame: frame" in printed and "box: 1.5" in printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config(tmp_path / "printed.yaml") == config
    assert load_config(tmp_path / "printed.yaml", ["compat=none"]).model.box_frame == "frame"


def test_an_unknown_compat_is_refused() -> None:
    with pytest.raises(InputError, match="compat = 'lisa'"):
        load_config(None, ["compat=lisa"])


def test_a_checkpoint_keeps_the_switches(tmp_path: Path) -> None:
    model = tiny(box_frame="frame", box_dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved")
    config: Model = MediSee.from_pretrained(tmp_path / "saved").config
    assert (config.box_frame, config.box_dtype) == ("frame", "bfloat16")


MAKERS: dict[str, Callable[[], Any]] = {"model": Model, "loss": Loss}


@pytest.mark.parametrize("section", MAKERS)
def test_defaults_are_the_correct_behaviour(section: str) -> None:
    for name, value in leaves(RELEASE[section]).items():
        own: Any = MAKERS[section]()
        for part in name.split("."):
            own = getattr(own, part)
        assert own != value, name
