"""Tables as text: percentages, gaps, the best value, escaping."""

from __future__ import annotations

import csv
import io

import pytest

from medisee.evaluation.tables import Row, Table, to_csv, to_latex, to_markdown, to_terminal
from medisee.foundation.errors import InputError

TABLE = Table(
    "R&D_1",
    ["val/Dice", "Acc %"],
    [
        Row("LISA_7B & co", [0.316, None]),
        Row("[SEG] only", [0.567, 0.5], [(0.551, 0.582), None]),
        Row("MediSee", [0.56704, 0.25]),
    ],
)


def test_markdown() -> None:
    assert to_markdown(TABLE) == (
        "**R&D\\_1**\n\n"
        "|  | val/Dice | Acc % |\n"
        "| :-- | --: | --: |\n"
        "| LISA\\_7B & co | 31.6 | - |\n"
        "| [SEG] only | **56.7** [55.1, 58.2] | **50.0** |\n"
        "| MediSee | **56.7** | 25.0 |\n"
    )


def test_latex() -> None:
    lines = to_latex(TABLE).splitlines()
    assert lines[2:4] == [r"\caption{R\&D\_1}", r"\begin{tabular}{lrr}"]
    assert r" & val/Dice & Acc \% \\" in lines
    assert r"LISA\_7B \& co & 31.6 & - \\" in lines
    assert r"{[}SEG] only & \textbf{56.7} [55.1, 58.2] & \textbf{50.0} \\" in lines
    assert lines[0] == r"\begin{table}" and lines[-1] == r"\end{table}"


def test_latex_escapes_every_sign() -> None:
    text = to_latex(Table("\\ {x} ~ ^ # $ < > *\n", [], []))
    assert (
        r"\caption{\textbackslash{} \{x\} \textasciitilde{} \textasciicircum{} \# \$ \textless{} \textgreater{} {*}}"
        in text
    )


def test_csv() -> None:
    assert list(csv.reader(io.StringIO(to_csv(TABLE)))) == [
        ["name", "val/Dice", "val/Dice low", "val/Dice high", "Acc %"],
        ["LISA_7B & co", "31.6", "-", "-", "-"],
        ["[SEG] only", "56.7", "55.1", "58.2", "50.0"],
        ["MediSee", "56.7", "-", "-", "25.0"],
    ]


def test_terminal_keeps_brackets() -> None:
    text = to_terminal(TABLE, width=100)
    assert "[SEG] only" in text and "56.7 [55.1, 58.2]" in text and "R&D_1" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(("percent", "digits", "cell"), [(True, 0, "57"), (False, 3, "0.567"), (True, 2, "56.70")])
def test_digits(percent: bool, digits: int, cell: str) -> None:
    table = Table("t", ["Dice"], [Row("a", [0.567])])
    for write in (to_markdown, to_latex, to_csv, to_terminal):
        assert cell in write(table, percent, digits)


def test_one_value_is_not_the_best_of_anything() -> None:
    table = Table("t", ["Dice"], [Row("a", [0.5]), Row("b", [None])])
    assert "**50.0**" not in to_markdown(table) and "textbf" not in to_latex(table)


def test_no_minus_zero_and_no_rows() -> None:
    assert "| 0.0 |" in to_markdown(Table("t", ["Dice"], [Row("a", [-0.0001])]))
    assert to_csv(Table("t", ["Dice"], [])) == "name,Dice\n"
    assert "Dice" in to_terminal(Table("t", ["Dice"], []))


def test_a_pipe_stays_in_its_cell() -> None:
    assert "| a\\|b c |" in to_markdown(Table("t", ["Dice"], [Row("a|b\nc", [0.1])]))


def test_bad_rows_are_told_at_once() -> None:
    rows = [Row("short", [0.1]), Row("nan", [0.1, float("nan")]), Row("ci", [0.1, 0.2], [None])]
    with pytest.raises(InputError) as caught:
        Table("t", ["a", "b"], rows)
    short, nan, ci = caught.value.problems
    assert "table 't', row 'short': 1 values and 0 intervals; expected 2" in short
    assert "row 'nan'" in nan and "expected finite numbers" in nan
    assert "row 'ci': 2 values and 1 intervals" in ci
