from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import features

from medisee.evaluation import drawing
from medisee.evaluation.drawing import PREDICTION, TRUTH, overlay


def black(height: int = 64, width: int = 128) -> NDArray[np.uint8]:
    return np.zeros((height, width, 3), np.uint8)


def square(height: int = 64, width: int = 128) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), np.bool_)
    mask[16:32, 32:64] = True
    return mask


def is_color(pixels: NDArray[np.uint8], color: tuple[int, int, int]) -> NDArray[np.bool_]:
    return (pixels == color).all(axis=-1)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(64, 128, (512, 256)), (300, 200, (400, 600)), (512, 100, (384, 512)), (700, 900, (900, 700)), (1, 1, (512, 512))],
)
def test_a_small_image_is_enlarged_by_a_whole_number(height: int, width: int, expected: tuple[int, int]) -> None:
    picture = overlay(black(height, width))  # a narrow picture is widened, so that a legend has room
    assert picture.size == expected
    assert picture.mode == "RGB"


def test_the_mask_is_filled_half_transparent_inside_its_contour() -> None:
    pixels = np.asarray(overlay(black(), square()))[:256, :512]
    inside = pixels[64:128, 128:256]
    assert pixels.any(axis=-1).sum() == 64 * 128  # nothing outside of the mask, scaled by 4
    assert is_color(inside[:2], PREDICTION).all()
    assert is_color(inside[:, -2:], PREDICTION).all()
    assert not is_color(inside[2:-2, 2:-2], PREDICTION).any()
    assert 0 < inside[10, 10, 0] < PREDICTION[0]


def test_the_contour_closes_along_the_border_of_the_image() -> None:
    pixels = np.asarray(overlay(black(), np.ones((64, 128), np.bool_)))[:256]
    assert all(is_color(edge, PREDICTION).all() for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]))


def test_a_box_is_a_line_of_two_pixels_just_inside_it() -> None:
    pixels = np.asarray(overlay(black(), box=(10, 5, 20, 15)))[:256, :512]
    rows, columns = np.nonzero(pixels.any(axis=-1))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (40, 20, 80, 60)
    assert len(rows) == 40 * 40 - 36 * 36


def test_the_truth_is_dashed_and_shows_where_both_agree() -> None:
    pixels = np.asarray(overlay(black(), square(), truth=square()))[:256]
    contour = pixels[64:66, 128:256]
    assert 0.3 < is_color(contour, TRUTH).mean() < 0.7
    assert 0.3 < is_color(contour, PREDICTION).mean() < 0.7
    pixels = np.asarray(overlay(black(), truth_box=(32, 16, 64, 32)))[:256]
    assert 0.3 < is_color(pixels[64:66, 128:256], TRUTH).mean() < 0.7
    assert 0.3 < is_color(pixels[64:128, 128:130], TRUTH).mean() < 0.7


@pytest.mark.parametrize("box", [(-50, -50, 500, 500), (5, 5, 5, 5), (200, 100, 300, 200), (float("nan"), 0, 1, 1)])
def test_boxes_that_leave_the_image_or_have_no_area_do_no_harm(box: tuple[float, float, float, float]) -> None:
    assert overlay(black(), box=box).width == 512


def test_the_legend_names_only_what_is_drawn_and_grows_with_its_text() -> None:
    strip = np.asarray(overlay(black(), square()))[256:]
    assert is_color(strip, PREDICTION).any()
    assert not is_color(strip, TRUTH).any()
    strip = np.asarray(overlay(black(), truth=square()))[256:]
    assert is_color(strip, TRUTH).any()
    assert not is_color(strip, PREDICTION).any()
    one, two = overlay(black(), legend="a line"), overlay(black(), legend="a line\nand another")
    assert 256 < one.height < two.height
    assert overlay(black(), legend="word " * 200).height > two.height + 100
    assert overlay(black(), legend="x" * 500).height > two.height + 50  # a long word is broken


def test_the_font_knows_more_than_ascii() -> None:
    shapes = {np.asarray(overlay(black(), legend=letter)).tobytes() for letter in "é–α≥×"}
    assert len(shapes) == 5


def test_an_empty_mask_draws_nothing_and_the_input_is_not_changed() -> None:
    image = np.full((64, 128, 3), 90, np.uint8)
    pixels = np.asarray(overlay(image, np.zeros((64, 128), np.bool_)))
    assert (pixels[:256, :512] == 90).all()
    assert (image == 90).all()


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (np.zeros((4, 4), np.uint8), None, r"\(H, W, 3\) of uint8, got \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), None, "float32"),
        (np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4), np.bool_), r"size \(4, 6\), got \(6, 4\)"),
    ],
)
def test_wrong_arrays_are_refused(image: NDArray[np.uint8], mask: NDArray[np.bool_] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(image, mask)


ELSEWHERE = "(no font here has these letters; prediction.json has the words)"


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The system's fonts of a test, none at first."""
    found: list[str] = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found)
    drawing._font.cache_clear()
    yield found
    drawing._font.cache_clear()


def same(one: str, other: str) -> bool:
    return overlay(black(), legend=one).tobytes() == overlay(black(), legend=other).tobytes()


@pytest.mark.parametrize("words", ["肝脏在哪里?", "यकृत कहाँ है?", "ตับอยู่ที่ไหน", "Where is it \U0001fac1?"])
def test_words_that_no_font_has_are_told_to_be_elsewhere(fonts: list[str], words: str) -> None:
    assert same(words, ELSEWHERE)
    assert same(f"{words}\nThe liver makes bile.", f"{ELSEWHERE}\nThe liver makes bile.")


def test_words_of_one_font_are_drawn(fonts: list[str]) -> None:
    assert not same("α–γ, é, ж \U0001f600\u200d", ELSEWHERE)
    assert same("α\u200e", "α")  # a mark that shows nothing


def test_a_font_of_the_system_that_has_the_letters_is_used(fonts: list[str], tmp_path: Path) -> None:
    """STIX is not installed as a font of the system; it has letters that the usual font lacks."""
    letter = "\u24b6"
    assert same(letter, ELSEWHERE)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts += [str(tmp_path / "broken.ttf"), *map(str, folder.glob("STIX*.ttf"))]
    drawing._font.cache_clear()
    assert not same(letter, ELSEWHERE)
    ink = np.asarray(overlay(black(), legend=letter))[256:].min(axis=-1) < 100
    assert 5 < ink.sum() < 400


def test_scripts_from_right_to_left_need_their_library(fonts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hebrew = "כבד"
    if features.check("raqm"):
        assert not same(hebrew, ELSEWHERE)
        assert not same(hebrew, hebrew[::-1])
        ink = np.asarray(overlay(black(), legend="ל."))[256:, :, 0] < 100
        assert ink[:, np.flatnonzero(ink.any(axis=0))[0]].sum() <= 2  # the full stop is at the left
    drawing._font.cache_clear()
    monkeypatch.setattr(features, "check", lambda _: False)
    assert same(hebrew, ELSEWHERE)
    assert same("أين الكبد؟", ELSEWHERE)
    assert not same("liver", ELSEWHERE)
