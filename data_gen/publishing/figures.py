"""The figures of a data set: the word cloud and the frequencies of the paper's Figure 4, and four more.

They are drawn without a window and hold no date, so the same numbers give the same files.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from wordcloud import STOPWORDS, WordCloud

from data_gen.publishing.statistics import Statistics

MOST_CATEGORIES = 120  # bars of the frequency plot; the paper has 109 categories
_AUTHORS = {
    "models": "written by models",
    "offline": "made by the offline author",
    "models and offline": "written by models and the offline author",
}
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#e69f00", "#009e73", "#666666"


def draw_figures(statistics: Statistics, folder: Path) -> list[str]:
    """Writes the figures that have something to show as PNG into a folder; returns the names of the files."""
    drawn: list[str] = []
    for name, values in (("cloud_categories.png", statistics.pairs), ("cloud_questions.png", statistics.words)):
        if values:
            _cloud(values, folder / name, stop=name == "cloud_questions.png")
            drawn.append(name)
    for name, plot, values in (
        ("frequency.png", _frequency, statistics.pairs),
        ("lengths.png", _lengths, statistics.answer_words),
        ("perspectives.png", _perspectives, sum(statistics.cells.values())),
        ("dropped.png", _dropped, statistics.dropped or statistics.faults),
    ):
        if values:
            # Without this matplotlib writes its version into the file.
            plot(statistics).savefig(folder / name, dpi=150, metadata={"Software": None})
            drawn.append(name)
    return drawn


def _cloud(values: dict[str, int], path: Path, *, stop: bool) -> None:
    """Draws words sized by their counts; `stop` leaves out stop words, unless there are no others."""
    kept = {word: count for word, count in values.items() if not (stop and word in STOPWORDS)}
    cloud = WordCloud(
        width=1400,
        height=900,
        background_color="white",
        colormap="Dark2",
        max_words=200,
        random_state=0,
        font_path=str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"),
        prefer_horizontal=0.9,
    )
    cloud.generate_from_frequencies(kept or values).to_image().save(path)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    # Not pyplot: no window system, and nothing stays in memory.
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _frequency(statistics: Statistics) -> Figure:
    names = list(statistics.pairs)[:MOST_CATEGORIES]
    figure, axes = _figure(max(6.0, 0.19 * len(names) + 1.5), 7.0, rows=2)
    for ax, values, label, color in (
        (axes[0], statistics.pairs, "question-answer pairs", _BLUE),
        (axes[1], statistics.images, "images", _ORANGE),
    ):
        ax.bar(range(len(names)), [values[name] for name in names], color=color, width=0.75)
        ax.set_ylabel(label)
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlim(-0.7, len(names) - 0.3)
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    axes[0].set_xticks([])
    axes[1].set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    left = len(statistics.pairs) - len(names)
    more = f" (and {left} more)" if left else ""
    axes[0].set_title(f"{len(statistics.pairs)} categories{more}: {_AUTHORS.get(statistics.author, statistics.author)}")
    return figure


def _lengths(statistics: Statistics) -> Figure:
    figure, (left, right) = _figure(10.0, 3.6, columns=2)
    for (length, counts), color in zip(statistics.question_words.items(), (_BLUE, _ORANGE), strict=True):
        left.bar(list(counts), list(counts.values()), color=color, alpha=0.6, label=length, width=0.9)
    left.legend(frameon=False)
    left.set_xlabel("words of a question")
    left.set_ylabel("pairs")
    right.bar(list(statistics.answer_words), list(statistics.answer_words.values()), color=_GREEN, width=0.9)
    right.set_xlabel("words of an answer")
    return figure


def _perspectives(statistics: Statistics) -> Figure:
    figure, (ax,) = _figure(6.0, 2.8)
    names, counts = list(statistics.cells), list(statistics.cells.values())
    total = sum(counts)
    bars = ax.barh(names, counts, color=[_BLUE, _BLUE, _ORANGE, _ORANGE])
    ax.bar_label(bars, [f"{count:,} ({count / total:.0%})" for count in counts], padding=3)
    ax.set_xlim(0, 1.25 * max(counts))
    ax.invert_yaxis()
    ax.set_xlabel("pairs")
    return figure


def _dropped(statistics: Statistics) -> Figure:
    rules = sorted(statistics.dropped.keys() | statistics.faults.keys())
    figure, (ax,) = _figure(7.0, 1.6 + 0.45 * len(rules))
    shown = [(statistics.dropped, _ORANGE, "dropped for good")]
    if statistics.faults:
        shown.insert(0, (statistics.faults, _GREY, "objected to, then asked again"))
    height = 0.8 / len(shown)
    for number, (counts, color, label) in enumerate(shown):
        places = [place + (number - (len(shown) - 1) / 2) * height for place in range(len(rules))]
        ax.barh(places, [counts.get(rule, 0) for rule in rules], height, color=color, label=label)
    ax.set_yticks(range(len(rules)), rules)
    ax.set_ylim(len(rules) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("times")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure
