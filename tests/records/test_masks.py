"""Mask images, COCO's forms of a mask, and boxes around masks."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from picture_files import TURNS, png, tiff
from PIL import Image
from pycocotools import mask as coco
from pydantic import TypeAdapter, ValidationError
from test_images import FILES, mutated

from medisee.foundation.errors import InputError
from medisee.records.masks import (
    Rle,
    SoundRle,
    check_rle,
    decode_mask,
    encode_mask,
    mask_box,
    read_label_map,
    read_mask,
)

masks = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=24))


@given(masks)
def test_rle_round_trip(mask: np.ndarray) -> None:
    rle = encode_mask(mask)
    decoded = decode_mask(rle)
    assert rle.size == mask.shape
    assert decoded.dtype == np.bool_ and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, mask)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
@given(masks)
def test_pycocotools_decodes_the_same(mask: np.ndarray) -> None:
    rle = encode_mask(mask)
    theirs = coco.decode({"size": list(rle.size), "counts": rle.counts.encode()})
    np.testing.assert_array_equal(theirs.astype(bool), decode_mask(rle))


@given(st.integers(1, 3000), st.lists(st.integers(0, 3000), min_size=1, max_size=6))
def test_long_runs_round_trip(height: int, rows: list[int]) -> None:
    """Long runs need several characters a number, and differences to earlier runs have both signs."""
    mask = np.zeros((height, 3), dtype=bool)
    for index, row in enumerate(rows):
        mask[row % height :, index % 3] ^= True
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)


def test_encoding_is_cocos() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 2] = True
    rle = encode_mask(mask)
    assert coco.area({"size": list(rle.size), "counts": rle.counts.encode()}) == 2
    assert encode_mask(np.ones((4, 5), dtype=bool)).counts == "0d0"


@given(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.text(max_size=12))
def test_any_string_decodes_or_is_refused(size: tuple[int, int], counts: str) -> None:
    """pycocotools alone would return uninitialised pixels for many of these."""
    try:
        mask = decode_mask(Rle(size, counts))
    except InputError as error:
        assert "RLE" in str(error) and "expected" in str(error)
    else:
        assert mask.shape == size


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        (Rle((4, 4), ""), "do not decode"),
        (Rle((4, 4), "zzzz"), "do not decode"),
        (Rle((4, 4), "é"), "do not decode"),
        (Rle((4, 4), "P"), "do not decode"),
        (Rle((4, 4), "PPPPPPPPPP0"), "do not decode"),
        (Rle((4, 4), "0"), "cover 0 pixels; expected 4 x 4 = 16"),
        (Rle((0, 4), "0"), "size [0, 4] is wrong"),
        (Rle((10**6, 10**6), "0"), "size [1000000, 1000000] is wrong"),
    ],
)
def test_bad_rle_is_refused(rle: Rle, message: str) -> None:
    with pytest.raises(InputError, match="RLE") as caught:
        check_rle(rle)
    assert message in str(caught.value)


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((1, 2, 2), bool), np.zeros((0, 2), bool)])
def test_only_a_boolean_plane_is_encoded(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="boolean array"):
        encode_mask(array)


def test_box_is_half_open() -> None:
    mask = np.zeros((10, 8), dtype=bool)
    assert mask_box(mask) is None
    mask[4, 3] = True
    assert mask_box(mask) == (3, 4, 4, 5)
    assert mask_box(np.ones((10, 8), dtype=bool)) == (0, 0, 8, 10)


@given(masks)
def test_box_is_the_smallest(mask: np.ndarray) -> None:
    box = mask_box(mask)
    if box is None:
        assert not mask.any()
        return
    x0, y0, x1, y1 = map(int, box)
    inner = mask[y0:y1, x0:x1]
    assert inner.sum() == mask.sum()
    assert inner[0].any() and inner[-1].any() and inner[:, 0].any() and inner[:, -1].any()


def disc(height: int = 48, width: int = 64) -> np.ndarray:
    rows, columns = np.ogrid[:height, :width]
    return (rows - 20) ** 2 + (columns - 30) ** 2 < 139


DISC = disc()


def read(path: Path, value: int | None = None) -> np.ndarray:
    return read_mask(path, f"mask {path.name!r}", None, value)


def refusal(path: Path, value: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read(path, value)
    (message,) = caught.value.problems
    assert f"mask {path.name!r}" in message
    return message


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_mask_is_cut_at_half(
    tmp_path: Path, quality: int, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = Image.fromarray(DISC).convert("RGB").convert(mode)
    picture.save(tmp_path / "m.jpg", quality=quality)
    with Image.open(tmp_path / "m.jpg") as saved:
        assert np.count_nonzero(np.asarray(saved.convert("L"))) > 500  # "> 0" would take the noise at the rim too
    np.testing.assert_array_equal(read(tmp_path / "m.jpg"), DISC)
    read(tmp_path / "m.jpg")
    assert capsys.readouterr().err.count("JPEG masks are cut at half") == 1


def test_a_smoothed_jpeg_mask_keeps_its_thin_parts(tmp_path: Path) -> None:
    """A mask that was scaled before it became a JPEG has a rim of two pixels, and strips that are not white."""
    pixels = np.asarray(
        Image.fromarray(DISC.astype(np.uint8) * 255).resize((128, 96), Image.Resampling.BILINEAR)
    ).copy()
    pixels[40:43, 0] = 180
    Image.fromarray(pixels).save(tmp_path / "m.jpg", quality=90)
    mask = read(tmp_path / "m.jpg")
    assert np.count_nonzero(mask != (pixels > 127)) <= 4
    assert mask[41, 0]


@pytest.mark.parametrize("other", [40, 90, 128, 170])
def test_a_jpeg_label_map_is_refused(tmp_path: Path, other: int) -> None:
    pixels = DISC.astype(np.uint8) * 255
    pixels[35:44, 5:20] = other if other != 40 else 0
    Image.fromarray(pixels if other != 40 else DISC.astype(np.uint8) * 40).save(tmp_path / "m.jpg", quality=95)
    assert "JPEG values are not those of one bright object" in refusal(tmp_path / "m.jpg")


def test_a_jpeg_of_two_colours_is_refused(tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[DISC, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "red.jpg", quality=95, subsampling=0)
    np.testing.assert_array_equal(read(tmp_path / "red.jpg"), DISC)
    pixels[35:44, 5:20, 1] = 255
    Image.fromarray(pixels).save(tmp_path / "m.jpg", quality=95, subsampling=0)
    assert "not those of one bright object" in refusal(tmp_path / "m.jpg")
    assert "in colour or with inexact values" in refusal(tmp_path / "red.jpg", 1)


def test_a_jpeg_in_a_tiff_is_a_jpeg(tmp_path: Path) -> None:
    Image.fromarray(DISC.astype(np.uint8) * 255).save(tmp_path / "m.tif", compression="jpeg", quality=60)
    np.testing.assert_array_equal(read(tmp_path / "m.tif"), DISC)


@pytest.mark.parametrize("value", [1, 2, 128, 255])
@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
def test_a_mask_of_any_two_values(tmp_path: Path, value: int, suffix: str) -> None:
    Image.fromarray(DISC.astype(np.uint8) * np.uint8(value)).save(tmp_path / f"m.{suffix}")
    np.testing.assert_array_equal(read(tmp_path / f"m.{suffix}"), DISC)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.int32, np.float32, np.int8])
def test_a_deep_mask(tmp_path: Path, dtype: type) -> None:
    (tmp_path / "m.tif").write_bytes(tiff((DISC * 3).astype(dtype)[..., None]))
    np.testing.assert_array_equal(read(tmp_path / "m.tif"), DISC)
    np.testing.assert_array_equal(read(tmp_path / "m.tif", 3), DISC)
    (tmp_path / "m.tif").write_bytes(tiff((DISC + disc().T.repeat(2, axis=1)[:48, :64] * 2).astype(dtype)[..., None]))
    assert "found 4: 0, 1, 2, 3;" in refusal(tmp_path / "m.tif")


def test_deep_colours_differ_in_their_low_bytes(tmp_path: Path) -> None:
    labels = np.zeros((48, 64, 3), np.uint16)
    labels[DISC] = 1
    (tmp_path / "m.png").write_bytes(png(labels))
    np.testing.assert_array_equal(read(tmp_path / "m.png"), DISC)
    labels[35:44, 5:20] = 2
    (tmp_path / "m.png").write_bytes(png(labels))
    assert "found 3: 0, 1, 2;" in refusal(tmp_path / "m.png")
    np.testing.assert_array_equal(read(tmp_path / "m.png", 1), DISC)


def test_white_is_zero(tmp_path: Path) -> None:
    (tmp_path / "m.tif").write_bytes(tiff((~DISC * np.uint16(65535))[..., None], photometric=0))
    np.testing.assert_array_equal(read(tmp_path / "m.tif"), DISC)


def test_smoothing_is_refused(tmp_path: Path) -> None:
    big = Image.fromarray(DISC.astype(np.uint8) * 255).resize((200, 150), Image.Resampling.BILINEAR)
    big.save(tmp_path / "m.png")
    message = refusal(tmp_path / "m.png")
    assert ", ...; save a mask per object" in message
    assert "without smoothing" in message


def test_colours(tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[DISC] = 200, 30, 90
    Image.fromarray(pixels).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read(tmp_path / "m.png"), DISC)
    assert "in colour or with inexact values" in refusal(tmp_path / "m.png", 200)
    pixels[40:, :9] = 30, 200, 90
    Image.fromarray(pixels).save(tmp_path / "m.png")
    assert "found 3: 0/0/0, 30/200/90, 200/30/90; " in refusal(tmp_path / "m.png")


def test_palettes_and_alpha_that_contradict_the_values(tmp_path: Path) -> None:
    picture = Image.fromarray((~DISC).astype(np.uint8))
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(tmp_path / "m.png")
    assert "palette shows 0 bright and the other value black" in refusal(tmp_path / "m.png")
    picture = Image.fromarray(DISC.astype(np.uint8))
    picture.putpalette([255, 255, 255, 200, 0, 0])
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read(tmp_path / "m.png"), DISC)
    rgba = np.full((48, 64, 4), 255, np.uint8)
    Image.fromarray(rgba).save(tmp_path / "m.png")
    assert read(tmp_path / "m.png").all()
    rgba[..., 3] = DISC * 255
    Image.fromarray(rgba).save(tmp_path / "m.png")
    assert "differs in its transparency only" in refusal(tmp_path / "m.png")
    rgba[~DISC, :3] = 0
    Image.fromarray(rgba).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read(tmp_path / "m.png"), DISC)


@pytest.mark.parametrize("tag", TURNS)
def test_a_turned_mask(tmp_path: Path, tag: int) -> None:
    stored = DISC.astype(np.uint8)[..., None]
    for name, content in {
        "a.png": png(stored, tag),
        "b.png": png(stored, tag, late_tag=True),
        "c.tif": tiff(stored, tag),
    }.items():
        (tmp_path / name).write_bytes(content)
        expected = TURNS[tag](DISC)
        np.testing.assert_array_equal(read_mask(tmp_path / name, "m", expected.shape), expected)


def test_pages_of_a_mask_are_refused(tmp_path: Path) -> None:
    pages = [Image.fromarray(page) for page in (DISC, ~DISC)]
    for name in ("m.tif", "m.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert "found 2 pages" in refusal(tmp_path / name)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged tags
def test_a_damaged_mask_file_is_read_or_told(tmp_path: Path) -> None:
    rng = random.Random(8)
    stored = DISC.astype(np.uint8)[..., None] * np.uint8(255)
    originals = [png(stored), tiff(stored), tiff(stored, deflated=True), *FILES["jpeg"][:1]]
    path, read_well = tmp_path / "m", 0
    for number in range(200):
        path.write_bytes(mutated(originals[number % 4], rng))
        try:
            mask = read(path)
        except InputError as error:
            assert len(error.problems) == 1 and "mask 'm'" in str(error)
            continue
        read_well += 1
        assert mask.dtype == np.bool_ and mask.ndim == 2
        if number % 4 == 0 and mask.shape == DISC.shape:  # a PNG, whose checksums are looked at
            np.testing.assert_array_equal(mask, DISC)
    assert 0 < read_well < 200


FORMS = TypeAdapter(SoundRle)


@given(masks)
def test_integer_counts(mask: np.ndarray) -> None:
    flat, counts, foreground = mask.T.ravel(), [0], False
    for pixel in flat:
        if pixel != foreground:
            counts.append(0)
            foreground = pixel
        counts[-1] += 1
    assert FORMS.validate_python({"size": list(mask.shape), "counts": counts}) == encode_mask(mask)
    padded = [*counts, 0] if len(counts) % 2 else counts
    np.testing.assert_array_equal(
        decode_mask(FORMS.validate_python({"size": list(mask.shape), "counts": padded})), mask
    )


def test_polygons_as_coco_draws_them() -> None:
    square, triangle = [2, 1, 6, 1, 6, 5, 2, 5], [7.5, 0, 9.5, 0, 7.5, 3.5]
    rle = FORMS.validate_python({"size": [6, 10], "segmentation": [square, triangle]})
    expected = np.zeros((6, 10), bool)
    expected[1:5, 2:6] = True
    drawn = decode_mask(rle)
    np.testing.assert_array_equal(drawn[:, :7], expected[:, :7])
    theirs: Any = coco.merge(coco.frPyObjects([square, triangle], 6, 10))  # pyright: ignore
    np.testing.assert_array_equal(drawn, coco.decode(theirs).astype(bool))
    assert drawn[:, 7:].any()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1, 4, 1, 4, 4]], 'write polygons as {"size"'),
        ({"segmentation": [[1, 1, 4, 1, 4, 4]]}, '"size": [height, width]'),
        ({"size": [6, 8.5], "segmentation": [[1, 1, 4, 1, 4, 4]]}, '"size": [height, width]'),
        ({"size": [6, 2**16], "segmentation": [[1, 1, 4, 1, 4, 4]]}, '"size": [height, width]'),
        ({"size": [6, 8], "segmentation": []}, "three points or more"),
        ({"size": [6, 8], "segmentation": [[1, 1, 4, 4]]}, "three points or more"),  # a box to pycocotools
        ({"size": [6, 8], "segmentation": [[1, 1, 4, 4, 5]]}, "three points or more"),
        ({"size": [6, 8], "segmentation": [1, 1, 4, 1, 4, 4]}, "three points or more"),
        ({"size": [6, 8], "segmentation": [[1, 1, 4, 1, 4, "4"]]}, "three points or more"),
        ({"size": [6, 8], "segmentation": [[1, 1, 4, 1, 4, True]]}, "three points or more"),
        ({"size": [6, 8], "segmentation": [[1, 1, 9, 1, 4, 4]]}, "0 <= x <= 8 and 0 <= y <= 6"),
        ({"size": [6, 8], "segmentation": [[1, 1, 4, -1, 4, 4]]}, "0 <= x <= 8 and 0 <= y <= 6"),
        ({"size": [6, 65535], "segmentation": [[0, 0, 65535, 6] * 99]}, "outlines of at most"),
        ({"size": [2, 2], "counts": [1, -1, 4]}, "whole numbers, 0 or more"),
        ({"size": [2, 2], "counts": [1, 1.0, 2]}, "whole numbers, 0 or more"),
        ({"size": [2, 2], "counts": [True, 3]}, "whole numbers, 0 or more"),
        ({"size": [2, 2], "counts": [2**32 + 1, 3]}, "whole numbers, 0 or more"),
        ({"size": [2, 2], "counts": [1, 2]}, "cover 3 pixels; expected 2 x 2 = 4"),
        ({"size": [2, 2], "counts": []}, "whole numbers, 0 or more"),
        ({"size": [2], "counts": [4]}, "size"),
        ({"size": [2, "2"], "counts": [4]}, "valid integer"),
        ({"counts": [4]}, "size"),
        ({"size": [2, 2], "counts": "b'04'"}, "RLE counts do not decode"),
    ],
    ids=str,
)
def test_a_wrong_form_is_told(mask: Any, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FORMS.validate_python(mask)
    assert words in str(caught.value)


def test_a_mutated_string_decodes_as_cocos_or_is_told() -> None:
    """What is taken covers exactly its pixels, and then pycocotools agrees."""
    rng = random.Random(9)
    good = encode_mask(DISC).counts
    taken = 0
    for _ in range(200):
        counts = list(good)
        for _ in range(rng.choice([1, 1, 2, 3])):
            place = rng.randrange(len(counts))
            match rng.choice(["change", "omit", "double", "cut", "swap"]):
                case "change":
                    counts[place] = chr(rng.randrange(33, 127))
                case "omit":
                    del counts[place]
                case "double":
                    counts.insert(place, counts[place])
                case "cut":
                    del counts[max(place, 1) :]
                case "swap":
                    counts[place], counts[0] = counts[0], counts[place]
        try:
            mask = decode_mask(Rle(DISC.shape, "".join(counts)))
        except InputError as error:
            assert "RLE counts" in str(error)
            continue
        taken += 1
        theirs: Any = {"size": list(DISC.shape), "counts": "".join(counts).encode()}
        np.testing.assert_array_equal(mask, coco.decode(theirs).astype(bool))
    assert taken < 100


def _small_png(values: NDArray[np.uint8], bits: int) -> bytes:
    """Writes a grey PNG of few bits by hand: Pillow only writes 1 and 8."""

    def block(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    height, width = values.shape
    bytes_of_rows = (
        np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes() for row in values
    )
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    pixels = zlib.compress(b"".join(b"\0" + row for row in bytes_of_rows))
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", head) + block(b"IDAT", pixels) + block(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_maps_of_few_bits_have_the_values_that_were_saved(tmp_path: Path, bits: int) -> None:
    labels = np.random.default_rng(bits).integers(0, min(2**bits, 7), (9, 13), dtype=np.uint8)
    (tmp_path / "m.png").write_bytes(_small_png(labels, bits))
    for value in np.unique(labels[labels > 0]).tolist():
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png", "m", None, value), labels == value)
    np.testing.assert_array_equal(read_label_map(tmp_path / "m.png", "m", None), labels)


def test_a_one_bit_tiff_has_the_value_one(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((9, 13)) > 0.5
    Image.fromarray(mask).save(tmp_path / "m.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.tif", "m", None, 1), mask)


@pytest.mark.parametrize(
    ("ending", "options"), [("gif", {}), ("webp", {"quality": 50}), ("jp2", {"irreversible": True})]
)
def test_label_maps_in_inexact_formats_are_refused(tmp_path: Path, ending: str, options: dict[str, Any]) -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[5:20, 5:20], labels[20:35, 20:35] = 2, 5
    Image.fromarray(labels).save(tmp_path / f"m.{ending}", **options)
    with pytest.raises(InputError, match="save the label map as a grey PNG"):
        read_mask(tmp_path / f"m.{ending}", "m", None, 2)
