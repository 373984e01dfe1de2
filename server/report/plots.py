"""The plots of a report: metric by round, epsilon by round, variants by site. Inline SVG, no
script."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from silotune.common.runtime.plotting import Plot, paint, svg_of
from silotune.server.report.formatting import DASH, finite, number, small

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 12  # what fits on one printed page
WIDTH = 8.2  # inches; at the page's width a point is then about a CSS point

# s0 to s5 are Okabe and Ito's, without yellow.
NAMES = ("ink", "muted", "line", "band", "accent", "paper", "s0", "s1", "s2", "s3", "s4", "s5")
PAINT = paint(NAMES)
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def rows_of(result: Mapping[str, Any], *keys: str) -> Sequence[Mapping[str, Any]]:
    found: Any = result
    for key in keys:
        found = (found or {}).get(key)
    return found or []


def main_variant(result: Mapping[str, Any]) -> Mapping[str, Any]:
    variants = rows_of(result, "variants")
    return next(
        (variant for variant in variants if variant.get("main")), variants[0] if variants else {}
    )


def metric_of(result: Mapping[str, Any]) -> tuple[str, str]:
    """Key and label of the metric that models are compared by."""
    metric = result.get("metric") or {}
    name = str(metric.get("name") or "metric")
    return name, str(metric.get("label") or name)


def site_names(result: Mapping[str, Any]) -> list[str]:
    """Every site that is named anywhere, in the order of the data."""
    listed = [s.get("site") for k in ("data", "privacy") for s in rows_of(result, k, "sites")]
    scored = [
        site for variant in rows_of(result, "variants") for site in variant.get("sites") or {}
    ]
    return [str(site) for site in dict.fromkeys([*listed, *scored]) if site is not None]


def total(result: Mapping[str, Any], part: str) -> int | None:
    """Records of all sites together; None as soon as one site's number is not known."""
    counts: list[Any] = [row.get(part) for row in rows_of(result, "data", "sites")]
    return sum(counts) if counts and all(isinstance(count, int) for count in counts) else None


def points_of(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in pairs if finite(x) and finite(y)]


def mean_of(cell: Any) -> Any:
    return cell.get("mean") if cell else None


def short(text: Any, length: int) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def stated(result: Mapping[str, Any]) -> bool:
    """Whether epsilon may be shown at all: delta and accountant stand beside it."""
    privacy = result.get("privacy") or {}
    return privacy.get("delta") is not None and bool(privacy.get("accountant"))


def draw(result: Mapping[str, Any]) -> list[Plot]:
    """The three figures. Global settings of matplotlib are as before when this returns."""
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
        "axes.edgecolor": PAINT["muted"],
        "axes.labelcolor": PAINT["muted"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": PAINT["line"],
        "grid.linewidth": 0.7,
        "text.color": PAINT["ink"],
        "xtick.color": PAINT["muted"],
        "ytick.color": PAINT["muted"],
        "xtick.major.size": 3,
        "ytick.major.size": 0,
    }
    plots = []
    for make in (_draw_curve, _draw_epsilon, _draw_variants):
        # The salt makes ids reproducible, and distinct between figures of one page.
        salted = style | {"svg.hashsalt": make.__name__}
        with matplotlib.rc_context(salted), warnings.catch_warnings():
            # The reader's browser has the glyphs; matplotlib only measures them.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            plots.append(make(result))
    return plots


def _draw_curve(result: Mapping[str, Any]) -> Plot:
    curve, (_, label) = rows_of(result, "curve"), metric_of(result)
    title = f"{label} by round, {main_variant(result).get('label') or 'main variant'}"
    points = points_of((row.get("round"), row.get("metric")) for row in curve)
    if not points:
        return Plot(title, "No round of this run was evaluated, so there is nothing to plot.")
    figure, axes = _round_axes(curve, 2.7, right=0.6)
    axes.plot(
        *zip(*points, strict=True),
        color=PAINT["accent"],
        linewidth=1.6,
        marker="o",
        markersize=3.6,
        clip_on=False,
    )
    axes.annotate(
        number(points[-1][1]),
        points[-1],
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=PAINT["accent"],
        weight="bold",
        annotation_clip=False,
    )
    axes.set_ylabel(short(label, 40))
    axes.margins(y=0.12)
    low, high = (pick(points, key=lambda p: p[1]) for pick in (min, max))
    (a, first), (b, last), (c, least), (d, most) = points[0], points[-1], low, high
    alt = (
        f"Line plot. {label} is {number(first)} in round {a} and {number(last)} in round {b}; "
        f"lowest {number(least)} in round {c}, highest {number(most)} in round {d}."
    )
    return Plot(title, alt, svg_of(figure, NAMES))


def _draw_epsilon(result: Mapping[str, Any]) -> Plot:
    """One line for all sites that spend the same, as sites of one contract do; named at its end."""
    curve, privacy = rows_of(result, "curve"), result.get("privacy") or {}
    title = "Privacy spent by round and site, against the budget"
    lines: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for site in site_names(result):
        spent = points_of((r.get("round"), (r.get("epsilon") or {}).get(site)) for r in curve)
        if spent:
            lines.setdefault(tuple(spent), []).append(site)
    if privacy.get("insecure"):
        return Plot(title, "The noise is from a known seed and gives no privacy: nothing to plot.")
    if not lines or not stated(result):
        return Plot(title, "No ε with its δ and accountant was recorded by round: nothing to plot.")
    terms = f"δ = {small(privacy['delta'])}, {privacy['accountant']}"
    figure, axes = _round_axes(curve, 3.0, right=1.75)
    top = max(points[-1][1] for points in lines)
    if finite(privacy.get("epsilon")):
        top = max(top, privacy["epsilon"])
        axes.axhline(privacy["epsilon"], color=PAINT["ink"], linewidth=1.2)
        axes.annotate(
            f"budget: ε = {number(privacy['epsilon'], 2)} ({short(terms, 40)})",
            (0, privacy["epsilon"]),
            xycoords=("axes fraction", "data"),
            xytext=(2, 4),
            textcoords="offset points",
            weight="bold",
        )
    top = top * 1.14 or 1.0
    axes.set_ylim(0, top)
    # From the highest end down; each label stands at least a line lower than the one above it.
    place, ends = math.inf, []
    for i, (points, sites) in enumerate(sorted(lines.items(), key=lambda line: -line[0][-1][1])):
        last = number(points[-1][1], 2)
        line: dict[str, Any] = {"color": PAINT[f"s{i % 6}"], "linestyle": DASHES[i % 4]}
        axes.plot(
            *zip(*points, strict=True),
            **line,
            linewidth=1.8,
            marker="o" if len(points) == 1 else None,
        )
        ends.append(f"{', '.join(sites)}: {last}")
        if len(lines) <= 12:
            name = short(sites[0], 18) if len(sites) == 1 else f"{len(sites)} sites"
            place = min(points[-1][1], place - 0.068 * top)
            axes.annotate(
                f"{name}  {last}",
                points[-1],
                xytext=(1.05, place),
                textcoords=axes.get_yaxis_transform(),
                va="center",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "shrinkA": 1, **line},
            )
    axes.set_ylabel(f"ε ({short(terms, 40)})")
    alt = (
        f"Line plot of the ε spent so far, at {terms}. Budget {number(privacy.get('epsilon'), 2)}. "
        f"At the end, {'; '.join(ends)}."
    )
    return Plot(title, alt, svg_of(figure, NAMES))


def _draw_variants(result: Mapping[str, Any]) -> Plot:
    """One small panel for each site, one row for each variant: nothing depends on telling
    colours."""
    variants, main, (metric, label) = (
        rows_of(result, "variants"),
        main_variant(result),
        metric_of(result),
    )
    panels = [
        ("All test rows", [(variant.get("metrics") or {}).get(metric) for variant in variants])
    ]
    panels += [
        (s, [(variant.get("sites") or {}).get(s) for variant in variants])
        for s in site_names(result)
    ]
    panels = [(s, cells) for s, cells in panels if any(finite(mean_of(c)) for c in cells)]
    title = f"{label} of each variant, over all test rows and by site"
    if len(panels) > MAX_PANELS:
        title += f" (the first {MAX_PANELS - 1} of {len(panels) - 1} sites; the table has all)"
        panels = panels[:MAX_PANELS]
    if not panels:
        return Plot(title, "No variant was evaluated, so there is nothing to plot.")
    rows = math.ceil(len(panels) / 3)
    columns = math.ceil(len(panels) / rows)
    inches = rows * (0.24 * len(variants) + 0.75) + 0.2
    figure = _figure(inches)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=2.15 / WIDTH,
        right=0.99,
        wspace=0.12,
        hspace=0.75 * rows / inches,
        top=1 - 0.28 / inches,
        bottom=0.5 / inches,
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for (name, cells), axes in zip(panels, grid.flat, strict=False):
        axes.set_title(short(name, 20), fontsize=9, weight="bold", loc="left", pad=6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(labelbottom=True)
        for y, (variant, cell) in enumerate(zip(variants, cells, strict=True)):
            if variant is main:
                axes.axhspan(y - 0.5, y + 0.5, color=PAINT["band"], linewidth=0)
            if not finite(mean_of(cell)):
                axes.text(
                    0.5,
                    y,
                    DASH,
                    color=PAINT["muted"],
                    ha="center",
                    va="center",
                    transform=axes.get_yaxis_transform(),
                )
                continue
            colour = PAINT["accent" if variant is main else "muted"]
            noised = variant.get("private") and variant.get("epsilon") is not None
            spread = cell.get("sd") if cell and (variant.get("repeats") or 1) > 1 else None
            axes.errorbar(
                [mean_of(cell)],
                [y],
                xerr=spread,
                fmt="o",
                color=colour,
                capsize=2.5,
                markersize=5.5 if variant is main else 4.5,
                elinewidth=1.3,
                zorder=3,
                markerfacecolor=colour if noised else PAINT["paper"],
            )
            if variant is main:
                axes.axvline(mean_of(cell), color=colour, linewidth=0.9, linestyle=(0, (2, 2)))
    grid[0, 0].set_yticks(
        range(len(variants)), [short(a.get("label") or a.get("name"), 32) for a in variants]
    )
    for axes in grid[:, 0]:
        for tick, variant in zip(axes.get_yticklabels(), variants, strict=True):
            tick.set(color=PAINT["ink"], weight="bold" if variant is main else "normal")
    grid[0, 0].set_ylim(len(variants) - 0.5, -0.5)
    grid[0, 0].margins(x=0.12)
    low, high = grid[0, 0].get_xlim()
    widen = max(0.0, 0.1 - (high - low)) / 2  # variants that are equal should look equal
    grid[0, 0].set_xlim(low - widen, high + widen)
    grid[0, 0].locator_params(axis="x", nbins=4)
    figure.supxlabel(
        short(label, 60), fontsize=9, color=PAINT["muted"], y=0.01, x=(2.15 / WIDTH + 0.99) / 2
    )
    alt = (
        f"Dot plot with error bars of {label} for {len(variants)} variants, in panels for "
        f"{', '.join(name for name, _ in panels)}. The numbers stand in the table below."
    )
    return Plot(title, alt, svg_of(figure, NAMES))


def _figure(inches: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, inches))


def _round_axes(
    curve: Sequence[Mapping[str, Any]], inches: float, right: float
) -> tuple[Figure, Axes]:
    """Axes over the rounds of a run, `right` inches kept free beside them, phases named above."""
    figure = _figure(inches)
    axes = figure.add_axes(
        (0.6 / WIDTH, 0.45 / inches, 1 - (0.6 + right) / WIDTH, 1 - 0.75 / inches)
    )
    rounds = [row for row in curve if finite(row.get("round"))]
    for i, (phase, group) in enumerate(groupby(rounds, key=lambda row: row.get("phase"))):
        members = [row["round"] for row in group]
        if i % 2 == 0:
            axes.axvspan(members[0] - 0.5, members[-1] + 0.5, color=PAINT["band"], linewidth=0)
        if phase is not None:
            axes.text(
                members[0] - 0.5,
                1.03,
                f"phase: {short(phase, 24)}",
                transform=axes.get_xaxis_transform(),
                color=PAINT["muted"],
            )
    axes.set_xlim(rounds[0]["round"] - 0.5, rounds[-1]["round"] + 0.5)
    axes.grid(axis="x", visible=False)
    axes.locator_params(axis="x", integer=True)
    axes.locator_params(axis="y", nbins=6)
    axes.set_xlabel("Round")
    return figure, axes
