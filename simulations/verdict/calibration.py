"""What calibration does to a model's outputs on the test rows, none of which it was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from silotune.common.contract.contract import Contract
from silotune.common.tasks.calibration import Calibration, expected_error, slope
from silotune.common.tasks.metrics import score
from silotune.simulations.execution.variants import JobResult
from silotune.simulations.verdict.differences import HeldOut

# Of a slope: calibrated within these, by two standard errors.
LOWEST_SLOPE, HIGHEST_SLOPE = 0.8, 1.25


def calibration_of(
    contract: Contract, run: JobResult, rows: HeldOut, same: Sequence[Any] | None
) -> dict[str, Any]:
    """The `calibration` of result.json.

    Args:
        contract: Whose task it is.
        run: The run whose adapter is released, with its outputs for all test rows.
        rows: The test rows.
        same: The outputs of a constant answer, if there is one.

    Returns:
        `fitted`: the calibration, or None; `before` and `after` it the task's metrics, the expected
        calibration error and the calibration slope with its standard error on the test rows.
        `after` is None where nothing was fitted. `constant_loss`: the log loss of a constant
        answer.
    """
    found = run.calibration
    return {
        "fitted": found and found.model_dump(mode="json"),
        "before": _figures(contract, run.outputs, rows),
        "after": found and _figures(contract, found.apply(run.outputs), rows),
        "constant_loss": None
        if same is None
        else score(contract.task, same, rows.labels, rows.queries)["loss"],
    }


def line(content: dict[str, Any]) -> str:
    """The same in a sentence."""
    if not content["fitted"]:
        return "Calibration: none."
    fitted = Calibration.model_validate(content["fitted"])
    before, after = content["before"], content["after"]
    what = (
        f"temperature {fitted.temperature:.2f}"
        if fitted.kind == "temperature"
        else f"outputs × {fitted.slope:.2f} {fitted.offset:+.2f}"
    )
    error = (
        f", calibration error {before['expected_error']:.3f} → {after['expected_error']:.3f}"
        if before["expected_error"] is not None
        else f", R² {before['metrics']['r2']:.3f} → {after['metrics']['r2']:.3f}"
        if before["metrics"].get("r2") is not None
        else ""
    )
    name = "loss" if fitted.kind == "affine" else "log loss"
    constant = content["constant_loss"]
    against = "" if constant is None else f" (a constant answer: {constant:.3f})"
    return (
        f"Calibration by {fitted.rows:,} public rows that no figure uses: {what}; {name} "
        f"{before['metrics']['loss']:.3f} → {after['metrics']['loss']:.3f}{against}{error}."
    )


def _figures(contract: Contract, outputs: Sequence[Any], rows: HeldOut) -> dict[str, Any]:
    task = contract.task
    scores = score(task, outputs, rows.labels, rows.queries)
    by = slope(task, outputs, rows.labels)
    return {
        "metrics": {name: scores[name] for name in task.metrics},
        "expected_error": expected_error(task, outputs, rows.labels),
        "slope": by and {"value": by[0], "standard_error": by[1]},
    }
