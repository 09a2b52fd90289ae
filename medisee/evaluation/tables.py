"""Tables of figures as text, for the terminal, markdown and LaTeX. Values are fractions of 1, printed as percentages.

The highest value of a column, as it is printed, is bold where the column has at least two values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medisee.evaluation.metrics import Figure


@dataclass(frozen=True, slots=True)
class Table:
    """Rows by name with a figure per column, None where there is none; `intervals` prints those of figures too."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Figure | float | None]]
    intervals: bool = False


def to_markdown(table: Table) -> str:
    """Returns a GitHub table under its title."""
    lines = [
        ["", *(_escaped(column, _MARKDOWN) for column in table.columns)],
        [":--", *("--:" for _ in table.columns)],
        *([_escaped(name, _MARKDOWN), *_with_bold(cells, "**{}**")] for name, cells in _cells(table)),
    ]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{_escaped(table.title, _MARKDOWN)}**\n\n{body}\n"


def to_latex(table: Table) -> str:
    """Returns a table environment for the booktabs package."""
    header = ["", *(_escaped(column, _LATEX) for column in table.columns)]
    rows = [[_escaped(name, _LATEX), *_with_bold(cells, r"\textbf{{{}}}")] for name, cells in _cells(table)]
    first, *others = (" & ".join(row) + r" \\" + "\n" for row in (header, *rows))
    return rf"""\begin{{table}}
\centering
\caption{{{_escaped(table.title, _LATEX)}}}
\begin{{tabular}}{{l{"r" * len(table.columns)}}}
\toprule
{first}\midrule
{"".join(others)}\bottomrule
\end{{tabular}}
\end{{table}}
"""


def to_terminal(table: Table, *, width: int | None = None) -> str:
    """Returns a table for the terminal, with colours only where stdout is one; `width` None is the terminal's width."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # Text, not str: rich would read the [SEG] in a name as markup.
    rich_table = RichTable(title=Text(table.title))
    rich_table.add_column("")
    for column in table.columns:
        rich_table.add_column(Text(column), justify="right")
    for name, cells in _cells(table):
        shown = [Text(number + interval, "bold" if is_best else "") for number, interval, is_best in cells]
        rich_table.add_row(Text(name), *shown)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(rich_table)
    return capture.get()


def _cells(table: Table) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Returns each row's name and cells: number, interval, and whether the number is its column's best as printed."""
    values = {name: [c.value if isinstance(c, Figure) else c for c in cells] for name, cells in table.rows.items()}
    best: list[str | None] = []
    for _, *column in zip(table.columns, *values.values(), strict=True):
        known = [value for value in column if value is not None]
        best.append(_percentage(max(known)) if len(known) > 1 else None)
    rows = []
    for name, cells in table.rows.items():
        shown = []
        for cell, value, top in zip(cells, values[name], best, strict=True):
            interval = ""
            if table.intervals and isinstance(cell, Figure):
                interval = f" [{_percentage(cell.low)}, {_percentage(cell.high)}]"
            shown.append((_percentage(value), interval, _percentage(value) == top))
        rows.append((name, shown))
    return rows


def _with_bold(cells: Sequence[tuple[str, str, bool]], bold: str) -> list[str]:
    return [(bold.format(number) if is_best else number) + interval for number, interval, is_best in cells]


def _percentage(value: float | None) -> str:
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"  # + 0.0 turns -0.0 into 0.0


_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # at the start of a row it would be the optional argument of the \\ before it, and so would *
    "*": "{*}",
}
_MARKDOWN = {sign: "\\" + sign for sign in "\\|*_`<"}


def _escaped(text: str, signs: Mapping[str, str]) -> str:
    return " ".join(text.split()).translate(str.maketrans(dict(signs)))
