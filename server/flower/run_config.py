"""Keys that Flower's apps usually have in their run config, held against the contract.

The contract alone says how a run goes: a key that says something else, or one that nothing reads,
would be ignored in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from silotune.common.contract.contract import Contract
from silotune.common.errors import ErrorCode, UsageError

APP = ("folder", "model", "site-epsilon")  # what the app itself reads


class Fixed(NamedTuple):
    """What the contract says: the values, one or one for each phase, and a clause with them."""

    values: list[float]
    clause: str


def check_run_config(config: Mapping[str, object], contract: Contract) -> None:
    """Refuse a run config that says something else than the contract.

    Args:
        config: The run config: what the app reads, and keys that Flower's templates have.
        contract: What the run is carried out by.

    Raises:
        UsageError: For a key that is not known; it names the known ones. For the first key with
            another value; it names both values.
    """
    known = _fixed(contract)
    for key in config:
        if key not in known and key not in APP:
            raise UsageError(
                f"{key} in the run config is not a key that the app reads: remove it, or use one "
                f"of: {', '.join((*APP, *known))}.",
                code=ErrorCode.CONFIG_INVALID,
            )
    for key, fixed in known.items():
        if key in config and not all(_equal(config[key], value) for value in fixed.values):
            raise UsageError(
                f"{key} = {config[key]!r} in the run config, and {fixed.clause}. Correct {key} or "
                "remove it, or make an app with another contract."
            )


def _equal(given: object, value: float) -> bool:
    """Whether a value is the contract's, up to the rounding of a product or of decimals."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        return False
    return math.isclose(given, value, rel_tol=1e-9)


def _fixed(contract: Contract) -> dict[str, Fixed]:
    """By the keys of a run config."""
    p, phases = contract.privacy, contract.phases
    rounds = Fixed([contract.rounds], f"the contract has rounds = {contract.rounds}")
    everyone = Fixed([1], "the contract asks a fraction of 1.0 of its sites in each round")
    nobody = Fixed([0], "the contract asks 0 sites to evaluate")
    quorum = Fixed([contract.quorum], f"the contract has quorum = {contract.quorum}")
    rates = [rate for phase in phases for rate in (phase.head_lr, phase.adapter_lr) if rate]
    rate = Fixed(rates, f"the contract has learning rates {_listed(rates)}")
    passes = [phase.local_steps * phase.sampling_rate for phase in phases]
    epochs = Fixed(
        passes,
        f"the contract has sites pass {_listed(passes)} times over their records in a round",
    )
    batches = [phase.sampling_rate * p.expected_units for phase in phases]
    batch = Fixed(batches, f"the contract expects batches of {_listed(batches)}, drawn at random")
    return {
        "num-server-rounds": rounds,
        "num-rounds": rounds,
        "fraction-train": everyone,
        "fraction-fit": everyone,
        "fraction-evaluate": nobody,
        "min-available-nodes": quorum,
        "min-available-clients": quorum,
        "min-train-nodes": quorum,
        "min-fit-clients": quorum,
        "min-evaluate-nodes": nobody,
        "local-epochs": epochs,
        "learning-rate": rate,
        "lr": rate,
        "batch-size": batch,
    }


def _listed(values: list[float]) -> str:
    return " and ".join(f"{value:g}" for value in dict.fromkeys(values))
