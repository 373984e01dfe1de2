"""The report of `silotune site prepare`: one HTML file that reads offline and stays at the site.

It shows counts of private records, and of no record a value: row numbers, the contract's own words,
and texts of rows that are drawn from the public schema. Nothing is loaded and no script runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from silotune.client.preparation.cleaning import (
    DROPPED,
    EMPTIED,
    LEFT,
    REFUSED,
    REPLACED,
    REWRITTEN,
    Prepared,
    Problem,
)
from silotune.client.preparation.profile import MISSING, Counts
from silotune.common.runtime.plotting import Plot, paint, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 8.2  # inches; at the page's width a point is then about a CSS point
LINE = 0.27  # inches of height for each bar
MAX_COLUMNS = 24  # whose choices are drawn
MAX_BARS = 30
LONGEST = 30  # characters of a bar's name; all of it stands in the table beside

NAMES = ("ink", "muted", "line", "accent", "good", "fair", "bad")
PAINT = paint(NAMES)
COLOURS = {
    REFUSED: "bad",
    DROPPED: "fair",
    EMPTIED: "fair",
    REPLACED: "fair",
    REWRITTEN: "fair",
    LEFT: "muted",
}


def render(facts: Mapping[str, Any], prepared: Prepared, counts: Counts) -> str:
    """The page. facts: what else stands in it (client/preparation/report.html.j2)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("silotune.client.preparation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template("report.html.j2").render(
        **facts,
        prepared=prepared,
        counts=counts,
        plots=draw(prepared, counts),
    )


def draw(prepared: Prepared, counts: Counts) -> list[Plot]:
    """The figures. Global settings of matplotlib are as before when this returns."""
    import matplotlib

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 9,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.spines.bottom": False,
        "axes.labelcolor": PAINT["muted"],
        "axes.axisbelow": True,
        "grid.color": PAINT["line"],
        "grid.linewidth": 0.7,
        "text.color": PAINT["ink"],
        "xtick.color": PAINT["muted"],
        "ytick.color": PAINT["ink"],
        "axes.titlesize": 9,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.titlecolor": PAINT["ink"],
    }
    found = []
    figures: tuple[Callable[[], Plot], ...] = (
        partial(_rows, prepared),
        partial(_problems, prepared.problems),
        partial(_labels, counts),
        partial(_missing, counts),
        partial(_choices, counts),
        partial(_tokens, counts),
    )
    for number, make in enumerate(figures):
        # The salt makes ids reproducible, and distinct between figures of one page.
        salted = style | {"svg.hashsalt": f"prepare-{number}"}
        with matplotlib.rc_context(salted), warnings.catch_warnings():
            # The reader's browser has the glyphs; matplotlib only measures them.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            found.append(make())
    return found


def _rows(prepared: Prepared) -> Plot:
    kept, word = len(prepared.table.rows), "fit" if prepared.refused else "kept"
    bars = [(word, kept, "accent")]
    bars += [(reason, n, "bad") for reason, n in prepared.left_out.items()]
    alt = f"{word.capitalize()}: {kept:,} of {prepared.read:,} rows. Each row that is not counts "
    return Plot("Rows", f"{alt}under one reason.", _bars(bars, prepared.read))


def _problems(problems: Sequence[Problem]) -> Plot:
    title = "Problems, by what was done about them"
    if not problems:
        return Plot(title, "There is no problem in any row.")
    bars = [(f"{p.sentence}", p.count, COLOURS[p.done]) for p in problems]
    return Plot(title, f"{len(bars)} kinds of problem, listed in the table above.", _bars(bars))


def _labels(counts: Counts) -> Plot:
    bars = [(name, n, "accent") for name, n in counts.targets.items()]
    alt = ", ".join(f"{name} {n:,}" for name, n, _ in bars[:MAX_BARS])
    whole = sum(n for _, n, _ in bars)
    return Plot("Labels of these rows", f"{alt}.", _bars(bars, whole))


def _missing(counts: Counts) -> Plot:
    title, missing = "Missing by column", counts.missing
    if not any(missing.values()):
        return Plot(title, "No cell is missing.")
    bars = [(name, n, "fair") for name, n in missing.items()]
    return Plot(title, f"Of {counts.rows:,} rows each.", _bars(bars, counts.rows))


def _choices(counts: Counts) -> Plot:
    """A small chart for each column, in the contract's order of choices."""
    from matplotlib.figure import Figure

    title = "Choices by column"
    found = {name: choices for name, choices in counts.choices.items() if len(choices) > 2}
    if not found or not counts.rows:
        return Plot(title, "The contract's inputs are texts: they have no choices.")
    shown, across = dict(list(found.items())[:MAX_COLUMNS]), 3
    lines = [list(shown.items())[i : i + across] for i in range(0, len(shown), across)]
    heights = [max(len(choices) for _, choices in line) for line in lines]
    figure = Figure(figsize=(WIDTH, sum(heights) * 0.2 + 0.52 * len(lines)), layout="constrained")
    grid = figure.add_gridspec(len(lines), across, height_ratios=[h + 1.5 for h in heights])
    for row, (line, height) in enumerate(zip(lines, heights, strict=True)):
        for column, (name, choices) in enumerate(line):
            axes = figure.add_subplot(grid[row, column])
            names = [_short(word or "missing", 20) for word in choices]
            colours = [PAINT["accent" if word != MISSING else "fair"] for word in choices]
            axes.barh(range(len(names)), list(choices.values()), color=colours, height=0.72)
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set_ylim(height - 0.4, -0.6)
            axes.set_xlim(0, max(1, *choices.values()) * 1.35)
            axes.set_xticks([])
            axes.set_title(_short(name, LONGEST), loc="left", weight="bold")
            for at, n in enumerate(choices.values()):
                axes.annotate(
                    f"{n:,}",
                    (n, at),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    color=PAINT["muted"],
                )
    more = len(found) - len(shown)
    alt = f"{len(shown)} columns" + (f"; {more} more are not drawn." if more else ".")
    return Plot(title, alt, svg_of(figure, NAMES))


def _tokens(counts: Counts) -> Plot:
    from matplotlib.figure import Figure

    title = "Length of the texts in tokens"
    lengths = counts.lengths
    if not lengths.texts:
        return Plot(title, "Nothing was tokenised: the model reads no text.")
    if not lengths.exact:
        return Plot(title, f"model.folder in site.toml has no tokenizer.json. {lengths.sentence}.")
    limit, longest = lengths.limit, len(lengths.tokens) - 1
    size = max(1, -(-longest // 60))  # tokens a bar, for at most 60 of them
    sums = [sum(lengths.tokens[i : i + size]) for i in range(0, longest + 1, size)]
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    starts = [i * size for i in range(len(sums))]
    axes.bar(
        starts,
        sums,
        width=size * 0.9,
        align="edge",
        color=[PAINT["accent" if start <= limit else "bad"] for start in starts],
    )
    axes.grid(axis="y")
    axes.set_xlim(0, max(longest + size, limit * 1.28))
    axes.axvline(limit, color=PAINT["ink"], linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate(
        f"the model cuts at {limit}",
        (limit, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -3),
        textcoords="offset points",
        ha="left",
        va="top",
        color=PAINT["muted"],
    )
    axes.set_xlabel("tokens")
    axes.yaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
    axes.yaxis.label.set_color(PAINT["muted"])
    axes.set_ylabel("texts")
    axes.locator_params(axis="y", nbins=5, integer=True)
    return Plot(title, f"{lengths.sentence}.", svg_of(figure, NAMES))


def _bars(bars: Sequence[tuple[str, int, str]], whole: int = 0) -> str:
    """Horizontal bars with their numbers; whole: what percentages are of."""
    from matplotlib.figure import Figure

    shown = bars[:MAX_BARS]
    figure = Figure(figsize=(WIDTH, LINE * len(shown) + 0.1), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(
        range(len(shown)),
        [n for _, n, _ in shown],
        color=[PAINT[colour] for _, _, colour in shown],
        height=0.66,
    )
    axes.set_yticks(range(len(shown)), [_short(name, 2 * LONGEST) for name, _, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, max(1, *(n for _, n, _ in shown)) * 1.22)
    axes.set_xticks([])
    for at, (_, n, _) in enumerate(shown):
        share = f" · {n / whole:.1%}" if whole else ""
        axes.annotate(
            f"{n:,}{share}",
            (n, at),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=PAINT["muted"],
        )
    return svg_of(figure, NAMES)


def _short(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
