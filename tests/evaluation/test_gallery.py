from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from medisee.evaluation.gallery import GalleryCase, write_gallery


def case(section: str = "best", **changes: object) -> GalleryCase:
    values = {
        "section": section,
        "image": Image.new("RGB", (40, 30), (10, 200, 30)),
        "question": "Which organ makes bile?",
        "answer": "It is [SEG] and [BBOX].",
        "category": "liver",
        "dice": 0.81234,
        "box_iou": 0.5,
        "note": "generated",
    }
    return GalleryCase(**{**values, **changes})  # type: ignore[arg-type]


def page(path: Path, *cases: GalleryCase, title: str = "Held-out cases") -> str:
    write_gallery(path, cases, title)
    return path.read_text(encoding="utf-8")


def test_a_case_shows_its_words_and_scores(tmp_path: Path) -> None:
    html = page(tmp_path / "gallery.html", case())
    for text in ("Held-out cases", "Which organ makes bile?", "It is [SEG] and [BBOX].", "liver", "generated"):
        assert text in html
    assert "<dt>Dice</dt><dd>0.812</dd>" in html
    assert "<dt>Box IoU</dt><dd>0.500</dd>" in html


def test_missing_scores_and_words_are_said(tmp_path: Path) -> None:
    html = page(tmp_path / "gallery.html", case(dice=None, box_iou=float("nan"), answer="", note=""))
    assert html.count("<dd>–</dd>") == 2
    assert "(no answer)" in html
    assert "<dt>Note</dt>" not in html
    assert "no case to show" in page(tmp_path / "none.html")


def test_sections_stand_in_the_order_of_the_cases(tmp_path: Path) -> None:
    html = page(tmp_path / "gallery.html", case("worst"), case("best"), case("worst", category="spleen"))
    assert re.findall("<h2>(.*?)</h2>", html) == ["worst", "best"]
    assert html.index("spleen") < html.index("<h2>best</h2>")
    assert html.count("<article>") == 3


def test_the_picture_is_in_the_page(tmp_path: Path) -> None:
    html = page(tmp_path / "gallery.html", case())
    (encoded,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert picture.size == (40, 30)
    assert np.abs(np.asarray(picture).astype(int) - (10, 200, 30)).max() <= 4


def test_all_texts_are_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=y>&'
    texts = dict.fromkeys(("question", "answer", "category", "note"), evil)
    html = page(tmp_path / "gallery.html", case(evil, **texts), title=evil)
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Reader().feed(html)
    assert "script" not in {tag for tag, _ in tags}
    assert [set(attributes) for tag, attributes in tags if tag == "img"] == [{"src", "alt"}]


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    html = page(tmp_path / "gallery.html", case())
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|<link|<script|@import|url\(", html)
