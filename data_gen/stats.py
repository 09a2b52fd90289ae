"""Draws the statistics of a data set: the paper's Figure 4, lengths, perspectives, and what the rules dropped. Run it as

  python -m data_gen stats --ledger data/mlmr_sd/ledger.sqlite --out data/mlmr_sd/stats
  python -m data_gen stats --export data/mlmr_sd/export --out data/mlmr_sd/stats

Writes into OUT (which must be new, empty or earlier statistics):
  cloud_categories.png, frequency.png    Figure 4 (a) and (b): question-answer pairs, and images, of each category
  cloud_questions.png, lengths.png       the words of the questions; how many words questions and answers have
  perspectives.png, dropped.png          pairs of each perspective and length; what each rule objected to and dropped
  stats.json, stats.md                   the numbers
From a ledger they include tokens and prices, and what the rules objected to before an answer was corrected.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from data_gen.core.schemas import reasons
from data_gen.export import SUMMARY
from data_gen.ledger.ledger import Ledger
from data_gen.publishing.card import markdown_table
from data_gen.publishing.figures import draw_figures
from data_gen.publishing.statistics import Statistics, balance, statistics_of_export, statistics_of_ledger
from medisee.foundation.command_line import a_path, parse_words
from medisee.foundation.errors import InputError
from medisee.foundation.files import write_json, write_text
from medisee.foundation.json_files import read_json
from medisee.foundation.output import Result, replaced_folder

STATS = "stats.json"
_FILES = r"(cloud_categories|cloud_questions|frequency|lengths|perspectives|dropped)\.png|stats\.(json|md)"
RESULT = Result("result of this command", _FILES, STATS, "balance")


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the statistics from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_gen stats", description=__doc__, formatter_class=raw)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ledger", type=a_path, help="the ledger that `run` wrote")
    source.add_argument("--export", type=a_path, metavar="DIR", help="the folder that `export` wrote")
    out_help = "folder to write; earlier statistics in it are replaced"
    parser.add_argument("--out", type=a_path, required=True, help=out_help)
    arguments = parse_words(parser, argv)
    inputs = {"the ledger": arguments.ledger, "the export": arguments.export}
    with replaced_folder(arguments.out, RESULT, inputs=inputs) as folder:
        if arguments.ledger is not None:
            with Ledger(arguments.ledger) as ledger:
                found = statistics_of_ledger(ledger)
        else:
            found = statistics_of_export(arguments.export, _facts(arguments.export))
        balances = {name: round(balance(getattr(found, name)), 4) for name in ("images", "pairs", "cells")}
        figures = draw_figures(found, folder)
        write_json(folder / STATS, {**asdict(found), "figures": figures, "balance": balances})
        write_text(folder / "stats.md", _markdown(found, balances))
    print(
        f"done: {arguments.out} ({sum(found.pairs.values()):,} pairs, {sum(found.images.values()):,} images, "
        f"{len(found.pairs)} categories, author: {found.author})"
    )


def _markdown(statistics: Statistics, balances: dict[str, float]) -> str:
    pairs, images = statistics.pairs, statistics.images
    parts = [
        f"# {sum(pairs.values()):,} question-answer pairs, {sum(images.values()):,} images, {len(pairs)} categories",
        f"Author: {statistics.author}. Balance (entropy over its maximum; 1 is even): "
        + ", ".join(f"{name} {value:.2f}" for name, value in balances.items())
        + ".",
        markdown_table(("perspective and length", "pairs"), list(statistics.cells.items())),
        markdown_table(("category", "pairs", "images"), [(name, pairs[name], images[name]) for name in pairs]),
    ]
    if rules := sorted(statistics.dropped.keys() | statistics.faults.keys()):
        rows = [(rule, statistics.faults.get(rule, 0), statistics.dropped.get(rule, 0)) for rule in rules]
        parts.append(markdown_table(("rule", "objections", "dropped"), rows))
    if statistics.calls:
        parts.append(markdown_table(list(statistics.calls[0]), [list(call.values()) for call in statistics.calls]))
    return "\n\n".join(parts) + "\n"


class _Dropped(BaseModel):
    rule: str
    count: int


class _Facts(BaseModel):  # what is read of data.json
    author: Literal["offline", "models", "models and offline"]
    dropped: list[_Dropped]


def _facts(folder: Path) -> dict[str, Any]:
    expected = "the summary of a folder that `python -m data_gen export` wrote"
    path = folder / SUMMARY
    try:
        return _Facts.model_validate(read_json(path, expected)).model_dump()
    except ValidationError as error:
        raise InputError(f"{path}: {reasons(error)[0]}; expected {expected}; export again.") from error
