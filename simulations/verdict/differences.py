"""A metric of several models on the same test rows, their differences, and how sure these are.

Over test examples: the paired bootstrap, in which both models are judged on the same resamples of
the rows (common/tasks/resampling.py). Over seeds: the runs of each model, of which each has noise
and samples of its own.

Shapes: B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from silotune.common.contract.contract import Contract
from silotune.common.contract.task import LOWER_IS_BETTER, Task
from silotune.common.data import records
from silotune.common.tasks import resampling
from silotune.simulations.datasets.split import TEST, public_files

Status = Literal["yes", "no", "cannot tell"]
ERRORS = 2.0  # standard errors that a difference must exceed
LEAST_GAIN = 0.01  # of a share; of figures in a unit of their own this share of a constant answer's
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """The public test rows that all models are judged on: of each its target, its site and, of a
    ranking, its query."""

    labels: Sequence[Any]
    sites: Sequence[str]
    queries: Sequence[str] = ()

    @classmethod
    def read(cls, public: Path, contract: Contract) -> HeldOut:
        """The test rows of a folder, in the order in which models are judged on them."""
        found = {
            site: records.read(file, contract) for site, file in public_files(public, TEST).items()
        }
        return cls(
            [label for own in found.values() for label in own.labels],
            [site for site, own in found.items() for _ in range(len(own))],
            [query for own in found.values() for query in own.queries],
        )

    def of_site(self, site: str) -> list[int]:
        """The places of a site's rows; of all for ""."""
        return [row for row, own in enumerate(self.sites) if site in ("", own)]


@dataclass(frozen=True)
class Figure:
    """A metric of a model: on the rows, NaN where they do not define it, and on resamples [B]."""

    value: float
    resamples: Floats

    @staticmethod
    def mean(figures: Sequence[Figure]) -> Figure:
        """Of several models."""
        return Figure(
            float(np.mean([figure.value for figure in figures])),
            np.mean([figure.resamples for figure in figures], axis=0),
        )


def figures(
    task: Task, metric: str, models: Sequence[Sequence[Any]], rows: HeldOut, site: str = ""
) -> list[Figure]:
    """The metric of each model, all on the same resamples. models: of each its outputs for all
    rows. site: whose rows they are judged on; all for ""."""
    chosen = rows.of_site(site)
    queries = [rows.queries[row] for row in chosen] if rows.queries else []
    labels = [rows.labels[row] for row in chosen]
    of_weights = [
        resampling.metric_of(task, metric, [outputs[row] for row in chosen], labels, queries)
        for outputs in models
    ]
    whole = np.ones((1, len(chosen)))
    parts = [
        [of(weights) for of in of_weights] for weights in resampling.draws(len(chosen), queries)
    ]
    return [
        Figure(float(of(whole)[0]), np.concatenate([part[place] for part in parts]))
        for place, of in enumerate(of_weights)
    ]


@dataclass(frozen=True)
class Difference:
    """How much better the first of two models is.

    Attributes:
        first: Its figure, a mean over its runs.
        second: The figure of the other.
        value: The lead of the first; below 0 where it is worse.
        examples_error: Standard error of the lead over test examples.
        examples_interval: Its 95 % interval over test examples.
        seeds_error: Standard error over seeds; None where a model that is drawn ran once.
        seeds_interval: Its 95 % interval over seeds, by Student's t.
    """

    first: float
    second: float
    value: float
    examples_error: float
    examples_interval: tuple[float, float]
    seeds_error: float | None
    seeds_interval: tuple[float, float] | None

    @property
    def error(self) -> float:
        """Both standard errors together."""
        return math.hypot(self.examples_error, self.seeds_error or 0.0)

    def status(self, margin: float) -> Status:
        """ "yes" if the lead exceeds two standard errors, "no" if it is less than `margin` by two
        standard errors, else "cannot tell"."""
        if self.value > ERRORS * self.error:
            return "yes"
        return "no" if self.value + ERRORS * self.error < margin else "cannot tell"

    @property
    def text(self) -> str:
        """The lead and its standard errors, in words."""
        error = f"standard error {self.examples_error:.3f} over test examples"
        if self.seeds_error is not None:
            error += f", {self.seeds_error:.3f} over seeds"
        return f"{self.value:+.3f} ({error})"

    def content(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "first": self.first,
            "second": self.second,
            "difference": self.value,
            "over_test_examples": {
                "standard_error": self.examples_error,
                "interval": list(self.examples_interval),
            },
            "over_seeds": None
            if self.seeds_error is None or self.seeds_interval is None
            else {"standard_error": self.seeds_error, "interval": list(self.seeds_interval)},
        }


def difference(
    metric: str, first: Sequence[Figure], second: Sequence[Figure], *, drawn: bool = True
) -> Difference | None:
    """The lead of one model over another.

    Args:
        metric: What the figures are.
        first: The figures of its runs.
        second: Those of the other's runs.
        drawn: Whether runs of the other differ at all: a constant answer's do not.

    Returns:
        The difference; None where the rows, or half of their resamples, do not define the metric.
    """
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    ours, theirs = Figure.mean(first), Figure.mean(second)
    resamples = sign * (ours.resamples - theirs.resamples)
    resamples = resamples[np.isfinite(resamples)]
    value = sign * (ours.value - theirs.value)
    if not math.isfinite(value) or 2 * len(resamples) < len(ours.resamples):
        return None
    low, high = np.percentile(resamples, [2.5, 97.5])
    groups = [[figure.value for figure in group] for group in (first, second)[: 1 + drawn]]
    seeds = None
    if all(len(group) > 1 for group in groups):
        shares = [float(np.var(group, ddof=1)) / len(group) for group in groups]
        seeds = math.sqrt(sum(shares))
        degrees = min(len(group) for group in groups) - 1
        reach = float(stats.t.ppf(0.975, degrees)) * seeds
    return Difference(
        ours.value,
        theirs.value,
        value,
        float(np.std(resamples, ddof=1)),
        (float(low), float(high)),
        seeds,
        None if seeds is None else (value - reach, value + reach),
    )
