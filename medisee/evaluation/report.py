"""A report on scored predictions: the summary of each split, tables, a row per prediction, and a gallery of cases."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medisee.evaluation.gallery import write_gallery
from medisee.evaluation.metrics import Figure, Summary, summarise
from medisee.evaluation.scoring import GROUPS, REFERENCES, Results, Scored
from medisee.evaluation.tables import Table, to_latex, to_markdown, to_terminal
from medisee.foundation.files import write_json, write_text
from medisee.foundation.output import Result
from medisee.records.records import write_predictions

FIGURES = ("Dice", "gIoU", "cIoU", "IoU", "Acc")
FILES = ("predictions.jsonl", "scores.csv", "summary.json", "table.md", "table.tex", "gallery.html", "run.json")
REPORT = Result("evaluation", "|".join(map(re.escape, FILES)), "summary.json", "splits")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """The figures of one split."""

    modes: dict[str, Summary]
    emission: float | None  # share of the answers written by the system that ask for a mask
    named: float | None  # share of them that name the target's category
    shuffled: Summary | None
    references: dict[str, Summary | None]
    missing: int
    groups: dict[str, dict[str, dict[str, Summary]]]  # by the keys of GROUPS, then by group, then by mode
    named_by_category: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Returns the split's part of summary.json."""
        groups = {key: {name: _json(modes) for name, modes in of.items()} for key, of in self.groups.items()}
        for category, share in self.named_by_category.items():
            groups["by_category"][category]["named"] = share
        return {
            **_json(self.modes),
            "emission": self.emission,
            "named": self.named,
            "shuffled": {"Dice": self.shuffled.dice.value} if self.shuffled else None,
            **_json(self.references),
            "missing": self.missing,
            **groups,
        }


def _json(summaries: Mapping[str, Summary | None]) -> dict[str, Any]:
    return {name: summary.to_json() if summary else None for name, summary in summaries.items()}


def summarise_split(results: Results, resamples: int) -> SplitSummary:
    """Summarises a split as a whole and by length, perspective and category; intervals draw whole images."""

    def figures(scored: Sequence[Scored]) -> Summary:
        images = [one.case.record.image for one in scored]
        return summarise([one.score for one in scored], groups=images, resamples=resamples)

    def by(key: str) -> dict[str, dict[str, Summary]]:
        group_of = GROUPS[key]
        groups = {group_of(one.case) for scored in results.modes.values() for one in scored}
        return {
            group: {
                mode: figures([one for one in scored if group_of(one.case) == group])
                for mode, scored in results.modes.items()
            }
            for group in sorted(groups, reverse=key == "by_length")  # short, then long
        }

    def share(flags: Sequence[bool]) -> float | None:
        return sum(flags) / len(flags) if flags else None

    groups = {key: by(key) for key in GROUPS}
    written = results.modes[results.written] if results.written is not None else ()
    return SplitSummary(
        modes={mode: figures(scored) for mode, scored in results.modes.items()},
        emission=share([one.prediction is not None and one.prediction.emitted for one in written]),
        named=share([bool(one.named) for one in written]),
        shuffled=figures(results.shuffled) if results.shuffled else None,
        references={name: figures(of) if (of := results.references.get(name)) else None for name in REFERENCES},
        missing=sum(one.prediction is None for scored in results.modes.values() for one in scored),
        groups=groups,
        named_by_category={
            category: share([bool(one.named) for one in written if one.case.target.category == category])
            for category in groups["by_category"]
        },
    )


def write_report(folder: Path, results: Sequence[Results], summaries: Mapping[str, SplitSummary], system: str) -> None:
    """Writes everything but run.json into an empty folder; the gallery shows the first split, `system` names rows."""
    scored = [one for split in results for mode in split.modes.values() for one in mode]
    write_predictions(folder / "predictions.jsonl", (one.prediction for one in scored if one.prediction is not None))
    _write_scores(folder / "scores.csv", results)
    write_json(folder / "summary.json", {"splits": {name: split.to_json() for name, split in summaries.items()}})
    parts = _parts(summaries, system)
    blocks = [
        "# Evaluation\n",
        "Percentages; 95% intervals in brackets, from a bootstrap over images.\n",
        to_markdown(main_table(summaries, system, intervals=True)),
        "".join(f"- {_remark(name, summary)}\n" for name, summary in summaries.items()),
        *(block for heading, tables in parts.items() for block in (f"## {heading}\n", *map(to_markdown, tables))),
    ]
    write_text(folder / "table.md", "\n".join(blocks))
    tables = [main_table(summaries, system), *(table for tables in parts.values() for table in tables)]
    write_text(folder / "table.tex", "\n".join(map(to_latex, tables)))
    write_gallery(folder / "gallery.html", results[0], f"{system} on {results[0].split.name}")


def to_text(summaries: Mapping[str, SplitSummary], system: str) -> str:
    """Returns the main table for the terminal, one per split: side by side they would be too wide."""
    parts = []
    for name, summary in summaries.items():
        parts += [to_terminal(main_table({name: summary}, system)).rstrip(), _remark(name, summary)]
    return "\n".join(parts)


def main_table(summaries: Mapping[str, SplitSummary], system: str, *, intervals: bool = False) -> Table:
    """Returns the table of systems (rows) and figures of each split (columns)."""
    rows: dict[str, list[Figure | None]] = {}
    for summary in summaries.values():
        for mode, of_mode in summary.modes.items():
            rows.setdefault(f"{system} ({mode})", []).extend(_figures(of_mode))
        for key, name in REFERENCES.items():
            rows.setdefault(name, []).extend(_figures(summary.references[key]))
        dice = summary.shuffled.dice if summary.shuffled else None
        rows.setdefault(f"{system}, shuffled queries (Dice only)", []).extend([dice, None, None, None, None])
    columns = [f"{name} {figure}" if len(summaries) > 1 else figure for name in summaries for figure in FIGURES]
    shown = {name: cells for name, cells in rows.items() if any(cells)}
    return Table(f"Results on {' and '.join(summaries)}", columns, shown, intervals)


def _parts(summaries: Mapping[str, SplitSummary], system: str) -> dict[str, list[Table]]:
    """Returns the tables by length, perspective and category under their headings; one length alone has no table."""

    def side_by_side(title: str, groups: Mapping[str, Mapping[str, Summary]]) -> Table:
        rows = {
            f"{system} ({mode})": [cell for modes in groups.values() for cell in _figures(modes[mode])]
            for mode in next(iter(groups.values()))
        }
        return Table(title, [f"{name} {figure}" for name in groups for figure in FIGURES], rows)

    def by_category(title: str, one: SplitSummary) -> Table:
        rows: dict[str, list[Figure | float | None]] = {}
        for category, modes in one.groups["by_category"].items():
            figures = [cell for of_mode in modes.values() for cell in _figures(of_mode)]
            count = next(iter(modes.values())).n
            rows[f"{category} (n = {count})"] = [*figures, one.named_by_category[category]]
        return Table(title, [*(f"{mode} {figure}" for mode in one.modes for figure in FIGURES), "named"], rows)

    parts: dict[str, list[Table]] = {"By length of the query": [], "By perspective": [], "By category": []}
    for name, one in summaries.items():
        if len(one.groups["by_length"]) > 1:
            parts["By length of the query"].append(side_by_side(f"By length, {name}", one.groups["by_length"]))
        parts["By perspective"].append(side_by_side(f"By perspective, {name}", one.groups["by_perspective"]))
        parts["By category"].append(by_category(f"By category, {name}", one))
    return {heading: tables for heading, tables in parts.items() if tables}


def _figures(summary: Summary | None) -> list[Figure | None]:
    if summary is None:
        return [None] * len(FIGURES)
    return [summary.dice, summary.giou, summary.ciou, summary.iou, summary.acc]


def _remark(name: str, summary: SplitSummary) -> str:
    words = [f"{name}: {next(iter(summary.modes.values())).n} questions"]
    if summary.emission is not None and summary.named is not None:
        words.append(f"{100 * summary.emission:.1f}% of the written answers ask for a mask")
        words.append(f"{100 * summary.named:.1f}% name the right target")
    if summary.missing:
        words.append(f"{summary.missing} predictions are missing and count as empty")
    return "; ".join(words) + "."


def _write_scores(path: Path, results: Sequence[Results]) -> None:
    header = ["split", "mode", "record", "target", "category", "plane", "perspective", "length", "question"]
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([*header, "Dice", "IoU", "box IoU", "emitted", "named"])
        for split, mode, one in (
            (r.split.name, m, one) for r in results for m, scored in r.modes.items() for one in scored
        ):
            case, emitted = one.case, one.prediction is not None and one.prediction.emitted
            about = [case.record.id, case.target.id, case.target.category, case.record.plane]
            about += [case.qa.perspective, case.qa.length, case.qa.question]
            figures = [one.score.dice, one.score.iou, one.score.box_iou]
            writer.writerow([split, mode, *about, *figures, emitted, one.named])
