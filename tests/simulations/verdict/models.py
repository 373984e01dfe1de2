"""Made-up models of two classes at two sites, as good and as sure as a test needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from silotune.common.contract.contract import Contract
from silotune.common.tasks.calibration import Calibration
from silotune.common.tasks.metrics import constant, score
from silotune.server.rounds.run import RoundRecord
from silotune.simulations.execution.variants import JobResult
from silotune.simulations.verdict.calibration import calibration_of
from silotune.simulations.verdict.checklist import Comparison, Item, checklist
from silotune.simulations.verdict.differences import HeldOut

SITES = ("north", "south")
Skills = Mapping[str, float | Sequence[float]]


def rows_of(n: int) -> HeldOut:
    return HeldOut([row % 2 for row in range(n)], [SITES[row // 2 % 2] for row in range(n)])


def outputs_of(rows: HeldOut, skill: float, seed: int = 0, sharpness: float = 1.0) -> Any:
    """Logits of a model: its AUC is Phi(skill / √2), and they are calibrated for a sharpness of 1.
    Models of one seed are as right or wrong about the same rows."""
    y = np.asarray(rows.labels)
    seen = skill * (y - 0.5) + np.random.default_rng(seed).normal(size=len(y))
    return np.stack([np.zeros(len(y)), sharpness * max(skill, 0.2) * seen], axis=1)


def runs_of(rows: HeldOut, skills: Skills, **more: Any) -> list[JobResult]:
    """A run for each skill of a variant; "alone" has one for each site and skill."""
    made = []
    for number, (variant, found) in enumerate(skills.items()):
        for repeat, skill in enumerate(found if isinstance(found, Sequence) else [found]):
            groups = [(site,) for site in SITES] if variant.startswith("alone") else [SITES]
            for sites in groups:
                outputs = outputs_of(rows, skill, 100 * repeat + number, more.get("sharpness", 1.0))
                made.append(
                    JobResult(
                        variant,
                        repeat,
                        sites,
                        {"": {"predicted_classes": more.get("classes", 2)}},
                        (
                            RoundRecord(
                                1, sites, more.get("failed", {}), epsilon_of(more), 1, 1, 0.1
                            ),
                        ),
                        1.0,
                        1,
                        1,
                        outputs=outputs,
                        calibration=more.get("calibration"),
                    )
                )
    return made


def epsilon_of(more: Mapping[str, Any]) -> dict[str, float | None]:
    return more.get("epsilon", dict.fromkeys(SITES, 7.9))  # type: ignore[no-any-return]


def items_of(
    contract: Contract,
    rows: HeldOut,
    skills: Skills,
    *,
    metric: str = "auc",
    main: str = "federated-lora",
    private: bool = True,
    insecure: bool = False,
    **more: Any,
) -> dict[str, Item]:
    """The checklist of such models, by name."""
    runs = runs_of(rows, skills, **more)
    same = constant(contract.task, rows.labels)
    comparison = Comparison(contract, metric, main, runs, rows, same)
    first = next(run for run in runs if run.variant == main)
    content = calibration_of(contract, first, rows, same)
    epsilon = epsilon_of(more)
    found = checklist(comparison, content, epsilon, private=private, insecure=insecure)
    return {item.name: item for item in found}


def temperature(value: float) -> Calibration:
    return Calibration(kind="temperature", temperature=value, rows=40)


def auc_of(contract: Contract, rows: HeldOut, outputs: Any) -> float:
    found = score(contract.task, outputs, rows.labels)["auc"]
    assert found is not None
    return found
