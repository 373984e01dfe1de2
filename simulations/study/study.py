"""A study: a recipe's variants × ε × partitions × seeds, each cell run once, kept, and compared.

A cell's result is written as soon as it is there, with a hash of what was asked for: a study that
was stopped goes on, and one that was changed runs what is new in it. Each repeat has fresh noise;
repeat s of a partition is dealt by seed s, and is the same for all variants.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from silotune.client.privacy.accountant import EXACT
from silotune.common.config.diagnostics import contract_error
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.model import OneHotModel
from silotune.common.errors import UsageError
from silotune.common.runtime.terminal import echo
from silotune.server.rounds.run import RoundRecord
from silotune.simulations.attacks.poisoning import TRIGGERED, poisoned_rows
from silotune.simulations.comparison.provenance import commit, machine
from silotune.simulations.comparison.recipe import Recipe, load_recipe
from silotune.simulations.comparison.run import run_jobs
from silotune.simulations.datasets import catalog, split
from silotune.simulations.datasets.partition import draw, repartition
from silotune.simulations.execution.device import check_device
from silotune.simulations.execution.roster_keys import SigningKeys, with_secure_aggregation
from silotune.simulations.execution.variants import (
    Job,
    JobResult,
    alone,
    pooled,
    scale_learning_rates,
)
from silotune.simulations.study.config import REPLACED, Study, StudyVariant, _finite
from silotune.simulations.study.store import StudyStore

NO_SCORES: dict[str, Any] = {
    "scores": {},
    "triggered": {},
    "sites": {},
    "released": {},
    "curve": [],
}


class Cell(NamedTuple):
    """One value of the grid, of one repeat. contracts: one for each site that trains locally."""

    variant: str
    epsilon: float
    partition: str
    repeat: int
    contracts: tuple[Contract, ...]

    @property
    def key(self) -> str:
        return f"{self.variant} | ε {self.epsilon:g} | {self.partition} | {self.repeat}"


class ProgressPrinter:
    """A line for each job that ends, with the time left."""

    def __init__(
        self,
        jobs: list[Job],
        cells: list[Cell],
        take: Callable[[JobResult], None],
        stderr: bool,
    ) -> None:
        self.stderr = stderr
        self.cells, self.left = cells, sum(job.cost for job in jobs)
        self.whole, self.take, self.began = self.left, take, datetime.now(UTC)
        self.costs = {(job.variant, job.contract.sites[0].name): job.cost for job in jobs}

    def round(self, *_: object) -> None:
        pass

    def done(self, result: JobResult) -> None:
        self.take(result)
        self.left -= self.costs[result.variant, result.sites[0]]
        spent = (datetime.now(UTC) - self.began).total_seconds()
        minutes = spent * self.left / max(self.whole - self.left, 1e-9) / 60
        key = self.cells[int(result.variant)].key
        how = f", {result.stopped.word}" if result.stopped else ""
        left = f"about {minutes:.0f} min left"
        echo(f"  {key}  {result.seconds:.0f} s{how}, {left}", err=self.stderr)


def cells_of(study: Study, recipe: Recipe) -> Iterator[Cell]:
    """The grid, repeat by repeat: what is stopped half way has fewer repeats of everything."""
    for repeat in range(study.repeats):
        for partition in study.partitions:
            for name, variant in study.variants.items():
                for epsilon in variant.epsilons or study.epsilons:
                    found = contracts_of(recipe, variant, epsilon, name, study.sites)
                    yield Cell(name, epsilon, partition, repeat, found)


def contracts_of(
    recipe: Recipe, variant: StudyVariant, epsilon: float, name: str, sites: int | None = None
) -> tuple[Contract, ...]:
    """The contracts of a variant at an ε. ContractError that names the variant if one is not valid.

    Where they are masked the roster's keys are those of a fixed seed, so that a cell asks for the
    same thing each time; a job gets others, and nobody knows those (_jobs)."""
    found = recipe.contract.model_dump(mode="json") | {"secure_aggregation": None}
    if sites:
        found |= {"sites": [{"name": name} for name in _numbered(sites)], "quorum": sites}
    plain = math.isinf(epsilon)
    privacy: dict[str, Any] = {"mode": "none", "adaptive": None} if plain else {"epsilon": epsilon}
    for change in (variant.contract, variant.no_dp if plain else {}, {"privacy": privacy}):
        for key, value in change.items():
            merged = isinstance(value, dict) and key not in REPLACED and found.get(key)
            found[key] = ({**found[key], **value} if merged else value) or None
    secure = found.pop("secure_aggregation")
    try:
        whole = Contract.model_validate(found)
        if epsilon in variant.lr_scale:
            whole = scale_learning_rates(whole, variant.lr_scale[epsilon])
    except ValidationError as error:
        raise contract_error(error, f"the study's variant '{name}'", Contract) from None
    if variant.masked:
        whole = with_secure_aggregation(whole, 0)[0].changed(secure_aggregation=secure or {})
    if variant.rows == "federated":
        return (whole,)
    return alone(whole) if variant.rows == "alone" else (pooled(whole),)


def _numbered(sites: int) -> list[str]:
    return [f"Site {number + 1:02d}" for number in range(sites)]


def request_digest(cell: Cell, study: Study, rows: str) -> str:
    """A hash of what a cell asks for. rows: the SHA-256 of the recipe's split. With DP the account
    is a part of it: by another one the same ε has another noise."""
    partition, poison = study.partitions[cell.partition], study.variants[cell.variant].poison
    parts = [*(contract.hash for contract in cell.contracts), partition.model_dump_json()]
    parts += [rows, str(study.evaluate_every)]
    if cell.contracts[0].privacy.mode == "dp":
        parts.append(EXACT)
    if poison:  # what was asked before there was `every` is asked still
        parts.append(poison.model_dump_json(exclude=None if poison.every else {"every"}))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def compare(
    study: Study,
    folder: Path,
    processes: int = 0,
    recipe: Recipe | None = None,
    only: Sequence[str] = (),
    performance: Performance | None = None,
    *,
    model: Path | None = None,
    stderr: bool = False,
) -> dict[str, Any]:
    """Run what is missing of the study and keep it in `folder`; returns what there is of it. only:
    patterns of shells; the cells whose key (`Cell.key`) is like none of them are left for later.
    performance: how to compute; but for roundings a cell stays the same cell. model: the folder of
    a base model that is not packaged. stderr: what is shown goes to standard error. UsageError for
    a pattern that no key is like, DataError for a device that is not there.
    """
    performance = performance or Performance()
    check_device(performance)
    recipe = recipe or load_recipe(study.recipe)
    head = {
        "title": study.title,
        "recipe": study.recipe,
        "metric": recipe.config.metric,
        "unit": recipe.contract.privacy.unit,
        "delta": recipe.contract.privacy.delta,
        "accountant": EXACT,
        "machine": machine(""),
        "study": study.model_dump(mode="json"),
    }
    kept, cells = StudyStore(folder, head), {cell.key: cell for cell in cells_of(study, recipe)}
    left_out = [p for p in only if not any(fnmatchcase(key, p) for key in cells)]
    if left_out:
        raise UsageError(
            f"--only '{left_out[0]}' is like no cell. A cell is called, for instance, "
            f"'{next(iter(cells))}'."
        )
    with tempfile.TemporaryDirectory(prefix="study-") as work:
        found = _complete(
            study, recipe, cells, kept, Path(work), processes, only, performance, model, stderr
        )
        return head | {"cells": found}


def _complete(
    study: Study,
    recipe: Recipe,
    cells: dict[str, Cell],
    kept: StudyStore,
    work: Path,
    processes: int,
    only: Sequence[str],
    performance: Performance,
    model: Path | None,
    stderr: bool,
) -> dict[str, Any]:
    """Run the cells that are not there, or were made from something else; returns the study's."""
    natural = recipe.rows(work).folder
    if study.validation:
        natural = split.validation(natural, recipe.contract, work / "validation")
    rows = _digest(natural)
    wanted = {key: request_digest(cell, study, rows) for key, cell in cells.items()}
    found = {key: c for key, c in kept.cells().items() if wanted.get(key) == c["asked"]}
    # A job's `variant` is the place of its cell here.
    missing = [
        cell
        for key, cell in cells.items()
        if key not in found and (not only or any(fnmatchcase(key, pattern) for pattern in only))
    ]
    echo(f"{study.title}: {len(cells)} cells, {len(missing)} to run", err=stderr)
    parts: dict[str, list[JobResult]] = {}
    revision = commit()

    def take(result: JobResult) -> None:
        own = parts.setdefault(result.variant, [])
        own.append(result)
        cell = missing[int(result.variant)]
        if len(own) == len(cell.contracts):
            made = {"asked": wanted[cell.key], "commit": revision} | _facts(cell, own)
            found[cell.key] = made
            kept.put(cell.key, made)

    if missing:
        place = kept.file.parent
        jobs = list(_jobs(study, recipe, missing, natural, work, place, performance, model))
        run_jobs(
            jobs, processes or os.cpu_count() or 1, ProgressPrinter(jobs, missing, take, stderr)
        )
    return dict(sorted(found.items()))


def _digest(rows: Path) -> str:
    """SHA-256 of a split's files."""
    digest = hashlib.sha256()
    for file in sorted(rows.rglob("*.csv")):
        digest.update(f"{file.relative_to(rows)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _jobs(
    study: Study,
    recipe: Recipe,
    cells: list[Cell],
    natural: Path,
    work: Path,
    folder: Path,
    performance: Performance,
    own_model: Path | None,
) -> Iterator[Job]:
    sites = _numbered(study.sites) if study.sites else list(recipe.contract.weights())
    places: dict[tuple[str, int], Path] = {}
    for number, cell in enumerate(cells):
        contract, poison = cell.contracts[0], study.variants[cell.variant].poison
        model = None
        if not isinstance(contract.model, OneHotModel):
            model = own_model or catalog.fetch(contract.model.name)
        dealt = (cell.partition, cell.repeat)
        if dealt not in places:
            partition = study.partitions[cell.partition]
            places[dealt] = repartition(
                natural,
                work / f"rows-{cell.partition}-{cell.repeat}",
                recipe.contract,
                sites,
                partition,
                cell.repeat,
            )
            if cell.repeat == 0:
                draw(
                    places[dealt],
                    recipe.contract,
                    sites,
                    partition.words,
                    folder / f"rows-{cell.partition}.svg",
                )
        rows = places[dealt]
        if poison:
            rows = poisoned_rows(rows, work / f"poisoned-{number}", contract, poison)
        for at, own in enumerate(cell.contracts):
            with_keys, keys = (
                with_secure_aggregation(own, None)
                if own.secure_aggregation
                else (own, SigningKeys())
            )
            yield Job(
                str(number),
                cell.repeat,
                with_keys,
                work / f"job-{number}-{at}",
                model,
                rows,
                federated=False,  # the same messages and checks, without Flower's queues
                evaluate_every=study.evaluate_every,
                poison=poison,
                keys=keys,
                performance=performance,
            )


def _facts(cell: Cell, results: list[JobResult]) -> dict[str, Any]:
    """What is kept of a cell: scores on all scored rows (where each site has a model of its own the
    mean over them), by site (`released`: where the site's own model stands in `sites`), and the
    curve of variants that train together. `stopped`: why there are no scores, where a run
    diverged."""
    stopped = next((result.stopped for result in results if result.stopped), None)
    kept = _scores_of(results) if stopped is None else NO_SCORES
    return {
        "variant": cell.variant,
        "epsilon": _finite(cell.epsilon),
        "partition": cell.partition,
        "repeat": cell.repeat,
        "stopped": stopped and stopped.why,
        **kept,
        "declined": sum(r.declined is not None for result in results for r in result.rounds),
        "seconds": round(sum(result.seconds for result in results), 1),
        "machine": machine(results[0].gpu),
    }


def _scores_of(results: list[JobResult]) -> dict[str, Any]:
    first = results[0]
    models = {site: result.scores for result in results for site in result.sites}
    if len(results) == 1:
        models = {site: first.scores for site in first.scores if site not in ("", TRIGGERED)}
    models |= first.own
    overall: dict[str, list[float]] = {}
    for scores in [result.scores for result in results] if not first.own else first.own.values():
        for metric, value in scores[""].items():
            if value is not None:
                overall.setdefault(metric, []).append(value)
    by_site = {site: dict(scores[site]) for site, scores in models.items() if site in scores}
    return {
        "scores": {metric: sum(own) / len(own) for metric, own in overall.items()},
        "triggered": dict(results[0].scores.get(TRIGGERED, {})),
        "sites": by_site,
        "released": {site: dict(first.scores[site]) for site in first.own if site in first.scores},
        "curve": _curve(results[0].rounds) if len(results) == 1 else [],
    }


def _curve(rounds: tuple[RoundRecord, ...]) -> list[dict[str, Any]]:
    """Where it was evaluated: the round, kilobytes up and down until then, scores, the residual."""
    found, sent = [], 0
    for facts in rounds:
        sent += facts.bytes_up + facts.bytes_down
        if facts.metrics:
            found.append(
                {
                    "round": facts.round,
                    "kilobytes": round(sent / 1000),
                    "scores": facts.metrics,
                    "residual": facts.residual,
                }
            )
    return found
