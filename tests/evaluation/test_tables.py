"""Tables as text: percentages, gaps, the best value, escaping."""

from __future__ import annotations

import pytest

from medisee.evaluation.metrics import Figure
from medisee.evaluation.tables import Table, to_latex, to_markdown, to_terminal

TABLE = Table(
    "R&D_1",
    ["val/Dice", "Acc %"],
    {
        "LISA_7B & co": [0.316, None],
        "[SEG] only": [Figure(0.567, 0.551, 0.582), 0.5],
        "MediSee": [0.56704, 0.25],
    },
    intervals=True,
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
    text = to_latex(Table("\\ {x} ~ ^ # $ < > *\n", [], {}))
    assert (
        r"\caption{\textbackslash{} \{x\} \textasciitilde{} \textasciicircum{} \# \$ \textless{} \textgreater{} {*}}"
        in text
    )


def test_terminal_keeps_brackets() -> None:
    text = to_terminal(TABLE, width=100)
    assert "[SEG] only" in text and "56.7 [55.1, 58.2]" in text and "R&D_1" in text
    assert "\x1b" not in text


def test_intervals_are_printed_on_request_only() -> None:
    table = Table("t", ["Dice"], {"a": [Figure(0.567, 0.551, 0.582)]})
    for write in (to_markdown, to_latex, to_terminal):
        assert "56.7" in write(table) and "55.1" not in write(table)


def test_one_value_is_not_the_best_of_anything() -> None:
    table = Table("t", ["Dice"], {"a": [0.5], "b": [None]})
    assert "**50.0**" not in to_markdown(table) and "textbf" not in to_latex(table)


def test_no_minus_zero_and_no_rows() -> None:
    assert "| 0.0 |" in to_markdown(Table("t", ["Dice"], {"a": [-0.0001]}))
    assert to_markdown(Table("t", ["Dice"], {})).splitlines()[2:] == ["|  | Dice |", "| :-- | --: |"]
    assert "Dice" in to_terminal(Table("t", ["Dice"], {}))


def test_a_pipe_stays_in_its_cell() -> None:
    assert "| a\\|b c |" in to_markdown(Table("t", ["Dice"], {"a|b\nc": [0.1]}))


@pytest.mark.parametrize("cells", [[0.1], [0.1, 0.2, 0.3]])
def test_a_row_is_as_long_as_the_columns(cells: list[float]) -> None:
    with pytest.raises(ValueError, match="zip"):
        to_markdown(Table("t", ["a", "b"], {"row": cells}))
