"""A recipe's records and contract as files, as a deployment of it needs them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd

from silotune.common.contract.contract import Contract
from silotune.common.errors import UsageError, did_you_mean
from silotune.simulations.comparison.recipe import Recipe
from silotune.simulations.datasets import catalog
from silotune.simulations.datasets.split import split
from silotune.simulations.datasets.tables import TABLES
from silotune.simulations.execution.variants import variants_of


def contracts_of(recipe: Recipe) -> dict[str, Contract]:
    """The contract of each variant that can be exported, by name: the federated ones with DP."""
    return {
        variant.name: variant.contracts[0]
        for variant in variants_of(recipe.contract, recipe.config.variants)
        if len(variant.contracts) == 1 and variant.private
    }


def export(recipe: Recipe, variant: str, rounds: int | None, folder: Path) -> list[str]:
    """Write contract.json, records/<site>.csv and test.csv; returns the sites' names.

    A site's name is in lower case with dashes, fit for a file and a user. rounds: of the last
    phase, whose budget stays the same. UsageError for an unknown variant, or a folder that is
    there.
    """
    variants = contracts_of(recipe)
    if variant not in variants:
        raise UsageError(
            f"There is no federated variant '{variant}'."
            f"{did_you_mean(variant, variants)} Known: {', '.join(variants)}."
        )
    if folder.exists():
        raise UsageError(f"{folder} is there already. Choose another folder.")
    catalog.fetch(TABLES[recipe.table].source)
    contract = variants[variant]
    slugs = {site.name: _slug(site.name) for site in contract.sites}
    phases = [phase.model_dump(mode="json", exclude_none=True) for phase in contract.phases]
    if rounds:
        phases[-1]["rounds"] = rounds
    made: Contract = contract.changed(
        phases=phases,
        sites=[
            site.model_dump(mode="json", exclude_none=True) | {"name": slugs[site.name]}
            for site in contract.sites
        ],
    )
    work = folder / "split"
    split(recipe.table, work)
    (folder / "records").mkdir()
    for name, slug in slugs.items():
        (work / "train" / f"{name}.csv").rename(folder / "records" / f"{slug}.csv")
    test = [
        pd.read_csv(work / "test" / f"{name}.csv", dtype=str, keep_default_na=False)
        for name in slugs
    ]
    pd.concat(test).to_csv(folder / "test.csv", index=False)
    shutil.rmtree(work)
    (folder / "contract.json").write_text(
        made.model_dump_json(indent=1, exclude_none=True), encoding="utf-8"
    )
    return list(slugs.values())


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
