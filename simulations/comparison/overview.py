"""`silotune sim show`: what a recipe is, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from silotune.client.privacy.accountant import EXACT
from silotune.common.contract.compute import Performance
from silotune.common.contract.model import OneHotModel
from silotune.common.contract.privacy import epsilon_text
from silotune.common.tasks.metrics import METRICS
from silotune.simulations.comparison.duration import Duration, clock, file_of
from silotune.simulations.comparison.recipe import Recipe
from silotune.simulations.datasets import catalog
from silotune.simulations.datasets.tables import TABLES
from silotune.simulations.execution.variants import variants_of


def overview(recipe: Recipe) -> dict[str, Any]:
    """What `sim show` prints of a shipped recipe; nothing is fetched or computed.

    `measured` is how long one run of the contract's own variant took where recipes.json has it,
    `last_run` the memory of the last `sim run` on this machine; each is None if it is not known.
    """
    contract, config = recipe.contract, recipe.config
    source = catalog.SOURCES[TABLES[recipe.table].source]
    p, model = contract.privacy, contract.model
    last = Duration.load(file_of(contract, Performance()))
    return {
        "name": recipe.name,
        "title": config.title,
        "about": config.about.strip(),
        "task": contract.task.kind,
        "answers": contract.task.answers,
        "metric": METRICS[config.metric],
        "data": {
            "source": source.name,
            "about": source.about,
            "licence": source.licence,
            "here": source.path.is_dir(),
            "on_an_index": source.requirement != catalog.LAID,
            "records": config.records,
            "sites": [site.name for site in contract.sites],
        },
        "model": "one-hot public bins" if isinstance(model, OneHotModel) else model.name,
        "trains": contract.adapter.words if contract.adapter else "the head",
        "method": contract.aggregation.method if contract.adapter else "mean of the updates",
        "privacy": {"epsilon": p.epsilon, "delta": p.delta, "unit": p.unit, "accountant": EXACT},
        "rounds": contract.rounds,
        "variants": [
            {"name": v.name, "label": v.label} for v in variants_of(contract, config.variants)
        ],
        "repeats": config.repeats,
        "baseline_repeats": config.baseline_repeats,
        "measured": config.measured and config.measured.model_dump(),
        "last_run": None if last is None else {"date": last.date, "memory_bytes": last.memory},
        "sha256": contract.hash,
    }


def described(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines of an overview: what each is of, and its text."""
    data, p = found["data"], found["privacy"]
    place = "it is here"
    if not data["here"]:
        place = "a run fetches it" if data["on_an_index"] else "it is on no index and not here"
    measured, last = found["measured"], found["last_run"]
    took = [] if measured or last else ["not recorded"]
    if measured:
        took.append(
            f"{clock(measured['seconds'])} for one run of federated-lora ({measured['machine']}, "
            f"commit {measured['commit']})"
        )
    if last:
        took.append(
            f"{last['memory_bytes'] / 2**30:.1f} GB of memory here on {last['date']}, all "
            "processes together"
        )
    return [
        ("about", found["about"]),
        ("task", f"{found['task']}: {found['answers']}; measured by {found['metric']}"),
        ("data", f"{data['about']}; {data['records']:,} records are used; {place}"),
        ("licence", data["licence"]),
        ("sites", f"{len(data['sites'])}: {', '.join(data['sites'])}"),
        ("model", f"{found['model']}; trains {found['trains']}; {found['method']}"),
        (
            "privacy",
            f"ε ≤ {epsilon_text(p['epsilon'])}, δ = {p['delta']:g} per {p['unit']} and site "
            f"({p['accountant']})",
        ),
        ("rounds", str(found["rounds"])),
        (
            "variants",
            f"{', '.join(variant['name'] for variant in found['variants'])}; "
            f"repeats={found['repeats']} baseline_repeats={found['baseline_repeats']}",
        ),
        ("takes", "; ".join(took)),
        ("hash", found["sha256"]),
    ]
