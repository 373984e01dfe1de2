"""The folder of a Flower app: `silotune sim flower-app`."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from silotune.common.contract import contract as contracts
from silotune.common.contract.model import OneHotModel
from silotune.common.errors import UsageError
from silotune.common.secagg.key_agreement import LEAST_SITES
from silotune.simulations.comparison.export import export
from silotune.simulations.comparison.recipe import Recipe
from silotune.simulations.datasets import catalog
from silotune.simulations.execution.roster_keys import with_keys
from silotune.simulations.flower_app.sites import LIMIT, make_sites

CODE = ("__init__.py", "server_app.py", "client_app.py")
# Silotune is used as installed; Flower would build an environment with uv, from a package index.
NO_ENVIRONMENT = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"
SUPERNODES = 2  # of a simulation that is told nothing else
RUNS = 2  # that a site's budget is for; composed they cost less than twice one run


def write_app(recipe: Recipe, variant: str, rounds: int | None, sites: int, folder: Path) -> str:
    """Write a Flower app that runs a recipe in a local simulation.

    Args:
        recipe: A shipped recipe, whose data is fetched.
        variant: Which federated variant of it.
        rounds: Of the last phase, instead of its own; the budget stays the same.
        sites: How many of the recipe's sites take part, the first of its roster.
        folder: Where to; it must not exist.

    Returns:
        The command that runs the app, in its folder.

    Raises:
        UsageError: If there is no such variant, if the recipe has fewer sites, or if the folder
            is there already.
    """
    known = len(recipe.contract.sites)
    if sites > known:
        raise UsageError(
            f"--sites {sites}, and recipe {recipe.name} has {known} sites. Choose 2 to {known}."
        )
    chosen = recipe.contract.changed(
        sites=[
            site.model_dump(mode="json", exclude_none=True)
            for site in recipe.contract.sites[:sites]
        ],
        quorum=min(recipe.contract.quorum, sites),
    )
    names = export(replace(recipe, contract=chosen), variant, rounds, folder)
    file = folder / "contract.json"
    contract = with_keys(contracts.load(file), make_sites(folder, names))
    limit = RUNS * contract.privacy.epsilon
    (folder / LIMIT).write_text(f"{limit!r}\n", encoding="utf-8")
    if sites >= LEAST_SITES:
        contract = contract.with_masks(recipe.config.bound)
    file.write_text(contract.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")
    model = ""
    if not isinstance(contract.model, OneHotModel):
        model = str(catalog.fetch(contract.model.name))
    code = folder / "silotune_app"
    code.mkdir()
    own = resources.files("silotune.simulations.flower_app")
    for name in CODE:
        (code / name).write_text((own / name).read_text(encoding="utf-8"), encoding="utf-8")
    more = f' --federation-config "num-supernodes={sites}"' if sites != SUPERNODES else ""
    command = f"{NO_ENVIRONMENT} flwr run . --stream{more}"
    facts = {
        "name": f"silotune-{recipe.name}",
        "title": recipe.config.title,
        "flwr": metadata.version("flwr"),
        "folder": str(folder.resolve()),
        "model": model,
        "site_epsilon": limit,
        "rounds": contract.rounds,
        "epsilon": contract.privacy.epsilon,
        "sites": names,
        "command": command,
    }
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - TOML
    for name in ("pyproject.toml", "README.md"):
        template = environment.from_string((own / f"{name}.j2").read_text(encoding="utf-8"))
        (folder / name).write_text(template.render(facts), encoding="utf-8")
    (folder / "LICENSE").write_text("Apache-2.0\n", encoding="utf-8")
    return command
