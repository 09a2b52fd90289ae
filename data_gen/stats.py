"""Draws the statistics of a data set: the paper's Figure 4, lengths, perspectives, what the rules dropped. Run it as

  python -m data_gen stats --ledger data/mlmr_sd/ledger.sqlite --out data/mlmr_sd/stats
  python -m data_gen stats --export data/mlmr_sd/export --out data/mlmr_sd/stats

Writes into OUT (which must be new, empty or earlier statistics):
  cloud_categories.png    Figure 4 (a): the categories, sized by their question-answer pairs
  cloud_questions.png     the words of the questions
  frequency.png           Figure 4 (b): pairs and images of each category
  lengths.png             words of questions and answers
  perspectives.png        pairs of each perspective and length
  dropped.png             what each rule objected to and dropped
  stats.json, stats.md    the numbers
A ledger also tells tokens and prices, and what the rules objected to before an answer was mended.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_gen.export import SUMMARY, check_out
from data_gen.ledger.ledger import Ledger
from data_gen.publishing.figures import draw_figures
from data_gen.publishing.statistics import Statistics, balance, statistics_of_export, statistics_of_ledger
from medisee.foundation.errors import InputError
from medisee.foundation.files import atomic_path, write_json, write_text

STATS = "stats.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the statistics from the command line."""
    arguments = _parser().parse_args(argv)
    check_out(arguments.out, STATS, "balance")
    if arguments.ledger is not None:
        with Ledger(arguments.ledger) as ledger:
            found = statistics_of_ledger(ledger)
    else:
        found = statistics_of_export(arguments.export, _facts(arguments.export))
    write_stats(found, arguments.out)
    print(
        f"done: {arguments.out} ({sum(found.pairs.values()):,} pairs, {sum(found.images.values()):,} images, "
        f"{len(found.pairs)} categories, author: {found.author})"
    )


def write_stats(statistics: Statistics, out: Path) -> None:
    """Writes figures, stats.json and stats.md into a folder, whole or not at all."""
    with atomic_path(out) as folder:
        folder.mkdir()
        figures = draw_figures(statistics, folder)
        write_json(folder / STATS, {**asdict(statistics), "figures": figures, "balance": _balances(statistics)})
        write_text(folder / "stats.md", markdown(statistics))


def _balances(statistics: Statistics) -> dict[str, float]:
    return {
        name: round(balance(counts), 4)
        for name, counts in (
            ("images", statistics.images),
            ("pairs", statistics.pairs),
            ("cells", statistics.cells),
        )
    }


def markdown(statistics: Statistics) -> str:
    """Returns the numbers as Markdown tables."""
    pairs, images = sum(statistics.pairs.values()), sum(statistics.images.values())
    lines = [
        f"# {pairs:,} question-answer pairs, {images:,} images, {len(statistics.pairs)} categories",
        f"Author: {statistics.author}. Balance (entropy over its maximum; 1 is even): "
        + ", ".join(f"{name} {value:.2f}" for name, value in _balances(statistics).items())
        + ".",
        _table(("perspective and length", "pairs"), statistics.cells.items()),
        _table(("category", "pairs", "images"), ((c, n, statistics.images[c]) for c, n in statistics.pairs.items())),
    ]
    if statistics.dropped or statistics.faults:
        rules = sorted(statistics.dropped.keys() | statistics.faults.keys())
        rows = ((rule, statistics.faults.get(rule, 0), statistics.dropped.get(rule, 0)) for rule in rules)
        lines.append(_table(("rule", "objections", "dropped"), rows))
    if statistics.calls:
        lines.append(_table(tuple(statistics.calls[0]), (tuple(call.values()) for call in statistics.calls)))
    return "\n\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [tuple(head), tuple("---" for _ in head)]
    lines += [tuple(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row) for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {"author": str(facts["author"]), "dropped": list(facts["dropped"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--export {folder}: {SUMMARY} cannot be read ({error}); expected what `python -m data_gen export` wrote; "
            "name its folder."
        ) from error


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_gen stats", description=__doc__, formatter_class=raw)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ledger", type=Path, help="the ledger that `run` wrote")
    source.add_argument("--export", type=Path, metavar="DIR", help="what `export` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; earlier statistics are replaced")
    return parser
