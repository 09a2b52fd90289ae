from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medisee.foundation.errors import InputError
from medisee.records import images
from medisee.records.images import read_image

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def problem(path: Path, page: int = 0) -> str:
    with pytest.raises(InputError) as caught:
        read_image(path, page)
    (message,) = caught.value.problems
    assert str(path) in message
    assert "expected" in message
    assert "found" in message
    return message


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


def test_16_bit_colour_keeps_its_high_byte(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(">6H", *[0x1234, 0xABCD, 0x00FF] * 2)
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert read_image(tmp_path / "a.png")[1, 1].tolist() == [0x12, 0xAB, 0x00]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8] = 255  # the top half; orientation 6 asks for a quarter turn clockwise
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (32, 16, 3)
    assert image[:, 10:].min() > 240
    assert image[:, :6].max() < 15


def test_pages_of_a_tiff(tmp_path: Path) -> None:
    pages = [Image.new("L", (4, 3), value) for value in (10, 20, 30)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert [int(read_image(tmp_path / "a.tif", page)[0, 0, 0]) for page in range(3)] == [10, 20, 30]
    assert read_image(tmp_path / "a.tif")[0, 0, 0] == 10
    assert "found 3 page(s); choose a page from 0 to 2" in problem(tmp_path / "a.tif", 3)
    assert "page -1" in problem(tmp_path / "a.tif", -1)


def test_what_is_no_image_file_is_told(tmp_path: Path) -> None:
    assert "No such file" in problem(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    assert "a folder" in problem(tmp_path / "folder.png")
    (tmp_path / "empty.png").touch()
    assert "0 bytes" in problem(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not an image")
    assert "b'not an i'" in problem(tmp_path / "text.png")
    Image.new("L", (2, 2)).save(tmp_path / "other.gif")
    assert "b'GIF8" in problem(tmp_path / "other.gif")


@pytest.mark.parametrize(
    ("name", "kind"), [("a.dcm", "DICOM"), ("a.DCM", "DICOM"), ("a.nii", "NIfTI"), ("a.b.nii.gz", "NIfTI")]
)
def test_other_medical_formats_are_named(tmp_path: Path, name: str, kind: str) -> None:
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
    monkeypatch.setattr(images, "_to_rgb", None)
    assert "expected at most 40 pixels, found 8 x 6; crop it" in problem(tmp_path / "a.png")


def test_pillows_own_limit_is_told_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "crop it or scale it down" in problem(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow warns of damaged tags
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["png", "jpg", "tif"]), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1)
)
def test_damaged_bytes_are_read_or_told_but_never_crash(
    tmp_path: Path, suffix: str, damage: list[tuple[float, int]]
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP).save(path)
    content = bytearray(path.read_bytes())
    for place, value in damage:
        content[int(place * len(content))] = value
    path.write_bytes(content)
    try:
        assert read_image(path).shape[2] == 3
    except InputError as error:
        assert str(path) in str(error)
