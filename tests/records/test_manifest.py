"""The manifest: read on demand, pickled, and checked against the files that it names."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import ExifTags, Image

from medisee.foundation.errors import InputError
from medisee.records import images
from medisee.records import manifest as manifests
from medisee.records.manifest import Manifest
from medisee.records.masks import MaskFiles, Rle, encode_mask
from medisee.records.records import Record, Target, write_records

TRUTH = np.zeros((6, 8), dtype=bool)
TRUTH[1:3, 2:5] = True


def record(name: str, mask: str | MaskFiles | Rle = "m.png", **changes: object) -> Record:
    target = Target(id="t", category="liver", mask=mask, **changes)  # pyright: ignore[reportArgumentType]
    return Record(id=name, image="a.png", modality="ct", source="demo", case="c", targets=(target,))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Manifest]:
    """Returns a function that writes records beside an image and its mask and opens them."""
    Image.new("L", (8, 6)).save(tmp_path / "a.png")
    Image.fromarray(TRUTH).save(tmp_path / "m.png")

    def write(*records: Record) -> Manifest:
        write_records(tmp_path / "r.jsonl", records)
        return Manifest(tmp_path / "r.jsonl")

    return write


def problems_of(call: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        call()
    return caught.value.problems


def test_is_a_sequence(make: Callable[..., Manifest]) -> None:
    records = [record(f"r{index}") for index in range(5)]
    manifest = make(*records)
    assert len(manifest) == 5 and list(manifest) == records
    assert manifest[-1] == records[-1] and manifest[1:4:2] == records[1:4:2]
    assert manifest[np.int64(2)] == records[2]  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(IndexError):
        manifest[5]


def test_blank_lines_and_no_last_newline(make: Callable[..., Manifest]) -> None:
    path = make(record("r0"), record("r1")).path
    path.write_bytes(b"\r\n\n" + path.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n\n"))
    assert [each.id for each in Manifest(path)] == ["r0", "r1"]


def test_pickles_without_its_map(make: Callable[..., Manifest]) -> None:
    manifest = make(record("r0"), record("r1"))
    assert manifest[0].id == "r0"
    copy = pickle.loads(pickle.dumps(manifest))
    assert copy[1] == manifest[1] and copy.root == manifest.root


def test_a_file_that_changes_is_noticed(make: Callable[..., Manifest]) -> None:
    manifest = make(record("r0"))
    with manifest.path.open("a") as handle:
        handle.write("\n")
    assert "as when opened" in problems_of(lambda: manifest[0])[0]


def test_every_bad_line_is_told_at_once(make: Callable[..., Manifest], tmp_path: Path) -> None:
    lines = [
        record("r0"),
        record("r0"),
        record("r2", "../m.png"),
        record("r3", "/m.png"),
        record("r4", "m\0.png"),
        record("r5", box=(3, 4, 3, 5)),
    ]
    problems = problems_of(lambda: make(*lines))
    expected = [
        (2, f"id 'r0' is also that of {tmp_path / 'r.jsonl'}:1"),
        (3, 'targets[0].mask is "../m.png"; expected a path inside the root'),
        (4, 'targets[0].mask is "/m.png"; expected a path inside the root'),
        (5, r'targets[0].mask is "m\u0000.png"; expected a path inside the root'),
        (6, "targets[0].box is [3, 4, 3, 5]"),
    ]
    assert len(problems) == len(expected)
    for problem, (line, text) in zip(problems, expected, strict=True):
        assert problem.startswith(f"{tmp_path / 'r.jsonl'}:{line}: ") and text in problem


def test_an_empty_or_missing_file_is_refused(make: Callable[..., Manifest], tmp_path: Path) -> None:
    assert "no record; expected one JSON object per line" in problems_of(make)[0]
    assert "cannot be read" in problems_of(lambda: Manifest(tmp_path / "none.jsonl"))[0]
    assert "cannot be read" in problems_of(lambda: Manifest(tmp_path))[0]


def test_another_root(make: Callable[..., Manifest], tmp_path: Path) -> None:
    make(record("r0"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "r.jsonl").rename(tmp_path / "elsewhere" / "r.jsonl")
    manifest = Manifest(tmp_path / "elsewhere" / "r.jsonl", root=tmp_path)
    manifest.check_files()
    assert manifest.image_path(manifest[0]) == (tmp_path / "a.png").resolve()
    assert manifest.image_size(manifest[0]) == (6, 8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_mask_images_of_every_kind(make: Callable[..., Manifest], tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(TRUTH.astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray(TRUTH.astype(np.uint16) * 300)
    elif mode == "P":
        image = grey.copy()
        image.putpalette([0, 0, 0, 255, 0, 0])
    else:
        image = (Image.fromarray(TRUTH) if mode == "1" else grey).convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "m.png")
    manifest = make(record("r0"))
    np.testing.assert_array_equal(manifest.mask(manifest[0], manifest[0].targets[0]), TRUTH)


def test_rle_mask_and_box_to_the_edge(make: Callable[..., Manifest]) -> None:
    manifest = make(record("r0", encode_mask(TRUTH), box=(0, 0, 8, 6)))
    mask = manifest.mask(manifest[0], manifest[0].targets[0])
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, TRUTH)


def test_masks_in_several_files(make: Callable[..., Manifest], tmp_path: Path) -> None:
    Image.fromarray(~TRUTH).save(tmp_path / "inverted.png")
    Image.new("L", (6, 8), 1).save(tmp_path / "turned.png")
    dot = np.zeros_like(TRUTH)
    dot[5, 7] = True
    Image.fromarray(dot).save(tmp_path / "dot.png")
    manifest = make(
        record("joined", MaskFiles(("m.png", "dot.png"))),
        record("turned over", MaskFiles(("inverted.png",), inverted=True)),
        record("sizes", MaskFiles(("m.png", "turned.png"))),
        record("missing", MaskFiles(("m.png", "none.png"))),
        record("nothing", MaskFiles(("turned_over.png",))),
    )
    Image.new("L", (8, 6)).save(tmp_path / "turned_over.png")
    masks = [manifest.mask(one, one.targets[0]) for one in manifest[:2]]
    np.testing.assert_array_equal(masks[0], TRUTH | dot)
    np.testing.assert_array_equal(masks[1], TRUTH)
    sizes, missing, nothing = problems_of(manifest.check_files)
    assert "record 'sizes', target 't': mask 'turned.png' is 6 x 8" in sizes
    assert "record 'missing', target 't': mask 'none.png': expected an image file, found none:" in missing
    assert "record 'nothing', target 't': mask 'turned_over.png' is empty" in nothing
    (problem,) = problems_of(lambda: make(record("out", MaskFiles(("../m.png",)))))
    assert 'targets[0].mask.files[0] is "../m.png"; expected a path inside the root' in problem


def test_a_label_map_by_value(make: Callable[..., Manifest], tmp_path: Path) -> None:
    """Two targets of one file have a part each; without a value, the file is refused."""
    labels = TRUTH.astype(np.uint8)
    labels[4, 1:7] = 7
    Image.fromarray(labels).save(tmp_path / "labels.png")
    manifest = make(
        record("one", MaskFiles(("labels.png",), value=1)),
        record("seven", MaskFiles(("labels.png",), value=7)),
        record("all but seven", MaskFiles(("labels.png",), inverted=True, value=7)),
        record("either", MaskFiles(("labels.png", "m.png"), value=7)),
        record("absent", MaskFiles(("labels.png",), value=3)),
        record("unclear", "labels.png"),
    )
    masks = [manifest.mask(one, one.targets[0]) for one in manifest[:3]]
    np.testing.assert_array_equal(masks[0], TRUTH)
    np.testing.assert_array_equal(masks[1], labels == 7)
    np.testing.assert_array_equal(masks[2], labels != 7)
    absent, unclear = problems_of(manifest.check_files)
    assert "mask 'labels.png' (value 3) is empty" in absent
    assert "mask 'labels.png': expected 0 and one other value, found 3: 0, 1, 7;" in unclear
    assert '{"files": [...], "value": N}' in unclear
    text = manifest.path.read_text()
    assert text.count('"value"') == 5
    assert list(Manifest(manifest.path)) == list(manifest)
    manifest.path.write_text(text.replace('"value": 3', '"value": 0').replace('"value": 1', '"value": true'))
    first, second = problems_of(lambda: Manifest(manifest.path))
    assert "r.jsonl:1: targets[0].mask.value is true; expected a whole number" in first
    assert "r.jsonl:5: targets[0].mask.value is 0" in second


def test_a_mask_is_turned_like_its_image(make: Callable[..., Manifest], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, pixels in (("a.png", np.zeros((8, 6), np.uint8)), ("m.tif", np.rot90(TRUTH).astype(np.uint8) * 255)):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    manifest = make(record("r0", "m.tif"))
    assert manifest.image_size(manifest[0]) == (6, 8)
    np.testing.assert_array_equal(manifest.mask(manifest[0], manifest[0].targets[0]), TRUTH)


def test_a_path_of_windows_and_a_loop_of_links_are_told(make: Callable[..., Manifest], tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    manifest = make(record("r0", "masks\\m.png"), record("r1", "loop.png"))
    path, loop = problems_of(manifest.check_files)
    assert "does not exist" in path and "write / instead of \\" in path
    assert "mask 'loop.png': cannot be read (Too many levels of symbolic links)" in loop


def test_pages_that_were_read_are_given_back(make: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many records are read, few pages of the file stay in this process."""
    monkeypatch.setattr(manifests, "_HELD", 16)
    manifest = make(*(record(f"r{index}", "m" * 16_000) for index in range(300)))
    for each in (0, -1):
        assert manifest[each].id

    def held() -> int:
        maps = Path("/proc/self/smaps").read_text().split(str(manifest.path))[1]
        return int(maps.split("Rss:")[1].split()[0])

    for index in range(300):
        assert manifest[index].id == f"r{index}"
    assert manifest.path.stat().st_size > 4_800_000
    assert held() < 2400  # kB, of 4,800


def test_size_is_that_of_the_image_as_shown(make: Callable[..., Manifest], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("L", (6, 8)).save(tmp_path / "a.png", exif=exif)
    manifest = make(record("r0"))
    assert manifest.image_size(manifest[0]) == (6, 8)
    manifest.check_files()


def test_volumes_are_left_to_their_reader(make: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make(replace(record("r0"), image="scan.nii.gz"))
    assert "image 'scan.nii.gz': expected an image file, found none" in problems_of(manifest.check_files)[0]
    (tmp_path / "scan.nii.gz").touch()
    assert manifest.image_size(manifest[0]) is None
    manifest.check_files()


def test_check_files_tells_all_problems_at_once(make: Callable[..., Manifest], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "m.png").read_bytes()[:50])
    Image.new("L", (6, 8), 1).save(tmp_path / "turned.png")
    Image.new("L", (8, 6)).save(tmp_path / "empty.png")
    manifest = make(
        record("good"),
        record("r1", "none.png"),
        record("r2", "text.png"),
        record("r3", "cut.png"),
        record("r4", "turned.png"),
        record("r5", "empty.png"),
        record("r6", encode_mask(TRUTH.T.copy())),
        record("r7", box=(0, 0, 9, 6)),
        replace(record("r8"), image="none.png"),
        record("r9", "empty.png", box=(0, 0, 8, 7)),
    )
    problems = problems_of(manifest.check_files)
    expected = [
        ("r1", "mask 'none.png': expected an image file, found none:"),
        ("r2", "mask 'text.png': expected a PNG, JPEG or TIFF, found a file that starts with b'no image'"),
        ("r3", "mask 'cut.png': cannot be decoded"),
        ("r4", "mask 'turned.png' is 6 x 8 (width x height); expected the image's 8 x 6"),
        ("r5", "mask 'empty.png' is empty; expected a pixel > 0"),
        ("r6", "mask (RLE) is 6 x 8 (width x height); expected the image's 8 x 6"),
        ("r7", "box [0, 0, 9, 6] leaves the image; expected x1 <= 8 and y1 <= 6"),
        ("r8", "image 'none.png': expected an image file, found none:"),
        ("r9", "mask 'empty.png' is empty"),
        ("r9", "box [0, 0, 8, 7] leaves the image"),
    ]
    assert len(problems) == len(expected)
    for problem, (name, text) in zip(problems, expected, strict=True):
        assert f"{tmp_path / 'r.jsonl'}: record '{name}'" in problem and text in problem
    target = manifest[1].targets[0]
    assert problems_of(lambda: manifest.mask(manifest[1], target)) == (problems[0],)


def test_an_image_that_is_cut_off_is_named(make: Callable[..., Manifest]) -> None:
    manifest = make(record("r0"))
    path = manifest.image_path(manifest[0])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=f"image '{path.name}': cannot be decoded"):
        manifest.mask(manifest[0], manifest[0].targets[0])


def test_an_image_is_opened_once_for_all_masks(make: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    one = record("r0")
    manifest = make(replace(one, targets=(*one.targets, replace(one.targets[0], id="u", mask=encode_mask(TRUTH)))))
    opened: list[str] = []
    image_open = Image.open

    def counted(file: BinaryIO, **options: Any) -> Image.Image:
        opened.append(Path(file.name).name)
        return image_open(file, **options)

    monkeypatch.setattr(images.Image, "open", counted)
    masks = manifest.masks(manifest[0])
    assert len(masks) == 2 and all(np.array_equal(mask, TRUTH) for mask in masks)
    assert opened == ["a.png", "m.png"]
