"""`make recipes`: what each recipe reaches, pooled, alone, federated, and federated under DP.

    python -m silotune.simulations.comparison.recipe_table [RECIPE …] [--columns …] [KEY=VALUE …]

All recipes and columns if none is named; settings say how to compute, as those of `silotune sim
compare` do.

Columns without DP, with the recipe's own contract and the phases that recipe.toml has for it:
pooled (all rows in one place), alone (each site by itself, at the federation's rates, on
everybody's public rows) and federated. Columns with DP at ε 8, 3 and 1, federated, updates masked
where there are three sites: `epsilon-…` with the plan that somebody chose for the recipe,
`computed-…` with the plan that the rules compute from its public facts
(client/operations/contract_plan.py); "–" where no rule applies. Each figure is the mean over runs
with fresh noise, with its spread. A column is written as soon as its runs are done; it is run again
when what it asks for has changed, and says of which commit and machine it is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from silotune.client.operations.contract_plan import planned
from silotune.client.privacy.accountant import EXACT
from silotune.common.cli.failure import Failure
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.model import OneHotModel
from silotune.common.errors import RunError, SilotuneError
from silotune.common.runtime.terminal import echo
from silotune.common.tasks.metrics import METRICS
from silotune.simulations.comparison.options import computing
from silotune.simulations.comparison.provenance import commit, machine
from silotune.simulations.comparison.recipe import Recipe, load_recipe, recipe_names
from silotune.simulations.comparison.run import run_jobs
from silotune.simulations.datasets import catalog
from silotune.simulations.execution.roster_keys import SigningKeys, with_secure_aggregation
from silotune.simulations.execution.variants import Job, JobResult, Variant, alone, variants_of

RESULTS = Path("simulations/studies")
EPSILONS = (8.0, 3.0, 1.0)
COLUMNS = (
    "pooled",
    "alone",
    "federated",
    *(f"{plan}-{e:g}" for e in EPSILONS for plan in ("epsilon", "computed")),
)


@dataclass
class ColumnRuns:
    """A line for each run that ends, and a call once all of a column have.

    Attributes:
        jobs: How many runs each column has.
        written: Called with a column's name and its results.
        results: The results of each column so far.
    """

    jobs: Mapping[str, int]
    written: Callable[[str, list[JobResult]], None]
    results: dict[str, list[JobResult]] = field(default_factory=dict)

    def round(self, *_: object) -> None:
        pass

    def done(self, result: JobResult) -> None:
        if result.stopped:
            raise RunError(f"{result.variant}: {result.stopped.why}", code=result.stopped.code)
        found = result.scores.get("", {})
        scores = {k: round(v, 3) for k, v in found.items() if v is not None}
        echo(f"  {result.variant} {result.repeat} ({result.seconds:.0f} s) {scores}")
        own = self.results.setdefault(result.variant, [])
        own.append(result)
        if len(own) == self.jobs[result.variant]:
            self.written(result.variant, own)


def with_baseline(recipe: Recipe) -> list[Recipe]:
    """The recipe, and its one-hot regression as one of its own where recipe.toml has a plan."""
    one_hot = [
        variant.contracts[0]
        for variant in variants_of(recipe.contract, recipe.config.variants)
        if variant.name == "federated-one-hot"
    ]
    return [recipe] + [
        replace(
            recipe,
            name=f"{recipe.name} (one-hot)",
            contract=contract,
            config=recipe.config.model_copy(
                update={
                    "expect": None,
                    "lr_scale": {},
                    "variants": {
                        "no-dp": {
                            "phases": contract.model_dump(mode="json", exclude_none=True)["phases"]
                        }
                    },
                }
            ),
        )
        for contract in one_hot
    ]


class Column(NamedTuple):
    """One of COLUMNS: its variant, the keys if it is masked, and a hash of what was asked for."""

    variant: Variant
    keys: SigningKeys
    asked: str

    @classmethod
    def of(cls, name: str, contracts: tuple[Contract, ...], bound: float | None = None) -> Column:
        private = contracts[0].privacy.mode == "dp"
        # By another account the same ε has another noise.
        asked = ",".join(contract.hash[:16] for contract in contracts) + f" {EXACT}" * private
        keys = SigningKeys()
        if private and len(contracts[0].sites) >= 3:
            contract, keys = with_secure_aggregation(contracts[0], None, bound)
            contracts = (contract,)
        return cls(Variant(name, name, private, False, contracts), keys, asked)


def columns_of(recipe: Recipe, names: Collection[str], folder: Path | None) -> list[Column]:
    """Those of a recipe that are named, as far as there are plans for them.

    Args:
        recipe: The recipe.
        names: Of COLUMNS.
        folder: Of its base model; None if it has none.
    """
    found = {
        variant.name: variant for variant in variants_of(recipe.contract, recipe.config.variants)
    }
    plain = found["federated-no-dp"].contracts[0]
    columns = [
        Column.of("pooled", found["pooled-no-dp"].contracts),
        Column.of("alone", alone(plain)),
        Column.of("federated", (plain,)),
    ]
    for epsilon in EPSILONS:
        chosen = recipe.at(epsilon).contract
        columns.append(Column.of(f"epsilon-{epsilon:g}", (chosen,), recipe.config.bound))
        name = f"computed-{epsilon:g}"
        computed = planned(chosen, folder) if name in names else None
        if computed is not None:
            columns.append(Column.of(name, (computed,)))
    return [column for column in columns if column.variant.name in names]


def row(
    recipe: Recipe,
    columns: Collection[str],
    processes: int,
    performance: Performance,
    known: Mapping[str, Any],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """One recipe's figures: column -> metric -> mean, sd and values.

    Args:
        recipe: The recipe.
        columns: Which columns of it.
        processes: How many runs at once.
        performance: How to compute.
        known: The row of before, or nothing. Its columns are kept where the same was asked for and
            as many runs, and where they are not named.
        write: Called with the row after each column that is made.
    """
    contract, repeats = recipe.contract, recipe.config.repeats
    model = None if isinstance(contract.model, OneHotModel) else catalog.fetch(contract.model.name)
    made = dict(known.get("columns", {}))
    missing = {
        column.variant.name: column
        for column in columns_of(recipe, columns, model)
        if (before := made.get(column.variant.name)) is None
        or (before["asked"], before["repeats"]) != (column.asked, repeats)
    }
    with tempfile.TemporaryDirectory(prefix="recipes-") as folder:
        counts, table, _ = recipe.rows(Path(folder))

        def finished(name: str, results: list[JobResult]) -> None:
            made[name] = {
                "asked": missing[name].asked,
                "repeats": repeats,
                "commit": commit(),
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(sum(result.seconds for result in results)),
                "metrics": _figures(contract, results),
                "machine": machine(results[0].gpu),
            }
            write(
                {
                    "recipe": recipe.name,
                    "title": recipe.config.title,
                    "metric": recipe.config.metric,
                    "unit": contract.privacy.unit,
                    "delta": contract.privacy.delta,
                    "rows": counts,
                    "columns": {column: made[column] for column in COLUMNS if column in made},
                }
            )

        jobs = [
            Job(
                name,
                repeat,
                own,
                Path(folder) / f"{name}-{repeat}-{at}",
                model,
                table,
                federated=len(own.sites) > 1,
                evaluate_every=own.rounds,
                keys=column.keys,
                performance=performance,
            )
            for name, column in missing.items()
            for repeat in range(repeats)
            for at, own in enumerate(column.variant.contracts)
        ]
        if jobs:
            counted = Counter(job.variant for job in jobs)
            run_jobs(
                sorted(jobs, key=lambda job: -job.cost), processes, ColumnRuns(counted, finished)
            )


def _figures(contract: Contract, results: list[JobResult]) -> dict[str, Any]:
    """Of sites alone one run's value is the mean over the sites' models."""
    found: dict[str, Any] = {}
    for metric in contract.task.metrics:
        of_repeat: dict[int, list[float]] = {}
        for result in results:
            value = result.scores[""].get(metric)
            if value is not None:
                of_repeat.setdefault(result.repeat, []).append(value)
        values = [statistics.fmean(own) for _, own in sorted(of_repeat.items())]
        if values:
            sd = statistics.stdev(values) if len(values) > 1 else 0.0
            found[metric] = {"mean": statistics.fmean(values), "sd": sd, "values": values}
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table for a README."""
    lines = [
        "| recipe | metric | pooled | alone, same rates | federated | "
        + " | ".join(f"ε {e:g}, chosen | ε {e:g}, computed" for e in EPSILONS)
        + " |",
        "|" + "---|" * (2 + len(COLUMNS)),
    ]
    for one in found["recipes"]:
        metric = one["metric"]
        cells = []
        for column in COLUMNS:
            own = one["columns"].get(column)
            figure = own and own["metrics"].get(metric)
            spread = f" ± {figure['sd']:.3f}" if figure and own["repeats"] > 1 else ""
            cells.append(f"{figure['mean']:.3f}{spread}" if figure else "–")
        lines.append(f"| {one['recipe']} | {METRICS[metric]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE|KEY=VALUE", help="recipes, and how to compute"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        default=COLUMNS,
        help="which columns; all if absent",
    )
    given = parser.parse_args()
    names = [word for word in given.words if "=" not in word]
    performance = computing(tuple(word for word in given.words if "=" in word))
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "recipes.json"
    rows = {}
    if file.exists():
        rows = {one["recipe"]: one for one in json.loads(file.read_text("utf-8"))["recipes"]}

    def write(made: dict[str, Any]) -> None:
        rows[made["recipe"]] = made
        result = {"command": "make recipes", "recipes": [rows[key] for key in sorted(rows)]}
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (RESULTS / "recipes.md").write_text(markdown(result), encoding="utf-8")

    missed = 0
    found = [load_recipe(name) for name in names or recipe_names()]
    for recipe in [one for each in found for one in with_baseline(each)]:
        echo(f"{recipe.name}: {recipe.config.title}")
        known = rows.get(recipe.name, {})
        row(recipe, given.columns, os.cpu_count() or 1, performance, known, write)
        metric, expect = recipe.config.metric, recipe.config.expect
        if not expect or "pooled" not in given.columns:
            continue
        pooled = rows[recipe.name]["columns"]["pooled"]["metrics"][metric]["mean"]
        if pooled < expect - recipe.config.within:
            echo(f"✗ {recipe.name}: pooled {METRICS[metric]} {pooled:.3f}, expected {expect:.3f}")
            missed += 1
    echo(markdown({"recipes": [rows[key] for key in sorted(rows)]}))
    return int(missed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SilotuneError as error:
        echo(Failure.of(error).text(), err=True)
        sys.exit(error.exit_code)
