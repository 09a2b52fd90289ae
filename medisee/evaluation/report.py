"""A report on scored predictions: the summary of each split, tables, a row a prediction, and a gallery of cases.

No model comes in here: a split's `Results` hold what was predicted, by whom it was, and how it scored.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medisee.evaluation.drawing import overlay
from medisee.evaluation.gallery import GalleryCase, write_gallery
from medisee.evaluation.metrics import Figure, Score, Summary, summarise
from medisee.evaluation.tables import Row, Table, to_latex, to_markdown, to_terminal
from medisee.foundation.errors import InputError
from medisee.foundation.files import write_json, write_text
from medisee.records.images import read_image
from medisee.records.manifest import Manifest
from medisee.records.masks import decode_mask, mask_box
from medisee.records.records import QA, Prediction, Record, Target, write_predictions

FIGURES = ("Dice", "gIoU", "cIoU", "IoU", "Acc")
REFERENCES = {"mean_mask": "mean mask of category and plane", "nearest_slice": "nearest training slice"}
RESERVED = (*REFERENCES, "shuffled", "emission", "named", "missing", "by_length", "by_perspective", "by_category")
"""Keys of a split's summary, which cannot be the mode of a prediction as well."""
FILES = (
    "predictions.jsonl",
    "scores.csv",
    "summary.json",
    "table.md",
    "table.tex",
    "gallery.html",
    "run.json",
)

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Case:
    """A question about a target of a record."""

    record: Record
    target: Target
    qa: QA


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a system answered in one case.

    Attributes:
        case: what was asked.
        prediction: the answer; for a missing one, an empty one.
        score: of mask and box.
        named: whether the text names the target's category; None where the system did not write the text.
        missing: whether the predictions file had no answer.
    """

    case: Case
    prediction: Prediction
    score: Score
    named: bool | None = None
    missing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that was scored on one split.

    Attributes:
        split: its name.
        manifest: where its images are.
        modes: the system's answers by mode.
        written: the mode whose answers the system wrote itself, if there is one.
        shuffled: forced answers to questions about other categories.
        references: by the keys of `REFERENCES`; empty without training manifests.
    """

    split: str
    manifest: Manifest
    modes: Mapping[str, Sequence[Scored]]
    written: str | None
    shuffled: Sequence[Scored] = ()
    references: Mapping[str, Sequence[Scored]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """The figures of one split; shares are of the answers in the mode that the system wrote itself."""

    modes: dict[str, Summary]
    emission: float | None
    named: float | None
    shuffled: Summary | None
    references: dict[str, Summary | None]
    missing: int
    by_length: dict[str, dict[str, Summary]]
    by_perspective: dict[str, dict[str, Summary]]
    by_category: dict[str, dict[str, Summary]]
    named_by_category: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Returns the split's part of summary.json."""
        return {
            **_json(self.modes),
            "emission": self.emission,
            "named": self.named,
            "shuffled": {"Dice": self.shuffled.dice.value} if self.shuffled else None,
            **_json(self.references),
            "missing": self.missing,
            "by_length": {name: _json(modes) for name, modes in self.by_length.items()},
            "by_perspective": {name: _json(modes) for name, modes in self.by_perspective.items()},
            "by_category": {
                name: {**_json(modes), "named": self.named_by_category[name]}
                for name, modes in self.by_category.items()
            },
        }


def _json(summaries: Mapping[str, Summary | None]) -> dict[str, Any]:
    return {name: summary.to_json() if summary else None for name, summary in summaries.items()}


def summarise_split(results: Results, resamples: int) -> SplitSummary:
    """Summarises a split as a whole and by length, perspective and category; intervals draw whole images."""

    def figures(scored: Sequence[Scored]) -> Summary:
        images = [one.case.record.image for one in scored]
        return summarise([one.score for one in scored], groups=images, resamples=resamples)

    def by(group_of: Callable[[Case], str]) -> dict[str, dict[str, Summary]]:
        return {
            group: {
                mode: figures([one for one in scored if group_of(one.case) == group])
                for mode, scored in results.modes.items()
            }
            for group in _groups(results, group_of)
        }

    written = results.modes[results.written] if results.written is not None else ()
    return SplitSummary(
        modes={mode: figures(scored) for mode, scored in results.modes.items()},
        emission=_share(one.prediction.emitted for one in written),
        named=_share(bool(one.named) for one in written),
        shuffled=figures(results.shuffled) if results.shuffled else None,
        references={
            name: figures(results.references[name]) if name in results.references else None for name in REFERENCES
        },
        missing=sum(one.missing for scored in results.modes.values() for one in scored),
        by_length=dict(sorted(by(lambda case: case.qa.length).items(), reverse=True)),  # short, then long
        by_perspective=by(lambda case: case.qa.perspective),
        by_category=by(lambda case: case.target.category),
        named_by_category={
            category: _share(bool(one.named) for one in written if one.case.target.category == category)
            for category in _groups(results, lambda case: case.target.category)
        },
    )


def _groups(results: Results, group_of: Callable[[Case], str]) -> list[str]:
    return sorted({group_of(one.case) for scored in results.modes.values() for one in scored})


def _share(flags: Iterable[bool]) -> float | None:
    listed = list(flags)
    return sum(listed) / len(listed) if listed else None


def check_out(out: Path) -> None:
    """Refuses to replace a folder that holds anything but an earlier report.

    Raises:
        InputError: `out` is a file, or a folder with files that are not ours.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; expected a folder for the results; choose another --out.")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in FILES) if out.exists() else []
    if foreign:
        raise InputError(
            f"{out}: holds {foreign[0]!r}, which no evaluation writes; expected a new folder or an earlier "
            "evaluation, since it is replaced as a whole; choose another --out."
        )


def write_report(folder: Path, results: Sequence[Results], summaries: Mapping[str, SplitSummary], system: str) -> None:
    """Writes everything but run.json into a folder.

    Args:
        folder: exists and is empty.
        results: one a split; the gallery shows the first.
        summaries: of the same splits, by name.
        system: name of what was evaluated, for the tables.
    """
    scored = [one for split in results for mode in split.modes.values() for one in mode]
    write_predictions(folder / "predictions.jsonl", (one.prediction for one in scored if not one.missing))
    _write_scores(folder / "scores.csv", results)
    write_json(folder / "summary.json", {"splits": {name: split.to_json() for name, split in summaries.items()}})
    write_text(folder / "table.md", _markdown(summaries, system))
    tables = [main_table(summaries, system), *(table for _, part in _parts(summaries, system) for table in part)]
    write_text(folder / "table.tex", "\n".join(map(to_latex, tables)))
    write_gallery(folder / "gallery.html", gallery_cases(results[0]), f"{system} on {results[0].split}")


def to_text(summaries: Mapping[str, SplitSummary], system: str) -> str:
    """Returns the main table for the terminal, one a split: side by side they are too wide."""
    parts = []
    for name, summary in summaries.items():
        parts += [to_terminal(main_table({name: summary}, system)).rstrip(), _remark(name, summary)]
    return "\n".join(parts)


def main_table(summaries: Mapping[str, SplitSummary], system: str, *, intervals: bool = False) -> Table:
    """Returns the table of systems (rows) and figures of each split (columns)."""
    rows: dict[str, list[Figure | None]] = {}
    for summary in summaries.values():
        for mode, figures in summary.modes.items():
            rows.setdefault(f"{system} ({mode})", []).extend(_figures(figures))
        for key, name in REFERENCES.items():
            rows.setdefault(name, []).extend(_figures(summary.references[key]))
        dice = summary.shuffled.dice if summary.shuffled else None
        rows.setdefault(f"{system}, shuffled queries (Dice only)", []).extend([dice, None, None, None, None])
    columns = [f"{name} {figure}" if len(summaries) > 1 else figure for name in summaries for figure in FIGURES]
    shown = [_row(name, cells, intervals) for name, cells in rows.items() if any(cells)]
    return Table(f"Results on {' and '.join(summaries)}", columns, shown)


def _parts(summaries: Mapping[str, SplitSummary], system: str) -> list[tuple[str, list[Table]]]:
    """Returns the tables by length, perspective and category, each kind under its heading."""
    both = {name: one for name, one in summaries.items() if len(one.by_length) > 1}
    lengths = [_side_by_side(f"By length, {name}", one.by_length, system) for name, one in both.items()]
    perspectives = [
        _side_by_side(f"By perspective, {name}", one.by_perspective, system) for name, one in summaries.items()
    ]
    categories = [_category_table(f"By category, {name}", one) for name, one in summaries.items()]
    parts = [("By length of the query", lengths), ("By perspective", perspectives), ("By category", categories)]
    return [(heading, tables) for heading, tables in parts if tables]


def _side_by_side(title: str, groups: Mapping[str, Mapping[str, Summary]], system: str) -> Table:
    modes = list(next(iter(groups.values())))
    rows = [
        _row(f"{system} ({mode})", [cell for group in groups.values() for cell in _figures(group[mode])])
        for mode in modes
    ]
    return Table(title, [f"{name} {figure}" for name in groups for figure in FIGURES], rows)


def _category_table(title: str, summary: SplitSummary) -> Table:
    rows = []
    for category, modes in summary.by_category.items():
        values = [figure.value if figure else None for one in modes.values() for figure in _figures(one)]
        count = next(iter(modes.values())).n
        rows.append(Row(f"{category} (n = {count})", [*values, summary.named_by_category[category]]))
    columns = [f"{mode} {figure}" for mode in summary.modes for figure in FIGURES]
    return Table(title, [*columns, "named"], rows)


def _figures(summary: Summary | None) -> list[Figure | None]:
    if summary is None:
        return [None] * len(FIGURES)
    return [summary.dice, summary.giou, summary.ciou, summary.iou, summary.acc]


def _row(name: str, figures: Sequence[Figure | None], intervals: bool = False) -> Row:
    ci = [(figure.low, figure.high) if figure else None for figure in figures]
    return Row(name, [figure.value if figure else None for figure in figures], ci if intervals else ())


def _markdown(summaries: Mapping[str, SplitSummary], system: str) -> str:
    remarks = "\n".join(f"- {_remark(name, summary)}" for name, summary in summaries.items())
    blocks = [
        "# Evaluation\n",
        "Percentages; 95% intervals in brackets, from a bootstrap over images.\n",
        to_markdown(main_table(summaries, system, intervals=True)),
        f"{remarks}\n",
    ]
    for heading, tables in _parts(summaries, system):
        blocks += [f"## {heading}\n", *map(to_markdown, tables)]
    return "\n".join(blocks)


def _remark(name: str, summary: SplitSummary) -> str:
    count = next(iter(summary.modes.values())).n
    words = [f"{name}: {count} questions"]
    if summary.emission is not None and summary.named is not None:
        words.append(f"{100 * summary.emission:.1f}% of the written answers ask for a mask")
        words.append(f"{100 * summary.named:.1f}% name the right target")
    if summary.missing:
        words.append(f"{summary.missing} predictions are missing and count as empty")
    return "; ".join(words) + "."


def _write_scores(path: Path, results: Sequence[Results]) -> None:
    about = ["record", "target", "category", "plane", "perspective", "length", "question"]
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["split", "mode", *about, "Dice", "IoU", "box IoU", "emitted", "named"])
        for split in results:
            for mode, scored in split.modes.items():
                writer.writerows([split.split, mode, *_cells(one)] for one in scored)


def _cells(one: Scored) -> list[object]:
    record, target, qa, score = one.case.record, one.case.target, one.case.qa, one.score
    about = [record.id, target.id, target.category, record.plane, qa.perspective, qa.length, qa.question]
    return [*about, score.dice, score.iou, score.box_iou, one.prediction.emitted, one.named]


def gallery_cases(results: Results) -> list[GalleryCase]:
    """Draws the best, middle and worst cases by Dice of the answers that the system wrote, else of its first mode."""
    mode = results.written or next(iter(results.modes))
    ranked = sorted(results.modes[mode], key=lambda one: -one.score.dice)
    count = len(ranked)
    shown = min(_SHOWN, (count + 2) // 3)
    middle = (count - shown) // 2
    best, worst = ranked[:shown], ranked[max(shown, count - shown) :]
    median = ranked[max(shown, middle) : min(middle + shown, count - len(worst))]
    sections = [("best", best), ("median", median), ("worst", worst)]
    cases = [(section, one) for section, chosen in sections for one in chosen]
    return [_gallery_case(section, results.manifest, mode, one) for section, one in tqdm(cases, desc="gallery")]


def _gallery_case(section: str, manifest: Manifest, mode: str, one: Scored) -> GalleryCase:
    case, prediction = one.case, one.prediction
    named = {None: "", True: ", names the target", False: ", does not name the target"}[one.named]
    truth = manifest.mask(case.record, case.target)
    picture = overlay(
        read_image(manifest.image_path(case.record)),
        decode_mask(prediction.mask) if prediction.mask else None,
        prediction.box,
        truth=truth,
        truth_box=case.target.box or mask_box(truth),
    )
    return GalleryCase(
        section=section,
        image=picture,
        question=case.qa.question,
        answer=prediction.text,
        category=case.target.category,
        dice=one.score.dice,
        box_iou=one.score.box_iou,
        note="no prediction" if one.missing else f"{mode}{named}",
    )
