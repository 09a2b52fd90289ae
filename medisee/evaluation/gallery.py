"""A gallery of predictions: one HTML page that holds its pictures and needs no script, no network and no other file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from medisee.foundation.files import write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryCase:
    """One answered query.

    Attributes:
        section: the heading it stands under, as "best", "median" or "worst".
        image: the picture, as `medisee.evaluation.drawing.overlay` makes it.
        question: the query as it was asked.
        answer: the system's text.
        category: the true class in plain words.
        dice: of the mask, 0 to 1; None or NaN when there is none.
        box_iou: of the box, 0 to 1; None or NaN when there is none.
        note: anything else in a few words, as the mode of the answer.
    """

    section: str
    image: Image.Image
    question: str
    answer: str
    category: str
    dice: float | None
    box_iou: float | None
    note: str = ""


_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.cases { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
article { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
img { display: block; width: 100%; height: auto; background: #fff; }
.words { padding: .75rem 1rem; overflow-wrap: anywhere; }
.words p { margin: 0 0 .6rem; white-space: pre-line; }
.question { font-weight: 600; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .15rem .75rem; margin: 0; padding: .6rem .75rem;
     background: var(--soft); border-radius: 6px; font-size: .9rem; }
dt { opacity: .7; } dd { margin: 0; font-variant-numeric: tabular-nums; }
"""
# Even if a text slipped through the escaping, the browser would run and load nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_gallery(path: Path | str, cases: Sequence[GalleryCase], title: str) -> None:
    """Writes the page atomically; sections stand in the order in which the cases name them first.

    The page contains the pictures themselves: share it only with those who may see them.

    Args:
        path: the HTML file.
        cases: what to show, in order.
        title: heading of the page.
    """
    sections = dict.fromkeys(case.section for case in cases)
    body = "\n".join(_section(name, [case for case in cases if case.section == name]) for name in sections)
    write_text(
        path,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body or "<p>There is no case to show.</p>"}
</body>
</html>
""",
    )


def _section(name: str, cases: Sequence[GalleryCase]) -> str:
    articles = "\n".join(map(_article, cases))
    return f'<section>\n<h2>{escape(name)}</h2>\n<div class="cases">\n{articles}\n</div>\n</section>'


def _article(case: GalleryCase) -> str:
    facts = {
        "Truth": case.category,
        "Dice": _score(case.dice),
        "Box IoU": _score(case.box_iou),
        **({"Note": case.note} if case.note else {}),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"""<article>
<img src="{_data_url(case.image)}" alt="{escape(f"Prediction and truth for: {case.category}")}">
<div class="words">
<p class="question">{escape(case.question)}</p>
<p class="answer">{escape(case.answer) or "(no answer)"}</p>
<dl>{rows}</dl>
</div>
</article>"""


def _score(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    # Full colour resolution: the lines of an overlay are two pixels wide and would fade.
    image.convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
