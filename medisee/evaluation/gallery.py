"""A gallery of scored cases: one HTML page that contains its pictures and needs no script, network or other file."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from tqdm import tqdm

from medisee.evaluation.drawing import overlay
from medisee.evaluation.scoring import Results, Scored
from medisee.foundation.files import write_text
from medisee.records.images import read_image
from medisee.records.masks import decode_mask, mask_box

_SHOWN = 4

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
# Even if a text were not escaped, the browser would run and load nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_gallery(path: Path | str, results: Results, title: str) -> None:
    """Writes a page of one split's best, median and worst cases, atomically.

    The page contains the pictures themselves: share it only with those who may see them.
    """
    sections: dict[str, list[str]] = {}
    for section, one in tqdm(gallery_cases(results), desc="gallery"):
        sections.setdefault(section, []).append(_article(one, results))
    body = "\n".join(
        "\n".join(["<section>", f"<h2>{name}</h2>", '<div class="cases">', *articles, "</div>", "</section>"])
        for name, articles in sections.items()
    )
    page = f"""<!doctype html>
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
{body}
</body>
</html>
"""
    write_text(path, page)


def gallery_cases(results: Results) -> list[tuple[str, Scored]]:
    """Returns the best, median and worst cases by Dice, each once, of the written answers, else of the first mode."""
    ranked = sorted(results.modes[results.written or next(iter(results.modes))], key=lambda one: -one.score.dice)
    count = len(ranked)
    shown = min(_SHOWN, (count + 2) // 3)
    middle = (count - shown) // 2
    best, worst = ranked[:shown], ranked[max(shown, count - shown) :]
    median = ranked[max(shown, middle) : min(middle + shown, count - len(worst))]
    return [(name, one) for name, few in (("best", best), ("median", median), ("worst", worst)) for one in few]


def _article(one: Scored, results: Results) -> str:
    case, prediction, manifest = one.case, one.prediction, results.split.manifest
    truth = manifest.mask(case.record, case.target)
    picture = overlay(
        read_image(manifest.image_path(case.record)),
        decode_mask(prediction.mask) if prediction and prediction.mask else None,
        prediction.box if prediction else None,
        truth=truth,
        truth_box=case.target.box or mask_box(truth),
    )
    jpeg = io.BytesIO()
    # Full colour resolution: the lines of an overlay are two pixels wide and would fade.
    picture.save(jpeg, "JPEG", quality=90, subsampling=0)
    named = {None: "", True: ", names the target", False: ", does not name the target"}[one.named]
    facts = {
        "Truth": case.target.category,
        "Dice": f"{one.score.dice:.3f}",
        "Box IoU": f"{one.score.box_iou:.3f}",
        "Note": f"{prediction.mode}{named}" if prediction else "no prediction",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"""<article>
<img src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode("ascii")}" \
alt="{escape(f"Prediction and truth for: {case.target.category}")}">
<div class="words">
<p class="question">{escape(case.qa.question)}</p>
<p class="answer">{escape(prediction.text if prediction else "") or "(no answer)"}</p>
<dl>{rows}</dl>
</div>
</article>"""
