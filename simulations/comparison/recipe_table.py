"""`make recipes`: what each recipe reaches, pooled, alone, federated, and federated under DP.

    python -m silotune.simulations.comparison.recipe_table [RECIPE …] [KEY=VALUE …]

All recipes if none is named; settings say how to compute, as those of `silotune sim compare` do.

Columns, each with the recipe's own contract and the phases that recipe.toml has for it: pooled (all
rows in one place, no DP), alone (each site by itself, no DP, at the federation's rates, on
everybody's public rows), federated (no DP), and federated with DP at ε 8 and 3, updates masked
where there are three sites. Each figure is the mean over runs with fresh noise, with its spread. A
recipe's row is written as soon as it is done; a column is run again when what it asks for has
changed, and says of which commit and machine it is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

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
EPSILONS = (8.0, 3.0)
COLUMNS = ("pooled", "alone", "federated", *(f"epsilon-{e:g}" for e in EPSILONS))


class TableRows:
    """A line for each run that ends."""

    def round(self, *_: object) -> None:
        pass

    def done(self, result: JobResult) -> None:
        found = result.scores.get("", {})
        scores = {k: round(v, 3) for k, v in found.items() if v is not None}
        echo(f"  {result.variant} {result.repeat} ({result.seconds:.0f} s) {scores}")


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


def columns_of(recipe: Recipe) -> list[Column]:
    found = {
        variant.name: variant for variant in variants_of(recipe.contract, recipe.config.variants)
    }
    plain = found["federated-no-dp"].contracts[0]
    private = [
        Column.of(
            f"epsilon-{epsilon:g}",
            (recipe.at(epsilon).contract,),
            recipe.config.bound,
        )
        for epsilon in EPSILONS
    ]
    return [
        Column.of("pooled", found["pooled-no-dp"].contracts),
        Column.of("alone", alone(plain)),
        Column.of("federated", (plain,)),
        *private,
    ]


def row(
    recipe: Recipe, processes: int, performance: Performance, known: dict[str, Any]
) -> dict[str, Any]:
    """One recipe's figures: column -> metric -> mean, sd and values. `known`, the row of before,
    keeps its columns where the same was asked for and as many runs."""
    contract, repeats = recipe.contract, recipe.config.repeats
    columns = columns_of(recipe)
    kept = {
        column.variant.name: before
        for column in columns
        if (before := known.get("columns", {}).get(column.variant.name))
        and (before["asked"], before["repeats"]) == (column.asked, repeats)
    }
    missing = [column for column in columns if column.variant.name not in kept]
    model = None if isinstance(contract.model, OneHotModel) else catalog.fetch(contract.model.name)
    with tempfile.TemporaryDirectory(prefix="recipes-") as folder:
        counts, table, _ = recipe.rows(Path(folder))
        jobs = [
            Job(
                variant.name,
                repeat,
                own,
                Path(folder) / f"{variant.name}-{repeat}-{at}",
                model,
                table,
                federated=len(own.sites) > 1,
                evaluate_every=own.rounds,
                keys=keys,
                performance=performance,
            )
            for variant, keys, _ in missing
            for repeat in range(repeats)
            for at, own in enumerate(variant.contracts)
        ]
        results = run_jobs(sorted(jobs, key=lambda job: -job.cost), processes, TableRows())
    for result in results:
        if result.stopped:
            raise RunError(f"{result.variant}: {result.stopped.why}", code=result.stopped.code)
    made = {
        column.variant.name: {
            "asked": column.asked,
            "repeats": repeats,
            "commit": commit(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(sum(r.seconds for r in results if r.variant == column.variant.name)),
            "metrics": _figures(contract, results, column.variant.name),
            "machine": machine(results[0].gpu),
        }
        for column in missing
    }
    return {
        "recipe": recipe.name,
        "title": recipe.config.title,
        "metric": recipe.config.metric,
        "unit": contract.privacy.unit,
        "delta": contract.privacy.delta,
        "rows": counts,
        "columns": {name: (kept | made)[name] for name in COLUMNS},
    }


def _figures(contract: Contract, results: list[JobResult], column: str) -> dict[str, Any]:
    """Of sites alone one run's value is the mean over the sites' models."""
    found: dict[str, Any] = {}
    for metric in contract.task.metrics:
        of_repeat: dict[int, list[float]] = {}
        for result in results:
            value = result.scores[""].get(metric)
            if result.variant == column and value is not None:
                of_repeat.setdefault(result.repeat, []).append(value)
        values = [statistics.fmean(own) for _, own in sorted(of_repeat.items())]
        if values:
            sd = statistics.stdev(values) if len(values) > 1 else 0.0
            found[metric] = {"mean": statistics.fmean(values), "sd": sd, "values": values}
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table for a README."""
    lines = [
        "| recipe | metric | pooled | alone, same rates | federated | ε 8 | ε 3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["recipes"]:
        metric = one["metric"]
        cells = []
        for column in COLUMNS:
            own = one["columns"][column]
            figure = own["metrics"].get(metric)
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
    words = parser.parse_args().words
    names = [word for word in words if "=" not in word]
    performance = computing(tuple(word for word in words if "=" in word))
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "recipes.json"
    known = json.loads(file.read_text()) if file.exists() else {"recipes": []}
    rows = {one["recipe"]: one for one in known["recipes"]}
    for column in [column for one in rows.values() for column in one["columns"].values()]:
        column.setdefault("machine", known["machine"])
    missed = 0
    found = [load_recipe(name) for name in names or recipe_names()]
    for recipe in [one for each in found for one in with_baseline(each)]:
        echo(f"{recipe.name}: {recipe.config.title}")
        made = row(recipe, os.cpu_count() or 1, performance, rows.get(recipe.name, {}))
        rows[recipe.name] = made
        result = {
            "machine": machine(""),
            "command": "make recipes",
            "recipes": [rows[key] for key in sorted(rows)],
        }
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (RESULTS / "recipes.md").write_text(markdown(result), encoding="utf-8")
        metric, expect = recipe.config.metric, recipe.config.expect
        pooled = made["columns"]["pooled"]["metrics"][metric]["mean"]
        if expect and pooled < expect - recipe.config.within:
            echo(f"✗ {recipe.name}: pooled {METRICS[metric]} {pooled:.3f}, expected {expect:.3f}")
            missed += 1
    echo(markdown(result))
    return int(missed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SilotuneError as error:
        echo(Failure.of(error).text(), err=True)
        sys.exit(error.exit_code)
