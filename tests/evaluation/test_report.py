"""Summaries, tables and rows of scored predictions."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from medisee.evaluation.metrics import Figure, Score
from medisee.evaluation.report import FIGURES, FILES, REPORT, main_table, summarise_split, to_text, write_report
from medisee.evaluation.scoring import Case, Results, Scored, Split
from medisee.evaluation.tables import to_markdown
from medisee.foundation.errors import InputError
from medisee.foundation.output import check_output
from medisee.records.manifest import Manifest
from medisee.records.records import QA, Prediction


def scored(case: Case, dice: float, *, named: bool | None = True, mode: str = "generated") -> Scored:
    """A case whose Dice, IoU and box IoU are all one number, of masks with a union of 100 pixels."""
    ids = {"record": case.record.id, "target": case.target.id, "question": case.qa.question}
    prediction = Prediction(**ids, mode=mode, text="the liver", emitted=dice > 0)  # pyright: ignore[reportArgumentType]
    return Scored(case=case, prediction=prediction, score=Score(dice, dice, 100 * dice, 100, dice), named=named)


@pytest.fixture
def manifest(tiny_manifest: Path) -> Manifest:
    return Manifest(tiny_manifest)


@pytest.fixture
def cases(manifest: Manifest) -> list[Case]:
    return [Case(record, target, qa) for record in manifest for target in record.targets for qa in target.qa]


def results(manifest: Manifest, generated: list[Scored], **changes: object) -> Results:
    values = {
        "split": Split(manifest, {}, ()),
        "modes": {"generated": generated},
        "written": "generated",
        "references": {},
    }
    return Results(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_a_split_is_summarised_as_a_whole_and_by_groups(manifest: Manifest, cases: list[Case]) -> None:
    all_scored = [
        scored(case, {"liver": 0.8, "left kidney": 0.4}[case.target.category], named=case.qa.length == "short")
        for case in cases
    ]
    summary = summarise_split(results(manifest, all_scored), resamples=20)
    assert summary.modes["generated"].dice.value == pytest.approx(0.6) and summary.modes["generated"].n == 16
    assert (summary.emission, summary.named, summary.missing) == (1.0, 0.5, 0)
    groups = summary.groups
    assert list(groups["by_length"]) == ["short", "long"]
    assert list(groups["by_perspective"]) == ["attribute", "location"]
    assert {name: of["generated"].dice.value for name, of in groups["by_category"].items()} == pytest.approx(
        {"left kidney": 0.4, "liver": 0.8}
    )
    assert summary.named_by_category == {"left kidney": 0.5, "liver": 0.5}


def test_intervals_draw_whole_images(manifest: Manifest, cases: list[Case]) -> None:
    one_image = [case for case in cases if case.record.id == "r0"]
    summary = summarise_split(results(manifest, [scored(case, i / 4) for i, case in enumerate(one_image)]), 50)
    dice = summary.modes["generated"].dice
    assert dice.low == dice.value == dice.high


def test_shares_are_none_where_the_system_wrote_nothing(manifest: Manifest, cases: list[Case]) -> None:
    given = [scored(case, 0.5, named=None, mode="forced") for case in cases]
    summary = summarise_split(results(manifest, [], modes={"forced": given}, written=None), 5)
    assert summary.emission is None and summary.named is None
    assert set(summary.named_by_category.values()) == {None}
    assert "written" not in to_text({"tiny": summary}, "X")


def test_the_main_table_has_systems_and_splits(manifest: Manifest, cases: list[Case]) -> None:
    good, poor = [scored(case, 0.75) for case in cases], [scored(case, 0.25, named=None) for case in cases]
    full = results(manifest, good, references={"mean_mask": poor, "nearest_slice": poor}, shuffled=poor)
    summary = summarise_split(full, 5)
    table = main_table({"val": summary, "test": summary}, "Ours", intervals=True)
    assert list(table.columns) == [f"{split} {figure}" for split in ("val", "test") for figure in FIGURES]
    values = {
        name: [cell.value if isinstance(cell, Figure) else cell for cell in cells] for name, cells in table.rows.items()
    }
    assert values == {
        "Ours (generated)": [0.75, 0.75, 0.75, 0.75, 1.0] * 2,
        "mean mask of category and plane": [0.25, 0.25, 0.25, 0.25, 0.0] * 2,
        "nearest training slice": [0.25, 0.25, 0.25, 0.25, 0.0] * 2,
        "Ours, shuffled queries (Dice only)": [0.25, None, None, None, None] * 2,
    }
    assert table.rows["Ours (generated)"][0] == Figure(0.75, 0.75, 0.75)
    assert "**75.0** [75.0, 75.0]" in to_markdown(table)
    plain = main_table({"test": summarise_split(results(manifest, good), 5)}, "Ours")
    assert list(plain.columns) == list(FIGURES) and list(plain.rows) == ["Ours (generated)"]


def test_a_report_is_written(tmp_path: Path, manifest: Manifest, cases: list[Case]) -> None:
    odd = QA('=1+1, "quoted"\nand a line', "", "attribute", "short")
    all_scored = [scored(replace(cases[0], qa=odd), 0.5), *(scored(case, 0.5, named=False) for case in cases[1:])]
    all_scored[1] = replace(all_scored[1], prediction=None)
    split = results(manifest, all_scored)
    summary = summarise_split(split, 5)
    write_report(tmp_path, [split], {"tiny": summary}, "a_system")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(FILES) - {"run.json"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"splits": {"tiny": summary.to_json()}}
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 15
    with (tmp_path / "scores.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 16 and rows[0]["question"] == odd.question
    assert list(rows[0]) == [
        *("split", "mode", "record", "target", "category", "plane", "perspective", "length", "question"),
        *("Dice", "IoU", "box IoU", "emitted", "named"),
    ]
    assert (rows[0]["Dice"], rows[0]["named"], rows[2]["named"], rows[0]["plane"]) == (
        "0.5",
        "True",
        "False",
        "coronal",
    )
    markdown, latex = (tmp_path / "table.md").read_text(), (tmp_path / "table.tex").read_text()
    for heading in ("# Evaluation", "## By length of the query", "## By perspective", "## By category"):
        assert heading in markdown
    assert r"a\_system (generated) | 50.0 [50.0, 50.0]" in markdown and "liver (n = 8)" in markdown
    assert "1 predictions are missing" in markdown and latex.count(r"\begin{table}") == 4
    assert "a_system on tiny" in (tmp_path / "gallery.html").read_text()


def test_one_length_has_no_table_of_its_own(tmp_path: Path, manifest: Manifest, cases: list[Case]) -> None:
    split = results(manifest, [scored(case, 0.5) for case in cases if case.qa.length == "short"])
    write_report(tmp_path, [split], {"tiny": summarise_split(split, 5)}, "x")
    assert "By length" not in (tmp_path / "table.md").read_text()


def test_what_is_not_ours_is_not_replaced(tmp_path: Path, manifest: Manifest, cases: list[Case]) -> None:
    def check(folder: Path) -> None:
        check_output(folder, REPORT, whole=True)

    check(tmp_path / "new")
    check(tmp_path)
    (tmp_path / "predictions.jsonl").touch()
    with pytest.raises(InputError, match=r"holds 'predictions\.jsonl', which is not of an earlier evaluation"):
        check(tmp_path)
    split = results(manifest, [scored(case, 0.5) for case in cases])
    write_report(tmp_path, [split], {"tiny": summarise_split(split, 5)}, "x")
    (tmp_path / "run.json").touch()
    check(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds 'thesis\.tex'.*choose another folder"):
        check(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        check(tmp_path / "thesis.tex")
