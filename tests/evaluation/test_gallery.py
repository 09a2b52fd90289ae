"""The gallery: which cases it shows, what it says of them, and that its page is safe and complete."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medisee.evaluation.drawing import overlay
from medisee.evaluation.gallery import gallery_cases, write_gallery
from medisee.evaluation.metrics import Score
from medisee.evaluation.scoring import Case, Results, Scored, Split
from medisee.records.images import read_image
from medisee.records.manifest import Manifest
from medisee.records.masks import encode_mask, mask_box
from medisee.records.records import Prediction


@pytest.fixture
def manifest(tiny_manifest: Path) -> Manifest:
    return Manifest(tiny_manifest)


@pytest.fixture
def cases(manifest: Manifest) -> list[Case]:
    return [Case(record, target, qa) for record in manifest for target in record.targets for qa in target.qa]


def scored(case: Case, dice: float, *, named: bool | None = True, text: str = "It is [SEG] and [BBOX].") -> Scored:
    ids = {"record": case.record.id, "target": case.target.id, "question": case.qa.question}
    prediction = Prediction(**ids, text=text, emitted=True)  # pyright: ignore[reportArgumentType]
    return Scored(case=case, prediction=prediction, score=Score(dice, dice, 100 * dice, 100, 0.5), named=named)


def results(manifest: Manifest, generated: list[Scored]) -> Results:
    return Results(split=Split(manifest, {}, ()), modes={"generated": generated}, written="generated", references={})


def page(path: Path, manifest: Manifest, *generated: Scored, title: str = "Held-out cases") -> str:
    write_gallery(path, results(manifest, list(generated)), title)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"best": 1}),
        (2, {"best": 1, "worst": 1}),
        (3, {"best": 1, "median": 1, "worst": 1}),
        (5, {"best": 2, "median": 1, "worst": 2}),
        (12, {"best": 4, "median": 4, "worst": 4}),
        (16, {"best": 4, "median": 4, "worst": 4}),
    ],
)
def test_the_gallery_shows_best_median_and_worst_once(
    manifest: Manifest, cases: list[Case], count: int, expected: dict[str, int]
) -> None:
    shown = gallery_cases(results(manifest, [scored(case, i / 16) for i, case in enumerate(cases[:count])]))
    sections = [section for section, _ in shown]
    assert {section: sections.count(section) for section in dict.fromkeys(sections)} == expected
    dice = [one.score.dice for _, one in shown]
    assert dice == sorted(set(dice), reverse=True)
    assert max(dice) == (count - 1) / 16 and (count == 1 or min(dice) == 0)
    if count == 16:
        assert [one for one in dice if 4 <= 16 * one < 12] == [9 / 16, 8 / 16, 7 / 16, 6 / 16]


def test_notes_say_mode_and_name(tmp_path: Path, manifest: Manifest, cases: list[Case]) -> None:
    three = [scored(cases[0], 0.9), scored(cases[1], 0.5, named=False), scored(cases[2], 0.1, named=None)]
    three[2] = replace(three[2], prediction=None)
    html = page(tmp_path / "gallery.html", manifest, *three)
    notes = re.findall("<dt>Note</dt><dd>(.*?)</dd>", html)
    assert notes == ["generated, names the target", "generated, does not name the target", "no prediction"]
    assert html.count("(no answer)") == 1


def test_a_case_shows_its_words_and_scores(tmp_path: Path, manifest: Manifest, cases: list[Case]) -> None:
    html = page(tmp_path / "gallery.html", manifest, scored(cases[0], 0.81234))
    for text in ("Held-out cases", "Which organ makes bile?", "It is [SEG] and [BBOX].", "liver", "generated"):
        assert text in html
    assert "<dt>Dice</dt><dd>0.812</dd>" in html
    assert "<dt>Box IoU</dt><dd>0.500</dd>" in html


def test_sections_are_in_the_order_best_median_worst(tmp_path: Path, manifest: Manifest, cases: list[Case]) -> None:
    html = page(tmp_path / "gallery.html", manifest, *(scored(case, i / 16) for i, case in enumerate(cases)))
    assert re.findall("<h2>(.*?)</h2>", html) == ["best", "median", "worst"]
    assert html.count("<article>") == 12


def test_the_picture_is_in_the_page(tmp_path: Path, manifest: Manifest, cases: list[Case]) -> None:
    one = scored(cases[0], 0.5)
    truth = manifest.mask(cases[0].record, cases[0].target)
    assert one.prediction is not None
    one = replace(one, prediction=replace(one.prediction, mask=encode_mask(~truth), box=(1.0, 2.0, 30.0, 40.0)))
    html = page(tmp_path / "gallery.html", manifest, one)
    (encoded,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).astype(int)
    image = read_image(manifest.image_path(cases[0].record))
    expected = np.asarray(overlay(image, ~truth, (1, 2, 30, 40), truth=truth, truth_box=mask_box(truth)))
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 3


def test_all_texts_are_escaped(tmp_path: Path, manifest: Manifest, cases: list[Case]) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=y>&'
    case = replace(cases[0], target=replace(cases[0].target, category=evil), qa=replace(cases[0].qa, question=evil))
    one = scored(case, 0.5, text=evil)
    assert one.prediction is not None
    one = replace(one, prediction=replace(one.prediction, mode=evil))
    html = page(tmp_path / "gallery.html", manifest, one, title=evil)
    assert html.count("onerror") == 7
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Reader().feed(html)
    assert "script" not in {tag for tag, _ in tags}
    assert [set(attributes) for tag, attributes in tags if tag == "img"] == [{"src", "alt"}]


def test_the_page_needs_nothing_from_outside(tmp_path: Path, manifest: Manifest, cases: list[Case]) -> None:
    html = page(tmp_path / "gallery.html", manifest, scored(cases[0], 0.5))
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|<link|<script|@import|url\(", html)
