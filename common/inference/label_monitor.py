"""What an adapter says of a stream of rows: how often each label, drawn over time with its changes.

The rows need no labels. They may be private: what is computed of them here is without noise and
stays on the machine that holds them.

Shapes: N rows in their order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from silotune.common.contract.contract import Contract
from silotune.common.contract.task import Classification, MultiLabel, Regression
from silotune.common.data import records
from silotune.common.data.records import Inputs, Table
from silotune.common.errors import DataError, ErrorCode, UsageError
from silotune.common.inference.drift import Alert
from silotune.common.models.base import Network
from silotune.common.tasks.calibration import Calibration

WIDTH, HEIGHT = 9.0, 1.15  # inches, of each label's panel
SMOOTHED = 100  # rows that a point of a curve is the mean of


def check_task(contract: Contract) -> None:
    """UsageError unless an answer is one of few labels, or a number between bounds."""
    if not isinstance(contract.task, (Classification, MultiLabel, Regression)):
        raise UsageError(
            f"'{contract.name}' is a task of {contract.task.kind}; a watch is of "
            "classification, multi-label or regression."
        )


def ordered(table: Table, column: str) -> Table:
    """The table's rows by a column of numbers, or of times in ISO 8601; equal ones stay as they
    stand. DataError if it is not there, or holds anything else."""
    keys = _keys([cell.strip() for cell in records.column(table, column)])
    if keys is None:
        raise DataError(
            f"Column '{column}' of {table.source} does not put the rows in order: each needs a "
            "number, or each a time as 2026-11-22 or 2026-11-22T14:05:00, all with a zone or all "
            "without.",
            code=ErrorCode.SCHEMA_MISMATCH,
        )
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return Table(table.source, table.header, [table.rows[row] for row in order])


def _keys(cells: Sequence[str]) -> list[Any] | None:
    """What to sort by: all numbers, or all times; None if they are neither."""
    with contextlib.suppress(ValueError):
        numbers = [float(cell) for cell in cells]
        return numbers if all(map(math.isfinite, numbers)) else None
    with contextlib.suppress(ValueError):
        times = [datetime.fromisoformat(cell) for cell in cells]
        return times if len({time.tzinfo is None for time in times}) < 2 else None
    return None


def scores_by_tag(
    contract: Contract,
    model: Network,
    arrays: Any,
    inputs: Inputs,
    calibration: Calibration | None = None,
) -> dict[str, list[float]]:
    """Of each label [N]: 1 where it is predicted, else 0; of a regression the share between
    bounds. calibration: what outputs are calibrated by."""
    task = contract.task
    encoded = model.encode(inputs)
    # What is kept of a row of these tasks does not depend on its target.
    blank = [[0] * task.outputs if isinstance(task, MultiLabel) else 0] * len(inputs)
    with model.lock:
        model.load(arrays)
        outputs = np.asarray(
            model.predict(
                encoded, model.objective.tensor(blank), adapter=contract.adapter is not None
            )
        )
    if calibration is not None:
        outputs = np.asarray(calibration.apply(outputs))
    if isinstance(task, Regression):
        return {task.label_column: np.clip(outputs[:, 0], 0, 1).tolist()}
    assert isinstance(task, (Classification, MultiLabel))
    if isinstance(task, Classification):
        found = outputs.argmax(axis=1)[:, None] == np.arange(task.outputs)
    else:
        found = outputs > 0
    return {
        label.name: column.astype(float).tolist()
        for label, column in zip(task.labels, found.T, strict=True)
    }


def draw(values: Mapping[str, Sequence[float]], alerts: Sequence[Alert], file: Path) -> None:
    """A panel for each label: its share over time, and where it changed. Written as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    n = len(next(iter(values.values())))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "watch"}):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(values) + 0.4), layout="constrained")
        for place, (axes, (label, own)) in enumerate(
            zip(
                figure.subplots(len(values), sharex=True, squeeze=False)[:, 0],
                values.items(),
                strict=True,
            )
        ):
            size = min(SMOOTHED, n)
            curve = np.convolve(own, np.ones(size) / size, mode="valid")
            axes.plot(np.arange(size - 1, n) + 1, curve, color="#0a5c9e", linewidth=1.2)
            top = max(curve.max() * 1.15, 0.02)
            for alert in (a for a in alerts if a.label == label):
                axes.axvspan(alert.since + 1, alert.row + 1, color="#f3d9d5", linewidth=0)
                axes.axvline(alert.row + 1, color="#a3180c", linewidth=1)
                axes.annotate(
                    f"{alert.before:.0%} → {alert.after:.0%}",
                    (alert.row + 1, top),
                    xytext=(3, -2),
                    textcoords="offset points",
                    va="top",
                    fontsize=8,
                    color="#a3180c",
                )
            axes.set_ylim(0, top)
            axes.set_xlim(1, max(n, 2))
            axes.set_title(label, loc="left", fontsize=9, weight="bold", pad=3)
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
            axes.locator_params(axis="y", nbins=3)
            axes.tick_params(labelsize=8, length=0, colors="#586472")
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
            axes.spines["bottom"].set_color("#dce2e8")
            if place == len(values) - 1:
                axes.set_xlabel(
                    f"row (each point: the last {size} rows; red: noticed, shaded: since when)",
                    fontsize=8,
                    color="#586472",
                )
        figure.savefig(file, format="svg", metadata={"Date": None})
