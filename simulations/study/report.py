"""A study's table and pictures."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.client.privacy.accountant import RDP
from silotune.common.tasks.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 12  # that are distinguishable
LINES = 8  # in a panel, where there are more of them
# Okabe and Ito's, without yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % confidence interval (Student's t, n - 1 degrees of
    freedom); 0 for one value, which has none. It is of fresh noise, and fresh partitions where rows
    are dealt; the rows scored are always the same."""
    from scipy.stats import t

    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return mean, 0.0
    return mean, float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def _formatted(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}" if len(values) > 1 else f"{mean:.3f}"


def epsilons_of(found: dict[str, Any]) -> list[float]:
    """As they are in the study; without DP is infinity."""
    return [math.inf if e is None else float(e) for e in found["study"]["epsilons"]]


def values_of(found: dict[str, Any], variant: str, epsilon: float, partition: str) -> list[float]:
    """The metric of each repeat that is there."""
    asked = None if math.isinf(epsilon) else epsilon
    return [
        cell["scores"][found["metric"]]
        for cell in found["cells"].values()
        if (cell["variant"], cell["epsilon"], cell["partition"]) == (variant, asked, partition)
        and found["metric"] in cell["scores"]
    ]


def _diverged(found: dict[str, Any], variant: str, epsilon: float, partition: str) -> bool:
    """Whether a repeat has no figure: the mean of the others says nothing."""
    asked = None if math.isinf(epsilon) else epsilon
    return any(
        cell.get("stopped")
        and (cell["variant"], cell["epsilon"], cell["partition"]) == (variant, asked, partition)
        for cell in found["cells"].values()
    )


def markdown(found: dict[str, Any]) -> str:
    """A table for each partition: variants by ε, mean ± half the 95 % interval."""
    study, metric = found["study"], METRICS[found["metric"]]
    epsilons = epsilons_of(found)
    commits = sorted({cell["commit"] for cell in found["cells"].values()})
    machines = Counter(cell["machine"] for cell in found["cells"].values())
    where = [name + f" ({n} cells)" * (len(machines) > 1) for name, n in sorted(machines.items())]
    held = study.get("validation")
    rows = "a quarter of the training rows" if held else "the public rows"
    runs = (
        "one run each"
        if study["repeats"] == 1
        else (
            f"{study['repeats']} repeats, ± half the 95 % interval of the mean over fresh noise "
            "(and fresh partitions), the rows scored being the same"
        )
    )
    whole = (
        study["repeats"]
        * len(study["partitions"])
        * sum(len(variant.get("epsilons") or epsilons) for variant in study["variants"].values())
    )
    accountant = found.get("accountant", RDP)  # which older studies do not name
    lines = [
        f"# {found['title']}",
        "",
        f"{metric} on {rows} of `{found['recipe']}`; {runs}; δ {found['delta']:g}, {accountant}, "
        f"per {found['unit']}."
        + (f" Commit {', '.join(commits)}; {'; '.join(where)}." if commits else ""),
    ]
    if len(found["cells"]) < whole:
        lines.append(f"{len(found['cells'])} of {whole} cells are there.")
    for partition in study["partitions"]:
        lines += [
            "",
            f"**{partition}**",
            "",
            "| variant | "
            + " | ".join("no DP" if math.isinf(e) else f"ε {e:g}" for e in epsilons)
            + " |",
            "|---" * (len(epsilons) + 1) + "|",
        ]
        for variant in study["variants"]:
            cells = []
            for epsilon in epsilons:
                diverged = _diverged(found, variant, epsilon, partition)
                values = values_of(found, variant, epsilon, partition)
                cells.append("diverged" if diverged else _formatted(values))
            lines.append(f"| {variant} | {' | '.join(cells)} |")
    fooled = {
        variant: [
            c["triggered"]["accuracy"]
            for c in found["cells"].values()
            if c["variant"] == variant and c.get("triggered", {}).get("accuracy") is not None
        ]
        for variant in study["variants"]
    }
    if study.get("by_site") or any(
        variant["rows"] != "federated" for variant in study["variants"].values()
    ):
        lines += _of_sites(found, epsilons)
    lines += _gains(found, epsilons)
    if any(fooled.values()):
        lines += [
            "",
            "Rows with the backdoor's trigger that are told as the attacker's label (all "
            "ε and partitions; of honest variants what the trigger does by itself): "
            + ", ".join(
                f"{variant} {statistics.fmean(values):.0%}"
                for variant, values in fooled.items()
                if values
            )
            + ".",
        ]
    declined = {
        variant: [c["declined"] for c in found["cells"].values() if c["variant"] == variant]
        for variant, settings in study["variants"].items()
        if "gate" in settings["contract"].get("aggregation", {})
    }
    if any(declined.values()):
        lines += [
            "",
            "Rounds of a run whose sum the gate did not take (mean over all ε and "
            "partitions): "
            + ", ".join(
                f"{variant} {statistics.fmean(values):.1f}"
                for variant, values in declined.items()
                if values
            )
            + ".",
        ]
    lost = residuals(found)
    if lost:
        lines += [
            "",
            "What averaging the factors apart makes wrong, as a share of a round's step "
            "(largest of any round): "
            + ", ".join(f"{variant} {value:.2g}" for variant, value in lost.items())
            + ".",
        ]
    return "\n".join(lines) + "\n"


def _of_sites(found: dict[str, Any], epsilons: Sequence[float]) -> list[str]:
    """What each site's own public rows get: from the site's model where it has one of its own."""
    study, lines = found["study"], []
    sites = list(dict.fromkeys(s for cell in found["cells"].values() for s in cell["sites"]))
    for partition in study["partitions"]:
        for epsilon in epsilons:
            asked = None if math.isinf(epsilon) else epsilon
            title = "no DP" if asked is None else f"ε {epsilon:g}"
            lines += [
                "",
                f"**{partition}, each site's own rows, {title}**",
                "",
                "| variant | " + " | ".join(sites) + " |",
                "|---" * (len(sites) + 1) + "|",
            ]
            for variant in study["variants"]:
                cells = []
                for site in sites:
                    values = [
                        value
                        for cell in found["cells"].values()
                        if (cell["variant"], cell["epsilon"], cell["partition"])
                        == (variant, asked, partition)
                        and (value := cell["sites"].get(site, {}).get(found["metric"])) is not None
                    ]
                    cells.append(_formatted(values))
                lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def _gains(found: dict[str, Any], epsilons: Sequence[float]) -> list[str]:
    """How much more a site's own model has on the site's rows than the released one of its run."""
    cells, metric = found["cells"].values(), found["metric"]
    sites = list(dict.fromkeys(site for cell in cells for site in cell.get("released", {})))
    lines = [
        "",
        "**What a site's own model gains over the released one, on the site's rows**",
        "",
        "| variant | " + " | ".join([*sites, "mean"]) + " |",
        "|---" * (len(sites) + 2) + "|",
    ]
    for partition in found["study"]["partitions"]:
        for variant in found["study"]["variants"]:
            for epsilon in epsilons:
                asked = None if math.isinf(epsilon) else epsilon
                gains = [
                    {
                        site: cell["sites"][site][metric] - own[metric]
                        for site, own in cell["released"].items()
                        if own.get(metric) is not None
                    }
                    for cell in cells
                    if cell.get("released")
                    and (cell["variant"], cell["epsilon"], cell["partition"])
                    == (variant, asked, partition)
                ]
                if not gains:
                    continue
                columns = [[g[site] for g in gains if site in g] for site in sites]
                columns.append([statistics.fmean(g.values()) for g in gains])
                budget = "no DP" if asked is None else f"ε {epsilon:g}"
                lines.append(
                    f"| {variant}, {partition}, {budget} | "
                    + " | ".join(map(_formatted, columns))
                    + " |"
                )
    return lines if sites else []


def residuals(found: dict[str, Any]) -> dict[str, float]:
    """The largest residual of each variant that has any."""
    largest: dict[str, float] = {}
    for cell in found["cells"].values():
        values = [p["residual"] for p in cell["curve"] if p.get("residual") is not None]
        if values:
            largest[cell["variant"]] = max(largest.get(cell["variant"], 0.0), *values)
    return largest


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """epsilon.svg: the metric by ε; rounds.svg and bytes.svg: its way there at the largest finite
    ε, if it was evaluated on the way. A panel for each partition; bands are 95 % intervals, on the
    way only of three runs and more: that of two is wider than all else. Of more variants than lines
    are distinguishable epsilon.svg has a row for each, and the others a row of panels for every
    few."""
    import matplotlib
    from matplotlib.figure import Figure

    files, study = [], found["study"]
    variants, partitions = list(study["variants"]), list(study["partitions"])
    most = max((e for e in epsilons_of(found) if math.isfinite(e)), default=0.0)
    ways = [
        variant
        for variant in variants
        if len(
            {
                point["round"]
                for cell in found["cells"].values()
                for point in cell["curve"]
                if (cell["variant"], cell["epsilon"]) == (variant, most)
            }
        )
        > 1
    ]
    many = len(variants) > MOST_LINES
    for kind, shown in {"epsilon": variants, "rounds": ways, "bytes": ways}.items():
        if not shown:  # also one of before
            (folder / f"{kind}.svg").unlink(missing_ok=True)
            continue
        dots = many and kind == "epsilon"
        rows = [variants]  # also those without a way: a variant has one colour in all pictures
        if many and not dots:
            rows = [shown[at : at + LINES] for at in range(0, len(shown), LINES)]
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": kind}):
            height = 0.24 * len(variants) + 1 if dots else 3.6 * len(rows)
            figure = Figure(figsize=(4.6 * len(partitions) + 1.6, height), layout="constrained")
            grid = figure.subplots(
                len(rows), len(partitions), sharex=True, sharey=True, squeeze=False
            )
            for own, panels in zip(rows, grid, strict=True):
                for axes, partition in zip(panels, partitions, strict=True):
                    if dots:
                        _dots(axes, found, partition)
                    elif kind == "epsilon":
                        _by_epsilon(axes, found, partition)
                    else:
                        _by_way(axes, found, own, partition, kind, most)
                    axes.set_title(partition, loc="left", fontsize=10)
                    axes.spines[["top", "right"]].set_visible(False)
                    axes.grid(color="#e3e7eb", linewidth=0.7, axis="x" if dots else "y")
                    if dots:
                        axes.set_xlabel(METRICS[found["metric"]])
                panels[0].set_ylabel("" if dots else METRICS[found["metric"]])
                told = {
                    label: line
                    for axes in panels
                    for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
                }
                panels[-1].legend(
                    told.values(),
                    told,
                    fontsize=8,
                    frameon=False,
                    loc="center left",
                    bbox_to_anchor=(1, 0.5),
                )
            files.append(folder / f"{kind}.svg")
            figure.savefig(files[-1], format="svg", metadata={"Date": None})
    return files


def _by_epsilon(axes: Axes, found: dict[str, Any], partition: str) -> None:
    epsilons = sorted(epsilons_of(found), reverse=True)
    for place, variant in enumerate(found["study"]["variants"]):
        points = [
            (x, *interval(values))
            for x, epsilon in enumerate(epsilons)
            if (values := values_of(found, variant, epsilon, partition))
        ]
        _band(axes, points, variant, place, marked=True)
    axes.set_xticks(
        range(len(epsilons)), ["no DP" if math.isinf(e) else f"ε {e:g}" for e in epsilons]
    )


def _dots(axes: Axes, found: dict[str, Any], partition: str) -> None:
    variants = list(found["study"]["variants"])
    epsilons = epsilons_of(found)
    for place, epsilon in enumerate(epsilons):
        points = [
            (y, *interval(values))
            for y, variant in enumerate(variants)
            if (values := values_of(found, variant, epsilon, partition))
        ]
        if points:
            y, mean, half = zip(*points, strict=True)
            shift = 0.3 * (place / max(len(epsilons) - 1, 1) - 0.5)
            axes.errorbar(
                mean,
                [at + shift for at in y],
                xerr=half,
                fmt="o",
                markersize=4,
                linewidth=1.2,
                color=COLOURS[place % len(COLOURS)],
                label="no DP" if math.isinf(epsilon) else f"ε {epsilon:g}",
            )
    axes.set_yticks(range(len(variants)), variants, fontsize=8)
    axes.set_ylim(len(variants) - 0.5, -0.5)


def _by_way(
    axes: Axes,
    found: dict[str, Any],
    variants: Sequence[str],
    partition: str,
    kind: str,
    epsilon: float,
) -> None:
    metric = found["metric"]
    for place, variant in enumerate(variants):
        curves = [
            cell["curve"]
            for cell in found["cells"].values()
            if (cell["variant"], cell["epsilon"], cell["partition"])
            == (variant, epsilon, partition)
        ]
        at: dict[int, list[dict[str, Any]]] = {}
        for point in (p for curve in curves for p in curve):
            if point["scores"].get(metric) is not None:
                at.setdefault(point["round"], []).append(point)
        points = []
        for number, own in sorted(at.items()):
            mean, half = interval([p["scores"][metric] for p in own])
            x = number if kind == "rounds" else own[0]["kilobytes"] / 1000
            points.append((x, mean, half if len(own) > 2 else 0.0))
        _band(axes, points, variant, place)
    axes.set_xlabel(
        f"round, at ε {epsilon:g}" if kind == "rounds" else f"MB up and down, at ε {epsilon:g}"
    )
    if kind == "bytes":  # methods differ by orders of magnitude
        axes.set_xscale("log")


def _band(
    axes: Axes,
    points: Sequence[tuple[float, float, float]],
    label: str,
    place: int,
    marked: bool = False,
) -> None:
    if not points:
        return
    colour = COLOURS[place % len(COLOURS)]
    x, mean, half = zip(*points, strict=True)
    style, marker = ("-", "o") if place < len(COLOURS) else ("--", "D")
    axes.plot(
        x,
        mean,
        style,
        color=colour,
        label=label,
        marker=marker if marked else "",
        markersize=4,
        linewidth=1.5,
    )
    if len(points) == 1:  # of which a band would not be seen
        axes.errorbar(x, mean, half, color=colour, linewidth=1.2, capsize=3)
    axes.fill_between(
        x,
        [m - h for m, h in zip(mean, half, strict=True)],
        [m + h for m, h in zip(mean, half, strict=True)],
        color=colour,
        alpha=0.13,
        linewidth=0,
    )
