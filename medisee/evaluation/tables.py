"""Tables of figures as text: terminal, markdown, LaTeX, CSV. Values are fractions of 1 and are printed as percentages.

The best value of a column (the highest, as it is printed) is bold wherever at least two can be compared.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medisee.foundation.errors import InputError


@dataclass(frozen=True, slots=True)
class Row:
    """One system's figures: a value a column, None where there is none; `ci` is empty or (low, high) a column."""

    name: str
    values: Sequence[float | None]
    ci: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of figures under named columns.

    Raises:
        InputError: a row is not as long as `columns`, or holds NaN or infinity.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]

    def __post_init__(self) -> None:
        problems: list[str] = []
        for row in self.rows:
            where = f"table {self.title!r}, row {row.name!r}"
            if len(row.values) != len(self.columns) or len(row.ci) not in (0, len(self.columns)):
                problems.append(
                    f"{where}: {len(row.values)} values and {len(row.ci)} intervals; expected {len(self.columns)}, "
                    "one a column (intervals may be left out); fill in None."
                )
            numbers = [*row.values, *(end for ci in row.ci if ci for end in ci)]
            if not all(math.isfinite(number) for number in numbers if number is not None):
                problems.append(
                    f"{where}: {list(row.values)}; expected finite numbers; write None where there is none."
                )
        if problems:
            raise InputError(problems)


def to_markdown(table: Table, percent: bool = True, digits: int = 1) -> str:
    """Returns a GitHub table under its title.

    Args:
        table: fractions of 1.
        percent: print 0.567 as 56.7.
        digits: digits after the point.
    """
    escape = _escaper(_MARKDOWN)
    rows = _cells(table, percent, digits, "**{}**")
    lines = [
        ["", *map(escape, table.columns)],
        [":--", *("--:" for _ in table.columns)],
        *([escape(row.name), *cells] for row, cells in zip(table.rows, rows, strict=True)),
    ]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{escape(table.title)}**\n\n{body}\n"


def to_latex(table: Table, percent: bool = True, digits: int = 1) -> str:
    """Returns a table environment for the booktabs package; the arguments are those of `to_markdown`."""
    escape = _escaper(_LATEX)
    rows = _cells(table, percent, digits, r"\textbf{{{}}}")
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(["", *map(escape, table.columns)]) + r" \\",
        r"\midrule",
        *(" & ".join([escape(row.name), *cells]) + r" \\" for row, cells in zip(table.rows, rows, strict=True)),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(table: Table, percent: bool = True, digits: int = 1) -> str:
    """Returns comma-separated values without the title; a column with intervals is followed by its low and high.

    The arguments are those of `to_markdown`.
    """
    has_ci = [any(row.ci and row.ci[index] for row in table.rows) for index in range(len(table.columns))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = [
        name
        for column, wide in zip(table.columns, has_ci, strict=True)
        for name in ([column, f"{column} low", f"{column} high"] if wide else [column])
    ]
    writer.writerow(["name", *header])
    for row in table.rows:
        cells: list[str] = []
        for index, wide in enumerate(has_ci):
            low, high = (row.ci[index] if row.ci else None) or (None, None)
            numbers = [row.values[index], low, high] if wide else [row.values[index]]
            cells.extend(_number(number, percent, digits) for number in numbers)
        writer.writerow([row.name, *cells])
    return text.getvalue()


def to_terminal(table: Table, percent: bool = True, digits: int = 1, *, width: int | None = None) -> str:
    """Returns a table for the terminal, with colours only where stdout is one.

    Args:
        table: fractions of 1.
        percent: print 0.567 as 56.7.
        digits: digits after the point.
        width: columns of text; None is the terminal's own.
    """
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # Text, not str: rich would read the [SEG] in a name as its markup.
    rich_table = RichTable(title=Text(table.title))
    rich_table.add_column("")
    for column in table.columns:
        rich_table.add_column(Text(column), justify="right")
    best = _best(table, percent, digits)
    for row, cells in zip(table.rows, _cells(table, percent, digits, "{}"), strict=True):
        values = [_number(value, percent, digits) for value in row.values]
        styles = ["bold" if value == top else "" for value, top in zip(values, best, strict=True)]
        rich_table.add_row(Text(row.name), *(Text(cell, style=s) for cell, s in zip(cells, styles, strict=True)))
    console = Console(width=width)
    with console.capture() as capture:
        console.print(rich_table)
    return capture.get()


def _cells(table: Table, percent: bool, digits: int, bold: str) -> list[list[str]]:
    best = _best(table, percent, digits)
    rows: list[list[str]] = []
    for row in table.rows:
        cells: list[str] = []
        for value, ci, top in zip(row.values, row.ci or [None] * len(table.columns), best, strict=True):
            text = _number(value, percent, digits)
            cell = bold.format(text) if text == top else text
            interval = ", ".join(_number(end, percent, digits) for end in ci or ())
            cells.append(f"{cell} [{interval}]" if interval else cell)
        rows.append(cells)
    return rows


def _best(table: Table, percent: bool, digits: int) -> list[str | None]:
    """Returns each column's highest value as it is printed, so that values that print alike are all bold."""
    best: list[str | None] = []
    for column in zip(*(row.values for row in table.rows), strict=True) if table.rows else ():
        values = [value for value in column if value is not None]
        best.append(_number(max(values), percent, digits) if len(values) > 1 else None)
    return best


def _number(value: float | None, percent: bool, digits: int) -> str:
    if value is None:
        return "-"
    rounded = round(100 * value if percent else value, digits)
    return f"{rounded + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0


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


def _escaper(signs: dict[str, str]) -> Callable[[str], str]:
    table = str.maketrans(signs)
    return lambda text: " ".join(text.split()).translate(table)
