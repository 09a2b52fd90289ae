from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture_files import TURNS, png, tiff
from PIL import Image

from medisee.foundation.errors import InputError
from medisee.records import images
from medisee.records.images import image_size, read_image

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def problem(path: Path, page: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_image(path, page)
    (message,) = caught.value.problems
    assert str(path) in message
    assert "; " in message and message.endswith(".")  # what is wrong, and what to do
    return message


def scaled(values: np.ndarray) -> np.ndarray:
    """What becomes of deep values: their percentiles, of all channels together, are 0 and 255."""
    low, high = np.percentile(values, images.PERCENTILES)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_8_bit_grey_is_kept_on_three_equal_channels(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RAMP).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (6, 8, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert (image == RAMP[..., None]).all()


def test_jpeg_is_read_as_rgb(tmp_path: Path) -> None:
    Image.new("RGB", (16, 8), (200, 30, 90)).save(tmp_path / "a.jpg", quality=95)
    image = read_image(str(tmp_path / "a.jpg"))
    assert image.shape == (8, 16, 3)
    assert np.abs(image.astype(int) - (200, 30, 90)).max() <= 4


def test_bilevel_and_palette_become_their_colours(tmp_path: Path) -> None:
    Image.fromarray(RAMP > 100).save(tmp_path / "bits.png")
    assert (read_image(tmp_path / "bits.png")[..., 0] == (RAMP > 100) * 255).all()
    palette = Image.fromarray((RAMP > 100).astype(np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png")[0, 0].tolist() == [10, 20, 30]
    assert read_image(tmp_path / "palette.png")[-1, -1].tolist() == [40, 50, 60]


@pytest.mark.parametrize(("alpha", "expected"), [(0, [0, 0, 0]), (128, [100, 50, 25]), (255, [200, 100, 50])])
def test_alpha_is_laid_on_black(tmp_path: Path, alpha: int, expected: list[int]) -> None:
    Image.new("RGBA", (3, 2), (200, 100, 50, alpha)).save(tmp_path / "a.png")
    assert np.abs(read_image(tmp_path / "a.png")[0, 0].astype(int) - expected).max() <= 1


def test_16_bit_is_scaled_between_its_percentiles(tmp_path: Path) -> None:
    values = np.linspace(1000, 3000, 10_000).round().astype(np.uint16).reshape(100, 100)
    values[0, 0], values[-1, -1] = 0, 65535  # a dead and a hot pixel must not squeeze the rest
    Image.fromarray(values).save(tmp_path / "a.png")
    grey = read_image(tmp_path / "a.png")[..., 0]
    low, high = np.percentile(values, images.PERCENTILES)
    assert np.abs(grey - np.clip((values - low) / (high - low), 0, 1) * 255).max() <= 0.5
    assert grey[0, 0] == 0
    assert grey[-1, -1] == 255


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_tiff_is_scaled(tmp_path: Path, dtype: type) -> None:
    values = np.linspace(-1024, 3071, 600).reshape(20, 30).astype(dtype)
    Image.fromarray(values).save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    assert image.shape == (20, 30, 3)
    assert (image.min(), image.max()) == (0, 255)
    assert (np.diff(image[..., 0].ravel().astype(int)) >= 0).all()


def test_a_few_bright_pixels_on_a_constant_ground_stay_visible(tmp_path: Path) -> None:
    values = np.full((100, 100), 7, np.uint16)
    values[50, 50] = 900
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[50, 50].tolist() == [255] * 3
    Image.fromarray(np.full((4, 4), 7, np.uint16)).save(tmp_path / "constant.png")
    assert not read_image(tmp_path / "constant.png").any()


def test_pixels_that_are_not_finite_are_black(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    values[9, 8], values[9, 9] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[9, 8:].max() == 0
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "none.tif")
    assert "finite" in problem(tmp_path / "none.tif")


def test_white_is_zero_tiff_is_shown_as_a_viewer_does(tmp_path: Path) -> None:
    values = np.linspace(0, 255, 100).reshape(10, 10)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.tif", tiffinfo={262: 0})
    deep = read_image(tmp_path / "deep.tif")[..., 0]
    assert (deep[0, 0], deep[-1, -1]) == (255, 0)
    # Pillow inverts 8-bit values when it writes them and again when it reads them.
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "grey.tif", tiffinfo={262: 0})
    assert (read_image(tmp_path / "grey.tif")[..., 0] == values.astype(np.uint8)).all()


DEEP = np.random.default_rng(1).integers(0, 4096, (9, 7, 4)).astype(np.uint16)
"""12 bits of 16, as many detectors have."""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("png", png(DEEP[..., :3])),
        *((f"{order}{deflated}.tif", (order, deflated)) for order in "<>" for deflated in (False, True)),
    ],
    ids=str,
)
def test_16_bit_colour_has_the_range_of_the_grey_file(tmp_path: Path, name: str, content: bytes | tuple) -> None:
    path = tmp_path / f"a.{name}"
    if isinstance(content, tuple):
        content = tiff(DEEP[..., :3], order=content[0], deflated=content[1])
    path.write_bytes(content)
    colour = read_image(path)
    assert (colour.min(), colour.max()) == (0, 255)
    assert (colour == scaled(DEEP[..., :3])).all()
    grey = np.linspace(0, 4095, 10_000).astype(np.uint16).reshape(100, 100, 1)
    path.write_bytes(png(grey.repeat(3, axis=2)))
    (tmp_path / "grey.png").write_bytes(png(grey))
    assert np.abs(read_image(path).astype(int) - read_image(tmp_path / "grey.png")).max() <= 1


def test_16_bit_alpha_is_laid_on_black(tmp_path: Path) -> None:
    alpha = np.array([0, 32768, 65535] * 21, np.uint16).reshape(9, 7, 1)
    shown = scaled(DEEP[..., :3]) * (alpha / 65535)
    for name, content in {
        "a.png": png(np.concatenate([DEEP[..., :3], alpha], axis=2)),
        "b.tif": tiff(np.concatenate([DEEP[..., :3], alpha], axis=2), extra=[2]),
        "c.tif": tiff(np.concatenate([DEEP[..., :3], alpha], axis=2), order=">", deflated=True, extra=[2]),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert np.abs(read_image(tmp_path / name) - shown).max() <= 0.51
    (tmp_path / "grey.png").write_bytes(png(np.concatenate([DEEP[..., :1], alpha], axis=2)))
    assert np.abs(read_image(tmp_path / "grey.png") - scaled(DEEP[..., :1]) * (alpha / 65535)).max() <= 0.51
    (tmp_path / "premultiplied.tif").write_bytes(tiff(np.concatenate([DEEP[..., :3], alpha], axis=2), extra=[1]))
    assert (read_image(tmp_path / "premultiplied.tif") == scaled(DEEP[..., :3])).all()


def test_numbers_that_pillow_takes_for_others(tmp_path: Path) -> None:
    signed = np.arange(-60, 60).reshape(10, 12, 1)
    for name, values in {"bytes": signed.astype(np.int8), "words": (signed * 2**24 + 2**31).astype(np.uint32)}.items():
        (tmp_path / name).write_bytes(tiff(values))
        assert (read_image(tmp_path / name)[..., :1] == scaled(signed)).all()


def test_16_bit_channels_that_lie_apart_are_refused(tmp_path: Path) -> None:
    for deflated in (False, True):
        (tmp_path / "a.tif").write_bytes(tiff(DEEP[..., :3], separate=True, deflated=deflated))
        assert "16-bit channels one after the other" in problem(tmp_path / "a.tif")
    eight = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
    (tmp_path / "b.tif").write_bytes(tiff(eight, separate=True))
    assert (read_image(tmp_path / "b.tif") == eight).all()


STORED = {
    "grey": RAMP[..., None],
    "colour": np.arange(144, dtype=np.uint8).reshape(6, 8, 3),
    "alpha": np.concatenate([RAMP[..., None], np.full((6, 8, 1), 255, np.uint8)], axis=2),
    "deep": np.arange(48, dtype=np.uint16).reshape(6, 8, 1) * 1000,
    "deep colour": np.arange(144, dtype=np.uint16).reshape(6, 8, 3) * 400,
}


def shown(stored: np.ndarray) -> np.ndarray:
    colours = stored[..., :1] if stored.shape[2] == 2 else stored
    values = scaled(colours) if stored.dtype == np.uint16 else colours
    return np.repeat(values, 3 // values.shape[2], axis=2)


@pytest.mark.parametrize("tag", TURNS)
@pytest.mark.parametrize("mode", STORED)
def test_a_turned_file_is_shown_as_a_viewer_shows_it(tmp_path: Path, mode: str, tag: int) -> None:
    stored = STORED[mode]
    files = {"early.png": png(stored, tag), "late.png": png(stored, tag, late_tag=True)}
    orders: tuple[Literal["<"], Literal[">"]] = ("<", ">")
    for order in orders:
        for deflated in (False, True):
            files[f"{order}{deflated}.tif"] = tiff(
                stored, tag, order=order, deflated=deflated, extra=[2] * (mode == "alpha")
            )
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        image = read_image(tmp_path / name)
        np.testing.assert_array_equal(image, TURNS[tag](shown(stored)), err_msg=name)
        assert image_size(tmp_path / name, "") == image.shape[:2]


@pytest.mark.parametrize("tag", TURNS)
def test_a_turned_jpeg(tmp_path: Path, tag: int) -> None:
    stored = np.kron(np.array([[0, 80, 160], [240, 120, 40]], np.uint8), np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[274] = tag
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = read_image(tmp_path / "a.jpg")
    assert np.abs(image[..., 0].astype(int) - TURNS[tag](stored)).max() <= 3
    assert image_size(tmp_path / "a.jpg", "") == image.shape[:2]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["1", "L", "I;16", "RGB", "RGBA", "P", "CMYK", "LA"]),
    st.sampled_from(
        [("tif", None), ("tif", "tiff_lzw"), ("tif", "tiff_adobe_deflate"), ("tif", "packbits"), ("png", None)]
    ),
    st.sampled_from(sorted(TURNS)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 2**32 - 1),
)
def test_any_mode_compression_and_turn(
    tmp_path: Path, mode: str, kind: tuple[str, str | None], tag: int, size: tuple[int, int], seed: int
) -> None:
    """The pixels of a file without a tag, turned, are those of the file with it."""
    suffix, compression = kind
    if suffix == "png" and mode == "CMYK":
        mode = "RGB"
    deep = np.random.default_rng(seed).integers(0, 65536, (size[1], size[0])).astype(np.uint16)
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    picture = Image.fromarray(deep) if mode == "I;16" else noise.convert(mode)
    exif = Image.Exif()
    exif[274] = tag
    options = {"compression": compression} if compression else {}
    picture.save(tmp_path / f"plain.{suffix}", **options)
    picture.save(tmp_path / f"turned.{suffix}", exif=exif, **options)
    plain, turned = (read_image(tmp_path / f"{name}.{suffix}") for name in ("plain", "turned"))
    np.testing.assert_array_equal(turned, TURNS[tag](plain))
    assert image_size(tmp_path / f"turned.{suffix}", "") == turned.shape[:2]
    if mode == "RGB":
        np.testing.assert_array_equal(plain, np.asarray(noise))


def test_a_size_is_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(RAMP[..., None], 6, late_tag=True))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert image_size(tmp_path / "a.png", "") == (8, 6)


def test_one_of_several_pages_must_be_named(tmp_path: Path) -> None:
    pages = [Image.new("L", (4, 3), value) for value in (10, 20, 30)]
    for name in ("a.tif", "a.png"):
        path = tmp_path / name
        pages[0].save(path, save_all=True, append_images=pages[1:])
        assert [int(read_image(path, page)[0, 0, 0]) for page in range(3)] == [10, 20, 30]
        assert "found 3 pages; name a page from 0 to 2 (--page" in problem(path)
        assert "found no page 3; name a page from 0 to 2" in problem(path, 3)
        assert "no page -1" in problem(path, -1)
        with pytest.raises(InputError, match="found 3 pages"):
            image_size(path, "image")
    Image.new("L", (4, 3), 7).save(tmp_path / "one.png")
    assert read_image(tmp_path / "one.png", 0)[0, 0, 0] == 7
    assert "found no page 1" in problem(tmp_path / "one.png", 1)


def test_a_page_of_deep_colour(tmp_path: Path) -> None:
    first, second = tiff(DEEP[..., :3]), tiff(DEEP[..., 1:])
    # The end of the first directory is the address of the next one; offsets in the second move with it.
    start = int.from_bytes(second[4:8], "little")
    moved = bytearray(second)
    for entry in range(int.from_bytes(second[start : start + 2], "little")):
        place = start + 2 + 12 * entry
        size = {3: 2, 4: 4}[int.from_bytes(moved[place + 2 : place + 4], "little")]
        count = int.from_bytes(moved[place + 4 : place + 8], "little")
        code = int.from_bytes(moved[place : place + 2], "little")
        if size * count > 4 or code == 273:
            value = int.from_bytes(moved[place + 8 : place + 12], "little") + len(first)
            moved[place + 8 : place + 12] = value.to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(first[:-4] + (start + len(first)).to_bytes(4, "little") + bytes(moved))
    assert (read_image(tmp_path / "a.tif", 0) == scaled(DEEP[..., :3])).all()
    assert (read_image(tmp_path / "a.tif", 1) == scaled(DEEP[..., 1:])).all()


def test_the_previews_in_a_phones_jpeg_are_not_pages(tmp_path: Path) -> None:
    pictures = [Image.new("L", (16, 8), value) for value in (200, 10)]
    pictures[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - 200).max() <= 3


def test_what_is_no_image_file_is_told(tmp_path: Path) -> None:
    assert "none.png does not exist; check the path" in problem(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    assert "a folder" in problem(tmp_path / "folder.png")
    (tmp_path / "empty.png").touch()
    assert "0 bytes" in problem(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not an image")
    assert "b'not an i'" in problem(tmp_path / "text.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert "a pipe or a device" in problem(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert "cannot be read (Too many levels of symbolic links)" in problem(tmp_path / "loop.png")
    assert "write / instead of \\" in problem(tmp_path / "images\\0.png")
    assert "cannot be read (File name too long)" in problem(tmp_path / ("a" * 300))
    assert "null byte" in problem(tmp_path / "a\0.png")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied); check the file and your permission" in problem(tmp_path / "a.png")


def saved(suffix: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RAMP).convert("RGB").save(buffer, suffix, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("found DICOM; export the slice as PNG", b"\0" * 128 + b"DICM\2\0"),
        ("found NIfTI; export the slice as PNG", (348).to_bytes(4, "little") + b"\0" * 340 + b"n+1\0" + b"\0" * 9),
        ("found a gzip file, perhaps NIfTI; export the slice as PNG", b"\x1f\x8b\x08\0"),
        ("found GIF; convert it to PNG", saved("GIF")),
        ("found BMP; convert it to PNG", saved("BMP")),
        ("found WebP; convert it to PNG", saved("WEBP")),
        ("found HEIC or AVIF; convert it to PNG", b"\0\0\0\x1cftypavif\0\0\0\0"),
        ("found HEIC or AVIF; convert it to PNG", b"\0\0\0\x1cftypheic\0\0\0\0"),
        ("starts with b'BMI,age\\n'", b"BMI,age\n31,60\n"),
        ("its header is wrong", saved("PNG")[:12] + b"XXXX" + saved("PNG")[16:]),
        ("its header is wrong", saved("JPEG")[:3] + b"\0" * 9),
        ("found 3 channel(s) of 32-bit floats in an unknown layout", tiff(np.zeros((2, 3, 3), np.float32))),
        ("found 1 channel(s) of 64-bit floats", tiff(np.zeros((2, 3, 1)))),
        ("found 5 channel(s) of 8-bit integers", tiff(np.zeros((2, 3, 5), np.uint8), photometric=1)),
        ("found 1 channel(s) of 16-bit integers", tiff(np.zeros((2, 3, 1), np.uint16), order=">", photometric=0)),
        ("its header is wrong", b"II*\0\xff\xff\xff\xff"),
    ],
)
def test_the_true_reason_is_told(tmp_path: Path, kind: str, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert kind in problem(tmp_path / "a")
    with pytest.raises(InputError, match=r"^record 'r': image 'a'") as caught:
        image_size(tmp_path / "a", "record 'r': image 'a'")
    assert kind in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.dcm", "DICOM"), ("a.DCM", "DICOM"), ("a.nii", "NIfTI"), ("a.b.nii.gz", "NIfTI")]
)
def test_other_medical_formats_are_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).touch()
    message = problem(tmp_path / name)
    assert kind in message
    assert "export the slice as PNG" in message


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_truncated_file_is_told(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    message = problem(path)
    assert "cannot be decoded" in message
    assert "truncated or damaged" in message


def test_a_gigantic_image_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 40)
    monkeypatch.setattr(images, "decoded", None)
    assert "expected at most 40 pixels, found 8 x 6; crop it" in problem(tmp_path / "a.png")
    with pytest.raises(InputError, match="found 8 x 6; crop it"):
        image_size(tmp_path / "a.png", "image")


def test_pillows_own_limit_is_told_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "crop it or scale it down" in problem(tmp_path / "a.png")


def test_a_wrong_bit_of_a_pngs_pixels_is_noticed(tmp_path: Path) -> None:
    """Pillow alone returns other pixels for most of these."""
    content = png(RAMP[..., None])
    start, end = content.index(b"IDAT") + 4, content.index(b"IEND") - 8
    for place in range(start, end):
        (tmp_path / "a.png").write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert "wrong checksum of a block IDAT" in problem(tmp_path / "a.png")
    late = png(RAMP[..., None], 6, late_tag=True)
    place = late.index(b"eXIf") + 8
    (tmp_path / "a.png").write_bytes(late[:place] + b"\1" + late[place + 1 :])
    assert "wrong checksum of a block eXIf" in problem(tmp_path / "a.png")


FILES = {
    "png": [png(STORED["deep colour"], 6), png(STORED["grey"], 5, late_tag=True), saved("PNG")],
    "jpeg": [saved("JPEG"), saved("JPEG", progressive=True), saved("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")],
    "tiff": [tiff(STORED["grey"], 6), tiff(STORED["deep colour"], 3, deflated=True), saved("TIFF", compression="jpeg")],
}


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Returns a file with bytes changed, cut off, left out or doubled."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, length = rng.randrange(len(changed)), rng.randint(1, 12)
        match rng.choice(["change", "change", "cut", "omit", "double"]):
            case "change":
                changed[place] = rng.randrange(256)
            case "cut":
                del changed[max(place, 4) :]
            case "omit":
                del changed[place : place + length]
            case "double":
                changed[place:place] = changed[place : place + length]
        changed = changed or bytearray(b"x")
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged tags
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_read_or_told(tmp_path: Path, kind: str) -> None:
    """Of 200 files, each is a picture of the size that its header tells, or one sentence; a PNG is the whole one."""
    rng = random.Random(7)
    path = tmp_path / "a"
    read = 0
    for number in range(200):
        original = FILES[kind][number % 3]
        path.write_bytes(original)
        whole = read_image(path)
        path.write_bytes(mutated(original, rng))
        try:
            image = read_image(path)
        except InputError as error:
            (message,) = error.problems
            assert message.startswith(f"{path}: ")
            continue
        read += 1
        assert image.dtype == np.uint8 and image.shape == (*image_size(path, ""), 3)
        if kind == "png" and image.shape == whole.shape:
            assert (image == whole).all()
    assert 0 < read < 200
