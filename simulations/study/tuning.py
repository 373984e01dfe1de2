"""Learning rates for a contract, found by simulation on labelled public rows: `contract tune`.

The rows are split once (simulations/datasets/split.py): in each simulated site a quarter is held
back, and of the others a quarter is for validation, and the rest for training. Each factor of the
contract's learning rates is run on the training rows and scored on the validation rows. The best
one and the contract's own are then run on all rows that were not held back, and scored once on the
held-back ones: those figures, and their difference, had no part in the choice.

The noise is the plan's. A step divides its noised sum by `expected_units`, and public rows are
fewer than a site's records: by themselves they would make a sum that is too small beside the noise,
and with it learning rates that are too large. So each simulated site has `expected_units` records,
its public rows repeated (`split.filled`); the contract runs as it is, nothing is rescaled. What
repeating cannot give is their variety: a model fits few different rows sooner than many, so the
best rates here are rather a little too low for the sites' records than too high.

It runs without secure aggregation, early stopping and gate: masks change no sum by more than a
rounding, and the others would choose by the rows that a run is scored on.
"""

from __future__ import annotations

import os
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silotune.client.site.commands import POLICY
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.model import OneHotModel
from silotune.common.contract.task import signed_score
from silotune.common.data import records
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import (
    ContractError,
    DataError,
    ErrorCode,
    RunError,
    UsageError,
    counted,
)
from silotune.common.runtime.terminal import echo
from silotune.common.tasks.metrics import METRICS
from silotune.server.rounds.run import RoundRecord
from silotune.simulations.comparison.duration import Duration, clock, file_of
from silotune.simulations.comparison.recipe import metric_of
from silotune.simulations.comparison.run import check_figure, run_jobs
from silotune.simulations.datasets import catalog, split
from silotune.simulations.execution.variants import Job, JobResult, scale_learning_rates
from silotune.simulations.verdict.differences import Difference, HeldOut, difference, figures

OWN = 1.0  # the factor of the contract's own rates
# Of the rows a quarter is held back and 3/16 are for validation, which must be this many.
LEAST_VALIDATION = 30
LEAST_OF_SITE = 16
FIRST_ESTIMATE = 2.0  # seconds of rounds, after which these say how long it takes


@dataclass(frozen=True)
class Candidate:
    """A factor of the learning rates, and its means over runs on the validation rows; None where
    a run diverged."""

    factor: float
    metric: float | None
    loss: float | None


@dataclass(frozen=True)
class Rows:
    """How many public rows, or entities, each part has, and for how many a site's stand."""

    train: int
    validation: int
    held_back: int
    of_site: int
    expected: int

    @property
    def count(self) -> int:
        return self.train + self.validation + self.held_back


@dataclass(frozen=True)
class Tuning:
    """What a search has found.

    Attributes:
        contract: The contract whose rates were searched.
        metric: The metric by which they were chosen.
        rows: The public rows.
        candidates: Of each factor, in order.
        best: The factor that was chosen.
        held_back: The metric on the rows that were held back, a mean over runs, of the factor that
            was chosen and of the contract's own; None where a run diverged.
        difference: How much better the first is there; None where it is the same factor, or a run
            diverged.
    """

    contract: Contract
    metric: str
    rows: Rows
    candidates: tuple[Candidate, ...]
    best: float
    held_back: tuple[float | None, float | None]
    difference: Difference | None

    @property
    def better(self) -> bool:
        """Whether the held-back rows show that the chosen factor is better than the contract's own
        rates: by more than two standard errors, or because only these diverge."""
        chosen, own = self.held_back
        if self.difference is None:
            return chosen is not None and own is None
        return self.difference.status(0.0) == "yes"

    @property
    def rates(self) -> list[dict[str, float]]:
        """Of each phase its chosen learning rates, by their keys."""
        phases = scale_learning_rates(self.contract, self.best).phases
        keys = "head_lr", "adapter_lr"
        return [{k: r for k in keys if (r := getattr(phase, k)) is not None} for phase in phases]

    def content(self) -> dict[str, Any]:
        """For --json."""
        return {
            "metric": self.metric,
            "rows": {
                "train": self.rows.train,
                "validation": self.rows.validation,
                "held_back": self.rows.held_back,
                "of_site": self.rows.of_site,
                "expected_units": self.rows.expected,
            },
            "factors": [
                {"factor": c.factor, "metric": c.metric, "loss": c.loss} for c in self.candidates
            ],
            "best": self.best,
            "rates": self.rates,
            "held_back": {
                "best": self.held_back[0],
                "own": self.held_back[1],
                "difference": self.difference and self.difference.content(),
            },
            "better": self.better,
        }

    @property
    def lines(self) -> list[str]:
        """For a terminal."""
        label, rows = METRICS[self.metric], self.rows
        what = "rows" if self.contract.privacy.unit == "record" else "entities"
        wide = max(len(label), 8)
        best = "; ".join(
            f"phase {at}: " + ", ".join(f"{key} {rate:g}" for key, rate in own.items())
            for at, own in enumerate(self.rates, 1)
        )
        return [
            f"{rows.count:,} public {what}: {rows.train:,} for training, "
            f"{rows.validation:,} for validation, {rows.held_back:,} held back",
            f"Each simulated site has the {rows.expected:,} {what} that the contract expects, with "
            "the noise of its plan"
            + (
                f": {rows.of_site:,} different ones, repeated."
                if rows.of_site < rows.expected
                else "."
            ),
            f"factor  {label:>{wide}}  loss",
            *(
                f"{c.factor:<6g}  "
                + (
                    f"{'diverged':>{wide}}"
                    if c.metric is None
                    else f"{_number(c.metric):>{wide}}  {_number(c.loss)}"
                )
                for c in self.candidates
            ),
            f"best    factor {self.best:g}; {best}",
            *self._held_back_lines(label),
        ]

    def _held_back_lines(self, label: str) -> list[str]:
        chosen, own = ("diverged" if v is None else _number(v) for v in self.held_back)
        if self.best == OWN:
            return [
                f"held back: {label} {own}",
                "The contract's own rates are the best of these.",
            ]
        text = f"held back: {label} {chosen}; with the contract's own rates {own}"
        if self.difference is not None:
            text += f"; {self.difference.text}"
        if self.better:
            return [text, "✓ better than the contract's own rates by more than 2 standard errors"]
        return [
            text,
            "! not better than the contract's own rates by more than 2 standard errors: these rows "
            "give no reason to change them",
        ]


def _number(value: float | None) -> str:
    """Rates that nearly diverge have figures of many digits."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


@dataclass
class _Progress:
    """A line when the search begins, and one for each run that ends, with the time left. It is a
    `Watcher` of both pools of runs, on standard error."""

    metric: str
    factors: Sequence[float]
    of_run: float  # its cost
    runs: int
    began: float = 0.0
    finished: int = 0
    estimated: bool = False
    done_cost: float = 0.0
    # Since the first round, before which models are loaded: when that was, and its cost.
    rated_from: tuple[float, float] | None = None
    of_runs: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        return self.of_run * self.runs

    def start(self, processes: int, last_time: Duration | None, at_a_time: int) -> None:
        self.began, self.estimated = time.monotonic(), last_time is not None
        how = (
            f"about {clock(last_time.seconds_per_cost * self.cost / at_a_time)}, measured on this "
            f"machine on {last_time.date}"
            if last_time
            else "the first search on this machine: its first rounds show how long it takes"
        )
        echo(f"{counted(self.runs, 'run')}, {processes} at a time: {how}", err=True)

    def again(self, runs: int) -> None:
        """New processes begin, which load models first. runs: how many there are in all."""
        self.runs, self.rated_from, self.estimated = runs, None, True

    def _left(self) -> str:
        """How long the rest takes, by the rounds so far; "" before there are any."""
        if self.rated_from is None or self.done_cost <= self.rated_from[1]:
            return ""
        began, before = self.rated_from
        rate = (time.monotonic() - began) / (self.done_cost - before)
        return f"about {clock(rate * (self.cost - self.done_cost))} left"

    def round(self, variant: str, repeat: int, cost: float, facts: RoundRecord) -> None:
        self.done_cost += cost
        self.rated_from = self.rated_from or (time.monotonic(), self.done_cost)
        self.of_runs[variant, repeat] = self.of_runs.get((variant, repeat), 0.0) + cost
        if not self.estimated and time.monotonic() - self.rated_from[0] >= FIRST_ESTIMATE:
            self.estimated = True
            echo(f"  {self._left()}, by the first rounds", err=True)

    def done(self, result: JobResult) -> None:
        self.finished += 1
        # A run that diverged has no further rounds.
        self.done_cost += self.of_run - self.of_runs.pop((result.variant, result.repeat), 0.0)
        factor = self.factors[int(result.variant)]
        figure = result.stopped.word if result.stopped else _words(result, self.metric)
        left = self._left()
        echo(
            f"  {self.finished}/{self.runs}  factor {factor:g}, run {result.repeat + 1}: "
            f"{figure} ({result.seconds:.0f} s)" + (f", {left}" if left else ""),
            err=True,
        )


def _words(result: JobResult, metric: str) -> str:
    return f"{METRICS[metric]} {_number(result.scores[''][metric])}"


def needed(contract: Contract) -> int:
    """How many public rows, or entities, a search needs."""
    return max(LEAST_VALIDATION * 16 // 3, LEAST_OF_SITE * len(contract.sites))


def refuse_private(public: Path, contract: Path) -> None:
    """Refuse a file that a site.toml names as its records.

    Looked for in the working folder, in those of the two files, in what lies in these, and in all
    folders around them; it cannot be known of a copy elsewhere.

    Args:
        public: The file that is said to be public.
        contract: The contract's file.

    Raises:
        UsageError: If it is a site's file of records.
    """
    policies = set[Path]()
    for start in (public, contract, Path(POLICY)):
        nearest, *around = start.resolve().parents
        policies |= {nearest / POLICY, *nearest.glob(f"*/{POLICY}")}
        policies |= {folder / POLICY for folder in around}
    for policy in sorted(policies):
        try:
            data = tomllib.loads(policy.read_text(encoding="utf-8")).get("data")
        except (OSError, ValueError):
            continue  # what is not there, or no policy, names no records
        file = data.get("file") if isinstance(data, dict) else None
        if isinstance(file, str) and (policy.parent / file).resolve() == public.resolve():
            raise UsageError(
                f"--public {public} is the file of private records in {policy}, [data]. "
                "Rates that are chosen by private records cost privacy that no ε includes: name a "
                "file of labelled public rows."
            )


def tune(
    contract: Contract,
    public: Path,
    factors: Sequence[float],
    *,
    repeats: int,
    processes: int = 0,
    reading: Reading | None = None,
    model: Path | None = None,
    performance: Performance | None = None,
    insecure_seed: int | None = None,
) -> Tuning:
    """Search the factor of a contract's learning rates, as this module says.

    Args:
        contract: What is simulated.
        public: The file of labelled public rows.
        factors: Of all learning rates of the contract; 1 is always among them.
        repeats: Runs of each factor, which have noise of their own.
        processes: Runs at a time; as many as there are cores if 0.
        reading: How the file is to be read.
        model: The folder of a base model that is not packaged.
        performance: How to compute.
        insecure_seed: Makes the noise reproducible, for tests.

    Returns:
        What was found.

    Raises:
        UsageError: If a part of the contract's model stays at the sites, or a rate times a factor
            is not allowed.
        DataError: If the rows are too few, do not fit the contract or do not define its metric.
        RefusalError: If every site would refuse the plan.
        RunError: If training diverges with every factor.
    """
    if contract.personal:
        raise UsageError(
            f"{contract.name} leaves a part of the model at each site (phases.personal), which "
            "public rows cannot judge. Remove 'personal' from its last phase to search its rates."
        )
    performance = performance or Performance()
    _check_count(len(records.table(public, reading).rows), contract, public)
    plan = contract.changed(
        secure_aggregation=None,
        aggregation={"early_stop": None, "gate": None},
        # Nobody here has the private halves of the sites' keys.
        sites=[site.model_dump(mode="json") | {"public_key": None} for site in contract.sites],
    )
    all_factors = sorted({*factors, OWN})
    plans = [_scaled(plan, factor) for factor in all_factors]
    folder = model
    if not isinstance(plan.model, OneHotModel):
        folder = model or catalog.fetch(plan.model.name)
    metric, processes = metric_of(plan.task), processes or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="tune-") as place:
        work = Path(place)
        split.of_file(public, plan, None, work / "all", reading)
        _check_count(sum(_units(plan, work / "all")), plan, public)
        split.validation(work / "all", plan, work / "search")
        for part in ("search", "all"):
            check_figure(metric, plan, work / part)
            split.filled(work / part, plan, work / part / "filled")

        def jobs(part: str, chosen: Sequence[int]) -> list[Job]:
            """chosen: places of factors, by which their runs are known."""
            return [
                Job(
                    str(at),
                    repeat,
                    plans[at],
                    work / f"{part}-{at}-{repeat}",
                    folder,
                    work / part / "filled",
                    federated=False,  # the same messages and checks, without Flower's queues
                    evaluate_every=plan.rounds,
                    insecure_seed=insecure_seed,
                    performance=performance,
                    public=work / part,
                    keeps_outputs=part == "all",
                )
                for repeat in range(repeats)
                for at in chosen
            ]

        search = jobs("search", range(len(plans)))
        last_time = file_of(plan, performance, "tune")
        runs = len(search) + 2 * repeats  # two factors are run again, or one if it is the best
        progress = _Progress(metric, all_factors, search[0].cost, runs)
        progress.start(processes, Duration.load(last_time), min(processes, len(search)))
        results = run_jobs(search, processes, progress, checked=lambda: None)
        candidates = tuple(
            _candidate(factor, _of(at, results), metric) for at, factor in enumerate(all_factors)
        )
        best = _best(candidates, metric)
        places = all_factors.index(best), all_factors.index(OWN)
        last = jobs("all", list(dict.fromkeys(places)))
        progress.again(len(search) + len(last))
        final = run_jobs(last, processes, progress)
        if not any(result.stopped for result in (*results, *final)):  # that takes less than others
            _keep(last_time, progress.cost, processes, progress.began)
        chosen, own = (_of(at, final) for at in places)
        means = _mean(chosen, metric), _mean(own, metric)
        lead = None
        if best != OWN and None not in means:
            held_back = HeldOut.read(work / "all", plan)
            found = figures(plan.task, metric, [r.outputs for r in (*chosen, *own)], held_back)
            lead = difference(metric, found[: len(chosen)], found[len(chosen) :])
        return Tuning(contract, metric, _counted(plan, work), candidates, best, means, lead)


def _scaled(plan: Contract, factor: float) -> Contract:
    try:
        return scale_learning_rates(plan, factor)
    except ContractError as error:
        raise UsageError(
            f"--factors {factor:g} makes a rate that no contract can have: {error} Name another "
            "factor."
        ) from None


def _check_count(count: int, contract: Contract, public: Path) -> None:
    if count < (least := needed(contract)):
        what = "labelled rows" if contract.privacy.unit == "record" else "entities"
        raise DataError(
            f"{public.name} has {count:,} {what}, and a search of learning rates for "
            f"{counted(len(contract.sites), 'site')} needs {least:,}: label more public rows.",
            code=ErrorCode.TOO_FEW_ROWS,
        )


def _units(contract: Contract, folder: Path, parts: Sequence[str] = ("train", "test")) -> list[int]:
    """How many rows, or entities, each site has in these parts of a split."""
    import pandas as pd

    def of_file(file: Path) -> int:
        rows = pd.read_csv(file, dtype=str, keep_default_na=False)
        return 0 if rows.empty else int(split.units(rows, contract).nunique())

    return [
        sum(of_file(folder / part / f"{site}.csv") for part in parts) for site in contract.weights()
    ]


def _counted(contract: Contract, work: Path) -> Rows:
    train = _units(contract, work / "search", ("train",))
    return Rows(
        sum(train),
        sum(_units(contract, work / "search", ("test",))),
        sum(_units(contract, work / "all", ("test",))),
        min(train),
        max(1, round(contract.privacy.expected_units)),
    )


def _of(place: int, results: Sequence[JobResult]) -> list[JobResult]:
    """The runs of the factor at this place."""
    return [result for result in results if result.variant == str(place)]


def _mean(results: Sequence[JobResult], metric: str) -> float | None:
    """None where a run diverged, or has no such figure."""
    if any(result.stopped for result in results):
        return None
    values = [result.scores[""].get(metric) for result in results]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _candidate(factor: float, runs: Sequence[JobResult], metric: str) -> Candidate:
    return Candidate(factor, _mean(runs, metric), _mean(runs, "loss"))


def _best(candidates: Sequence[Candidate], metric: str) -> float:
    """The factor with the best metric; of equal ones that with the smallest loss."""
    found = [
        (signed_score(metric, c.metric), -(c.loss or 0.0), c.factor)
        for c in candidates
        if c.metric is not None
    ]
    if not found:
        least = min(c.factor for c in candidates)
        raise RunError(
            f"Training diverged with every factor, also with {least:g}: name smaller ones, such as "
            f"--factors {least / 100:g},{least / 10:g}.",
            code=ErrorCode.DIVERGED,
        )
    return max(found)[-1]


def _keep(file: Path, cost: float, processes: int, began: float) -> None:
    seconds = (time.monotonic() - began) * processes
    Duration(seconds / cost, 0, datetime.now(UTC).date().isoformat()).keep(file)
