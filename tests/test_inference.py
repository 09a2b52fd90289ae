"""Asking a model: answers, files and messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from medisee import MediSee, ask, ask_all, inference, overlay
from medisee.foundation.errors import InputError, exit_code
from medisee.inference import main, plain_text
from medisee.records.masks import Rle, decode_mask
from medisee.weights import checkpoints, hub

Capture = pytest.CaptureFixture[str]
Say = Callable[..., None]
ANSWER = "It is [SEG] and [BBOX]. This is the liver."
NOTHING = "The liver is a large organ."


class Scripted(nn.Module):
    """An output layer that makes every generation write given texts, one a query."""

    def __init__(self, model: MediSee, texts: Sequence[str]) -> None:
        super().__init__()
        tokenizer = model.tokenizer
        scripts = [tokenizer(f" {text}", add_special_tokens=False).input_ids for text in texts]
        self.length = max(map(len, scripts)) + 1
        self.ids = torch.tensor([s + [tokenizer.eos_token_id] * (self.length - len(s)) for s in scripts])
        self.vocabulary, self.step = len(tokenizer), 0

    def forward(self, states_SLD: Tensor) -> Tensor:
        wanted_S = self.ids[:, self.step % self.length].expand(len(states_SLD))
        self.step += 1
        return nn.functional.one_hot(wanted_S[:, None], self.vocabulary).float()


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> MediSee:
    return MediSee.from_pretrained(tiny_checkpoint)


@pytest.fixture
def say(model: MediSee, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Scripts the model's answers, also where a command or `from_pretrained` loads it."""

    def script(*texts: str) -> None:
        monkeypatch.setitem(model.mllm._modules, "lm_head", Scripted(model, texts))
        monkeypatch.setattr(MediSee, "from_pretrained", lambda *_, **__: model)
        monkeypatch.setattr(checkpoints, "load_checkpoint", lambda *_, **__: model)

    return script


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """Non-square images of all kinds, (height, width) = (40, 64)."""
    ramp = np.add.outer(np.arange(40), np.arange(64))
    colour = np.stack([ramp, 2 * ramp, 255 - ramp], axis=2).astype(np.uint8)
    alpha = np.dstack([colour, np.where(ramp < 50, 0, 255)]).astype(np.uint8)
    pictures = {
        "deep.tiff": Image.fromarray((ramp * 600).astype(np.uint16)),
        "colour.jpg": Image.fromarray(colour),
        "clear.png": Image.fromarray(alpha, "RGBA"),
        "grey.png": Image.fromarray(ramp.astype(np.uint8)),
    }
    (tmp_path / "in").mkdir()
    for name, picture in pictures.items():
        picture.save(tmp_path / "in" / name)
    return {Path(name).stem: tmp_path / "in" / name for name in pictures}


def read(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns mask.png and prediction.json of a folder, and sees that overlay.png is a picture."""
    with Image.open(folder / "overlay.png") as picture:
        assert picture.mode == "RGB"
    with Image.open(folder / "mask.png") as mask:
        assert mask.mode == "L"
        return np.array(mask), json.loads((folder / "prediction.json").read_text())


def command(checkpoint: Path, out: Path, images: Sequence[Path], *queries: str) -> list[str]:
    words = ["--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu", "--max-new-tokens", "40"]
    for image in images:
        words += ["--image", str(image)]
    for query in queries:
        words += ["--query", query]
    return words


def refused(capsys: Capture, argv: Sequence[str]) -> list[str]:
    assert exit_code(main, argv) == 2
    return capsys.readouterr().err.splitlines()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_lines_of_the_readme(tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, say: Say) -> None:
    model = MediSee.from_pretrained(tiny_checkpoint)
    assert not model.training
    say(ANSWER)
    model = MediSee.from_pretrained(tiny_checkpoint)
    answer = ask(model, images["grey"], "Which organ makes bile?")
    overlay(answer.image, answer.mask, answer.box, legend=answer.text).save(tmp_path / "overlay.png")
    assert answer.text == ANSWER
    assert answer.plain_text == "It is this region. This is the liver."
    assert answer.emitted
    assert answer.mask is not None and answer.mask.shape == (40, 64) and answer.mask.dtype == bool
    assert answer.box is not None and 0 <= answer.box[0] <= answer.box[2] <= 64 and answer.box[3] <= 40
    assert 0 <= answer.scores["mask_confidence"] <= 1


def test_nothing_emitted_means_no_mask_and_no_box(model: MediSee, images: dict[str, Path], say: Say) -> None:
    say("It is [SEG]. This is the liver.")
    answer = ask(model, images["grey"], "Which organ makes bile?", max_new_tokens=40)
    assert (answer.emitted, answer.mask, answer.box, answer.scores) == (False, None, None, {})


def test_queries_about_one_image_share_a_pass_and_agree_with_single_ones(
    model: MediSee, images: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    monkeypatch.setattr(model, "embed_images", lambda batch: encoded.append(1) or MediSee.embed_images(model, batch))
    queries = ["Which organ makes bile?", "What filters the blood, and where does it lie in this scan?"]
    together = ask_all(model, images["colour"], queries, decode="forced")
    assert len(encoded) == 1
    for answer, query in zip(together, queries, strict=True):
        alone = ask(model, images["colour"], query, decode="forced")
        assert answer.question == query
        assert answer.box == pytest.approx(alone.box, abs=1e-3)
        assert (answer.mask == alone.mask).mean() > 0.999
        assert answer.text == "It is [SEG] and [BBOX]."


def test_pixels_and_file_give_the_same(model: MediSee, images: dict[str, Path]) -> None:
    with Image.open(images["colour"]) as picture:
        pixels = np.array(picture)
    given, read_in = (ask(model, image, "Where?", decode="forced") for image in (pixels, str(images["colour"])))
    assert given.box == read_in.box
    assert np.array_equal(given.image, read_in.image)


@pytest.mark.parametrize("pixels", [np.zeros((4, 5)), np.zeros((4, 5, 3)), np.zeros((4, 5, 4), np.uint8)])
def test_pixels_of_another_form_are_refused(model: MediSee, pixels: np.ndarray) -> None:
    with pytest.raises(InputError, match="expected pixels \\(H, W, 3\\) of uint8, got \\(4, 5"):
        ask(model, pixels, "Where?")


def test_queries_are_checked(model: MediSee, images: dict[str, Path]) -> None:
    for queries, message in (
        ([], "no query"),
        (["Where?", " \n"], "query 2 ' .n' has no text"),
        (["a\udcff"], "not valid Unicode"),
        (["word " * 3000], "'query 1': the text has .* tokens; expected at most 1024; shorten it"),
    ):
        with pytest.raises(InputError, match=message):
            ask_all(model, images["grey"], queries)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (ANSWER, "It is this region. This is the liver."),
        ("Sure, [SEG], [BBOX] and [SEG].", "Sure, this region."),
        ("[SEG][BBOX]", "this region"),
        ("The liver ([SEG]) is here.", "The liver (this region) is here."),
        ("no\x1b[31m colour\n here \u2013 \u03b1", "no [31m colour here \u2013 \u03b1"),
        ("", ""),
    ],
)
def test_plain_text_is_for_people(text: str, plain: str) -> None:
    assert plain_text(text, ("[SEG]", "[BBOX]")) == plain


def test_one_answer_goes_into_the_folder_itself(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, say: Say, capsys: Capture
) -> None:
    say(ANSWER)
    out = tmp_path / "new" / "out"
    main(command(tiny_checkpoint, out, [images["deep"]], "Which organ makes bile?"))
    assert files(out) == {"mask.png", "overlay.png", "prediction.json", "run.json"}
    mask, content = read(out)
    assert mask.shape == (content["height"], content["width"]) == (40, 64)
    assert set(np.unique(mask)) <= {0, 255}
    rle = Rle(tuple(content["mask"]["size"]), content["mask"]["counts"])
    assert np.array_equal(decode_mask(rle), mask > 0)
    assert (content["image"], content["question"]) == ("deep.tiff", "Which organ makes bile?")
    assert (content["text"], content["plain_text"]) == (ANSWER, "It is this region. This is the liver.")
    assert (content["emitted"], content["note"], content["mode"]) == (True, "", "generated")
    assert len(content["box"]) == 4
    printed = capsys.readouterr().out
    assert "  It is this region. This is the liver.\n" in printed
    assert "[SEG]" not in printed
    assert printed.splitlines()[-1] == f"done: 1 answer(s), 1 with a region, in {out}"


def test_nothing_emitted_is_reported_and_is_not_an_error(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, say: Say, capsys: Capture
) -> None:
    say(NOTHING)
    out = tmp_path / "out"
    assert exit_code(main, command(tiny_checkpoint, out, [images["grey"]], "Which organ makes bile?")) == 0
    mask, content = read(out)
    assert mask.shape == (40, 64) and not mask.any()
    assert (content["emitted"], content["mask"], content["box"], content["scores"]) == (False, None, None, {})
    assert content["note"].startswith("No region: the model did not write [SEG] and [BBOX]")
    printed = capsys.readouterr().out
    assert content["note"] in printed
    assert NOTHING in printed
    assert "0 with a region" in printed


def test_several_images_and_queries_get_folders(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, say: Say
) -> None:
    say(ANSWER, NOTHING)
    (tmp_path / "other").mkdir()
    twin = shutil.copy(images["colour"], tmp_path / "other" / "Deep.jpg")
    out = tmp_path / "out"
    main(command(tiny_checkpoint, out, [*images.values(), Path(twin)], "Which organ makes bile?", "What else?"))
    stems = [*images, "Deep-2"]
    assert {path.name for path in out.iterdir()} == {f"{stem}-{n}" for stem in stems for n in (1, 2)} | {"run.json"}
    for stem in stems:
        assert [read(out / f"{stem}-{n}")[1]["emitted"] for n in (1, 2)] == [True, False]
    assert read(out / "Deep-2-1")[1]["image"] == "Deep.jpg"


def test_answers_stay_inside_the_folder_whatever_an_image_is_called(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir(exist_ok=True)
    named = [Path(shutil.copy(images["grey"], tmp_path / "in" / name)) for name in ("...png", "-rf.png", "a\nb.png")]
    (tmp_path / "disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to("disk")
    (out / "notes.txt").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    for _ in range(2):
        main([*command(tiny_checkpoint, out, named, "Where?"), "--decode", "forced"])
    assert {path.name for path in out.iterdir()} == {"image", "rf", "a_b", "run.json", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == before and out.is_symlink()
    assert [read(out / name)[1]["image"] for name in ("image", "rf", "a_b")] == [path.name for path in named]


def test_several_images_and_one_query_and_forced(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    main([*command(tiny_checkpoint, out, [images["grey"], images["clear"]], "Where?"), "--decode", "forced"])
    assert {path.name for path in out.iterdir()} == {"grey", "clear", "run.json"}
    content = read(out / "clear")[1]
    assert (content["mode"], content["text"], content["emitted"]) == ("forced", "It is [SEG] and [BBOX].", True)


def test_no_folder_name_is_kept_in_what_is_written(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, say: Say
) -> None:
    say(ANSWER)
    patient = tmp_path / "jane_doe_1970"
    patient.mkdir()
    image = Path(shutil.copy(images["grey"], patient))
    main(command(tiny_checkpoint, tmp_path / "out", [image], "Where?"))
    for name in ("run.json", "prediction.json"):
        assert "jane_doe" not in (tmp_path / "out" / name).read_text()
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["settings"]["images"], run["settings"]["queries"]) == (["grey.png"], ["Where?"])


def test_all_bad_input_is_reported_together_and_nothing_is_written(
    tmp_path: Path, images: dict[str, Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    cut = tmp_path / "cut.png"
    cut.write_bytes(images["grey"].read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    argv = command(
        tmp_path / "empty", tmp_path / "file" / "out", [tmp_path / "no.png", cut, images["grey"]], "Where?", " "
    )
    before = files(tmp_path)
    said = refused(capsys, [*argv, "--max-new-tokens", "0", "--device", "gpu0"])
    for start, part in (
        ("query 2 ' ' has no text", "ask something"),
        ("--max-new-tokens is 0", "expected 1 or more"),
        (f"{tmp_path / 'no.png'}: expected an image file", "check the path"),
        (f"{cut}: cannot be decoded", "expected a whole PNG, JPEG or TIFF, found a truncated"),
        (f"--out {tmp_path / 'file' / 'out'}: {tmp_path / 'file'} is a file", "expected a folder"),
        ("--device 'gpu0' cannot be used", "expected cpu"),
        (f"{tmp_path / 'empty' / 'config.json'}: no checkpoint here", "training wrote"),
    ):
        assert [line for line in said if line.startswith(f"error: {start}") and part in line], (start, said)
    assert len(said) == 7
    assert files(tmp_path) == before


def test_nothing_is_fetched_for_other_bad_input_but_a_missing_folder_is_reported(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    said = refused(capsys, command(Path("lab/medisee"), tmp_path / "out", [tmp_path / "no.png"], "Where?"))
    assert len(said) == 1
    said = refused(capsys, command(tmp_path / "no", tmp_path / "out", [tmp_path / "no.png"], "Where?"))
    assert len(said) == 2 and f"{tmp_path / 'no'}: no such folder" in said[1]


@pytest.mark.parametrize("choice", [("--bits", "4"), ("--device-map", "auto")])
def test_bits_and_devices_are_chosen_for_published_models_only(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, capsys: Capture, choice: tuple[str, str]
) -> None:
    said = refused(capsys, [*command(tiny_checkpoint, tmp_path / "out", [images["grey"]], "Where?"), *choice])
    name = choice[0].removeprefix("--").replace("-", "_")
    assert len(said) == 1 and f"holds all of its language model, so {name} cannot be chosen" in said[0]
    assert not (tmp_path / "out").exists()


def test_an_image_is_not_replaced_by_its_own_mask(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    image = Path(shutil.copy(images["grey"], tmp_path / "mask.png"))
    (said,) = refused(capsys, command(tiny_checkpoint, tmp_path, [image], "Where?"))
    assert "mask.png: would be replaced by the result" in said


def test_a_file_in_the_place_of_an_answers_folder_is_reported(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "grey").write_text("")
    (said,) = refused(capsys, command(tiny_checkpoint, tmp_path / "out", [images["grey"], images["deep"]], "Where?"))
    assert f"{tmp_path / 'out' / 'grey'} is a file" in said


def test_a_failure_leaves_no_half_written_file(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(self: Image.Image, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    say(ANSWER)
    out = tmp_path / "out"
    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        main(command(tiny_checkpoint, out, [images["grey"]], "Where?"))
    assert files(out) == set()


def test_an_image_is_read_once(
    tiny_checkpoint: Path, images: dict[str, Path], tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_paths: list[Path] = []
    read_image = inference.read_image
    monkeypatch.setattr(inference, "read_image", lambda path, page: read_paths.append(path) or read_image(path, page))
    say(ANSWER)
    main(command(tiny_checkpoint, tmp_path / "kept", [images["grey"], images["deep"]], "Where?"))
    assert read_paths == [images["grey"], images["deep"]]
    read_paths.clear()
    monkeypatch.setattr(inference, "_KEPT_BYTES", 40 * 64 * 3)
    main(command(tiny_checkpoint, tmp_path / "again", [images["grey"], images["deep"]], "Where?"))
    assert read_paths == [images["grey"], images["deep"], images["deep"]]


def test_bad_arguments_are_refused_before_anything_heavy_is_imported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    argv = ["--checkpoint", str(tiny_checkpoint), "--image", "no.png", "--query", " ", "--out", str(tmp_path)]
    code = f"""
import sys
from medisee.foundation.errors import exit_code
from medisee.inference import main
assert exit_code(main, {argv}) == 2
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "query 1 ' ' has no text" in done.stderr and "no.png: expected an image file" in done.stderr


def test_help_teaches(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "python scripts/inference.py --checkpoint" in said
    assert "prediction.json" in said
    assert f"default: {inference.MAX_NEW_TOKENS}" in said
