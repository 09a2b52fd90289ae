"""The card of an exported data set: the README.md that a dataset hub shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from data_gen.publishing.splits import PAPER_COUNTS, SPLITS
from data_gen.publishing.summary import SA_MED2D_LICENCE
from medisee.sources.mlmr_sd import HUB_NAMES

TEMPLATE = Path(__file__).with_name("card.txt")
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
    "unusable": "a refusal in words, or holds a special token, left out",
}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def card(summary: dict[str, Any]) -> str:
    """Returns the README.md of a data set, from its summary (`data_gen.publishing.summary.summary`)."""
    counts, screening = summary["counts"], summary["screening"]
    columns = ("images", "cases", "categories", "pairs", "attribute", "location", "short", "long", "conversations")
    models = [(stage, ", ".join(f"`{model}`" for model in listed)) for stage, listed in summary["models"].items()]
    dropped = [(f"`{one['rule']}`", one["count"], f"{one['share']:.2%}") for one in summary["dropped"]]
    drops = "What the rules dropped for good, after all attempts:\n\n"
    drops += markdown_table(("rule", "dropped", "of all"), dropped)
    outcomes = [(_OUTCOMES[name], count) for name, count in screening["outcomes"].items()]
    contents = [(split, *(counts[split][name] for name in columns)) for split in SPLITS]
    agreement = [
        f"- {one['first']} and {one['second']}: {one['raw']:.1%} the same verdict on {one['pairs']:,} pairs, Cohen's kappa "
        + ("not defined" if one["kappa"] is None else f"{one['kappa']:.2f}")
        for one in screening["agreement"]
    ]
    sources = [
        (f"[{one['name']}]({one['url']})" if one["url"] else one["name"], one["licence"], one["images"])
        for one in summary["sources"]
    ]
    return TEMPLATE.read_text(encoding="utf-8").format(
        front=yaml.safe_dump(_front(summary), sort_keys=False),
        author=_AUTHORS[summary["author"]],
        contents=markdown_table(("split", *columns), contents),
        paper=" / ".join(f"{PAPER_COUNTS[split]:,}" for split in SPLITS),
        models=markdown_table(("stage", "models"), models) if models else "No request to a model is on record.",
        dropped=drops if dropped else "The rules dropped nothing.",
        outcomes=markdown_table(("outcome", "pairs"), outcomes) + ("\n\n" + "\n".join(agreement) if agreement else ""),
        sources=markdown_table(("images from", "licence", "images"), sources),
        **{name: screening[name] for name in ("judged", "pairs", "share", "reviewers")},
    )


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
    names = [HUB_NAMES[split] for split in SPLITS if counts[split]["images"]]
    files = [{"split": name, "path": f"data/{name}-*.parquet"} for name in names]
    return {
        "pretty_name": "MLMR-SD, made anew",
        "language": ["en"],
        "license": "cc-by-nc-sa-4.0" if licences == {SA_MED2D_LICENCE} else "other",
        "task_categories": ["image-segmentation", "visual-question-answering"],
        "tags": ["medical", "reasoning", *(["synthetic"] if summary["author"] != "models" else [])],
        "size_categories": [next((name for most, name in _SIZES if images < most), "n>1M")],
        "configs": [{"config_name": "default", "data_files": files}],
    }
