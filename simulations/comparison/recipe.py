"""A recipe: a contract, the rows it is run on, and the facts of its page.

Shipped ones lie in recipes/, each in a folder with contract.toml, recipe.toml and README.md. One of
your own is a contract file and a table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from silotune.common.config import types
from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import TableInput
from silotune.common.contract.model import OneHotModel
from silotune.common.contract.task import Task
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import DataError, UsageError, did_you_mean
from silotune.simulations.datasets import catalog, split
from silotune.simulations.datasets.split import Split
from silotune.simulations.datasets.tables import TABLES
from silotune.simulations.execution.variants import scale_learning_rates, scaled_phases
from silotune.simulations.recipes.recipe_config import RecipeConfig

OWN_REPEATS = 2
# Of the quick form: the most rounds of a phase, by whether it adapts layers, which takes longer.
QUICK_ROUNDS = {False: 20, True: 3}


@dataclass(frozen=True)
class Recipe:
    """A contract with what it is run on and compared with.

    Attributes:
        name: The recipe's name, or that of the contract's file.
        contract: What is run.
        config: What recipe.toml has beside it.
        source: Name, SHA-256 and origin of the data, for a report.
        rows: Given the folder of a run it writes the split (simulations/datasets/split.py).
    """

    name: str
    contract: Contract
    config: RecipeConfig
    source: dict[str, Any]
    rows: Callable[[Path], Split]

    @property
    def table(self) -> str:
        """Name of the public table of a shipped recipe; KeyError for your own file."""
        if self.config.table is None:
            raise KeyError(self.name)
        return self.config.table

    def at(self, epsilon: float) -> Recipe:
        """The recipe with another ε, its learning rates under DP times what `lr_scale` of
        recipe.toml says for it: with more noise they must be lower, those of the other variants,
        too."""
        contract = self.contract.changed(privacy={"epsilon": epsilon})
        factor = self.config.lr_scale.get(epsilon)
        if not factor:
            return replace(self, contract=contract)
        variants = {
            name: plan
            | ({} if name == "no-dp" else {"phases": scaled_phases(plan["phases"], factor)})
            for name, plan in self.config.variants.items()
        }
        return replace(
            self,
            contract=scale_learning_rates(contract, factor),
            config=self.config.model_copy(update={"variants": variants}),
        )

    def quick(self) -> Recipe:
        """The recipe with one run of each variant and fewer rounds: for a look, not for figures."""
        variants = {
            name: plan | {"phases": _shortened(plan["phases"])}
            for name, plan in self.config.variants.items()
        }
        phases = self.contract.model_dump(mode="json", exclude_none=True)["phases"]
        changes = {"variants": variants, "repeats": 1, "baseline_repeats": 1}
        return replace(
            self,
            contract=self.contract.changed(phases=_shortened(phases)),
            config=self.config.model_copy(update=changes),
        )


def _shortened(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Phases, as tables, with no more rounds than the quick form has."""
    made = []
    for phase in phases:
        rounds = min(phase["rounds"], QUICK_ROUNDS[phase["trains"] != "head"])
        short = phase | {"rounds": rounds}
        schedule = phase.get("schedule") or {}
        if schedule.get("warmup_rounds", 0) >= rounds:
            short["schedule"] = schedule | {"warmup_rounds": rounds - 1}
        made.append(short)
    return made


def recipe_names() -> list[str]:
    root = resources.files("silotune.simulations.recipes")
    return sorted(p.name for p in root.iterdir() if (p / "recipe.toml").is_file())


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name; UsageError if there is none."""
    if name not in recipe_names():
        raise UsageError(
            f"There is no recipe '{name}'.{did_you_mean(name, recipe_names())} "
            f"Known: {', '.join(recipe_names())}."
        )
    folder = resources.files("silotune.simulations.recipes") / name
    text = (folder / "contract.toml").read_text(encoding="utf-8")
    config = types.parse(
        (folder / "recipe.toml").read_text(encoding="utf-8"), f"{name}/recipe.toml", RecipeConfig
    )
    table = str(config.table)
    found = catalog.SOURCES[TABLES[table].source]

    def rows(_: Path) -> Split:
        place = catalog.home() / "splits" / table
        return Split(split.split(table, place), place)

    source = {
        "name": found.about,
        "sha256": found.sha256,
        "source": f"{found.requirement or found.path}, {found.main}; {found.licence}",
    }
    return Recipe(name, contracts.parse(text, f"{name}/contract.toml"), config, source, rows)


def own_recipe(
    file: Path, table: Path, site_column: str | None, reading: Reading | None = None
) -> Recipe:
    """`recipe_of` a contract's file, with its baselines. UsageError if there is no such file."""
    contract = contracts.load(file)
    if not table.is_file():
        raise UsageError(f"data={table} is no file. Name a file of records.")
    return with_baselines(recipe_of(contract, file.stem, table, site_column, reading))


def recipe_of(
    contract: Contract,
    name: str,
    table: Path,
    site_column: str | None,
    reading: Reading | None = None,
) -> Recipe:
    """A contract and a file of records: every variant has the contract's plan, and without DP its
    clipping, too; the figure is the task's first metric that it defines. Without `site_column` each
    row, or entity, goes to a site drawn by a fixed seed. DataError if the file cannot be read.
    """
    phases = contract.model_dump(mode="json", exclude_none=True)["phases"]
    config = RecipeConfig(
        title=table.name,
        metric=metric_of(contract.task),
        evaluate_every=1,
        repeats=OWN_REPEATS,
        baseline_repeats=OWN_REPEATS,
        about="Your own file, in a simulation: nothing left this machine.",
        # With the same clipping the contract's learning rates fit without noise, too.
        variants={"no-dp": {"phases": phases, "privacy": {"clip_only": True}}},
    )

    def rows(folder: Path) -> Split:
        return split.of_file(table, contract, site_column, folder / "split", reading)

    try:
        digest = hashlib.sha256(table.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"Data file {table} cannot be read: {error.strerror}.") from None
    source = {"name": table.name, "sha256": digest, "source": "your own file"}
    return Recipe(name, contract, config, source, rows)


def with_baselines(recipe: Recipe) -> Recipe:
    """The recipe with plans for the baselines that train a head alone, where it has none and they
    make sense: its rounds that train the head alone, or all that train it, with the whole budget
    and the contract's learning rates."""
    plans, contract = dict(recipe.config.variants), recipe.contract
    phases = _head_phases(contract)
    if not phases or contract.personal:
        return recipe
    if contract.adapter and _valid(contract, adapter=None, phases=phases):
        plans.setdefault("head", {"phases": phases})
    one_hot = {"adapter": None, "model": {"kind": "one-hot"}, "phases": phases}
    if (
        not isinstance(contract.model, OneHotModel)
        and isinstance(contract.input, TableInput)
        and _valid(contract, **one_hot)
    ):
        plans.setdefault("one-hot", {"phases": phases})
    return replace(recipe, config=recipe.config.model_copy(update={"variants": plans}))


def _head_phases(contract: Contract) -> list[dict[str, Any]]:
    phases = contract.model_dump(mode="json", exclude_none=True)["phases"]
    own = [p for p in phases if p["trains"] == "head"]
    of_both = [p for p in phases if p["trains"] == "head+adapter"]
    chosen = [p | {"trains": "head"} for p in own or of_both]
    whole = sum(p["budget_share"] for p in chosen)
    return [
        {k: v for k, v in p.items() if k != "adapter_lr"}
        | {"budget_share": p["budget_share"] / whole}
        for p in chosen
    ]


def _valid(contract: Contract, **sections: Any) -> bool:
    try:
        Contract.model_validate(contract.model_dump(mode="json") | sections)
    except ValidationError:
        return False
    return True


def metric_of(task: Task) -> str:
    """The first of the task's; the areas under curves are of two classes only."""
    areas = ("auc", "auprc") if task.kind == "classification" and task.outputs > 2 else ()
    return next(name for name in task.metrics if name not in areas)
