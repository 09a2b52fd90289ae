"""The card of an exported data set: the README.md that a dataset hub shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from data_gen.publishing.splits import PAPER_COUNTS, SPLITS
from data_gen.publishing.summary import SA_MED2D_LICENCE
from medisee.sources.mlmr_sd import HUB_NAMES

_AUTHORS = {
    "offline": "> **Made by the offline author.** No language model wrote these questions and answers: they are composed "
    "from a curated knowledge file and from the positions of the boxes, through the same checks as a model's. They "
    "are good for trying things out, not for results.",
    "models": "Questions and answers were written by the models below and checked by rules.",
    "models and offline": "> **Made in part by the offline author**: some questions and answers were composed from a "
    "curated knowledge file and from the positions of the boxes, not written by a language model (column `author`).",
}
_OUTCOMES = {
    "unscreened": "not judged by a person",
    "accepted": "accepted",
    "edited": "edited",
    "rejected": "rejected, left out",
    "disagreed": "edited differently by two reviewers, left out",
    "cut": "turn of a conversation of which another turn was left out, left out",
    "repeated": "asks the same as another pair of the image, left out",
}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def card(summary: dict[str, Any]) -> str:
    """Returns the README.md of a data set, from its summary (`data_gen.publishing.summary.summary`)."""
    counts = summary["counts"]
    columns = ("images", "cases", "categories", "pairs", "attribute", "location", "short", "long", "conversations")
    models = [(stage, ", ".join(f"`{model}`" for model in listed)) for stage, listed in summary["models"].items()]
    dropped = [(f"`{one['rule']}`", one["count"], f"{one['share']:.2%}") for one in summary["dropped"]]
    parts = [
        f"---\n{yaml.safe_dump(_front(summary), sort_keys=False)}---",
        "# MLMR-SD, made anew",
        "Images of medical objects with masks, boxes, and implicit questions that a model must reason about to find the "
        "object, each with an explanatory answer: a data set in the form of MLMR-SD (*MediSee: Reasoning-based "
        "Pixel-level Perception in Medical Images*, arXiv 2504.11008), made by `data_gen`. The paper's own data set was "
        "not published; this one shares no text with it. Research use only, not for medical decisions.",
        _AUTHORS[summary["author"]],
        "## Contents",
        markdown_table(("split", *columns), [(split, *(counts[split][name] for name in columns)) for split in SPLITS]),
        "Cases (patients or volumes) are never cut between splits. The paper has "
        + " / ".join(f"{PAPER_COUNTS[split]:,}" for split in SPLITS)
        + " images; where there are fewer, the splits have these proportions as near as whole cases allow. Keep the "
        "cases of validation and test out of everything else that you train on.",
        "Each row is one image with one target: `id`, `target`, `image`, `mask`, `category`, `box` (x0, y0, x1, y1 in "
        "pixels, half-open), `modality`, `source`, `case`, and `qa`: question, answer, perspective (attribute or "
        "location), length (short or long), template, conversation and turn, author, screening.",
        "## How it was made",
        markdown_table(("stage", "models"), models) if models else "No request to a model is on record.",
        *(
            (
                "What the rules dropped for good, after all attempts:",
                markdown_table(("rule", "dropped", "of all"), dropped),
            )
            if dropped
            else ("The rules dropped nothing.",)
        ),
        "## Screening by people",
        *_screening(summary["screening"]),
        "## Sources and licences",
        markdown_table(
            ("images from", "licence", "images"),
            [
                (f"[{one['name']}]({one['url']})" if one["url"] else one["name"], one["licence"], one["images"])
                for one in summary["sources"]
            ],
        ),
        "The terms of the images apply, and for the texts those of the models that wrote them.",
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown; integers have thousands separators."""
    lines = [head, ["---"] * len(head)]
    lines += [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def _front(summary: dict[str, Any]) -> dict[str, Any]:
    counts = summary["counts"]
    images = sum(one["images"] for one in counts.values())
    licences = {one["licence"] for one in summary["sources"]}
    files = [
        {"split": HUB_NAMES[split], "path": f"data/{HUB_NAMES[split]}-*.parquet"}
        for split in SPLITS
        if counts[split]["images"]
    ]
    return {
        "pretty_name": "MLMR-SD, made anew",
        "language": ["en"],
        "license": "cc-by-nc-sa-4.0" if licences == {SA_MED2D_LICENCE} else "other",
        "task_categories": ["image-segmentation", "visual-question-answering"],
        "tags": ["medical", "reasoning", *(["synthetic"] if summary["author"] != "models" else [])],
        "size_categories": [next((name for most, name in _SIZES if images < most), "n>1M")],
        "configs": [{"config_name": "default", "data_files": files}],
    }


def _screening(screening: dict[str, Any]) -> list[str]:
    parts = [
        f"{screening['judged']:,} of {screening['pairs']:,} pairs ({screening['share']:.1%}) were judged by "
        f"{screening['reviewers']} reviewer(s). One rejection takes a pair out; an edit goes before an accept.",
        markdown_table(("outcome", "pairs"), [(_OUTCOMES[name], n) for name, n in screening["outcomes"].items()]),
    ]
    agreement = [
        f"- {one['first']} and {one['second']}: {one['raw']:.1%} the same verdict on {one['pairs']:,} pairs, Cohen's kappa "
        + ("not defined" if one["kappa"] is None else f"{one['kappa']:.2f}")
        for one in screening["agreement"]
    ]
    return [*parts, "\n".join(agreement)] if agreement else parts
