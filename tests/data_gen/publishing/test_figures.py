"""Figures: they are pictures, the same numbers give the same bytes, and odd numbers do not break them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_gen.publishing.figures import MOST_CATEGORIES, draw_figures
from data_gen.publishing.statistics import Statistics

SOME = Statistics(
    author="offline",
    images={"liver": 5, "left kidney": 2},
    pairs={"liver": 20, "left kidney": 7},
    cells={"attribute short": 9, "attribute long": 8, "location short": 6, "location long": 4},
    question_words={"short": {6: 3, 9: 12}, "long": {14: 12}},
    answer_words={15: 20, 17: 7},
    words={"which": 27, "organ": 20, "filters": 7},
    dropped={"words": 2},
    faults={"words": 9, "names_target": 4},
)


def test_figures_are_pictures_and_repeat_themselves(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    names = draw_figures(SOME, tmp_path / "a")
    assert len(names) == 6 and draw_figures(SOME, tmp_path / "b") == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        with Image.open(tmp_path / "a" / name) as image:
            assert min(image.size) > 200
            assert np.asarray(image.convert("L")).std() > 1


def test_what_has_no_numbers_is_left_out(tmp_path: Path) -> None:
    assert "dropped.png" not in draw_figures(replace(SOME, dropped={}, faults={}), tmp_path)


@pytest.mark.parametrize("count", [1, MOST_CATEGORIES + 9])
def test_one_category_and_too_many(tmp_path: Path, count: int) -> None:
    names = {f"structure {n}": 1 + n for n in range(count)}
    assert "frequency.png" in draw_figures(replace(SOME, images=names, pairs=names), tmp_path)


def test_a_cloud_of_stop_words_alone_is_still_drawn(tmp_path: Path) -> None:
    assert "cloud_questions.png" in draw_figures(replace(SOME, words={"which": 3, "the": 2}), tmp_path)
