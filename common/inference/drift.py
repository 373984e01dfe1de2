"""When a stream of predictions changes: how often each label is predicted, and since when that
differs.

A detector watches each label by itself. Nothing here is private or meant to be: what it says of
private rows is given without noise and stays with whoever holds them.

Shapes: N rows in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from silotune.common.errors import ErrorCode, UsageError

FALSE_ALARMS = 0.01  # ADWIN's delta; chance rows raise fewer, for its bound is no tight one
LEAST = 100  # rows before the first alarm
SHORTEST = 25  # rows on each side of a change
EVERY = 8  # rows between two looks


class Alert(NamedTuple):
    """row: where the change was noticed; since: the first row of what is new (both from 0).
    before, after: the label's share in the rows from the last change to `since`, and from there to
    `row`."""

    label: str
    row: int
    since: int
    before: float
    after: float


def alerts(values: Mapping[str, Sequence[float]], delta: float = FALSE_ALARMS) -> list[Alert]:
    """The changes of each label's values [N], each 0 to 1, in order of `row`.

    ADWIN (Bifet and Gavaldà 2007, SIAM Data Mining): it keeps the latest rows as long as no split
    of them has two means that differ by more than chance would let them, with probability at most
    delta at each look. What it reads after `row` can't change an alert. UsageError if River is not
    installed.
    """
    if find_spec("river") is None:
        raise UsageError(
            "Changes are found by River, which is not installed: `pip install river`, or install "
            "Silotune with its extra 'monitor'.",
            code=ErrorCode.CONFIG_INVALID,
        )
    found = [alert for label, own in values.items() for alert in _of(label, own, delta)]
    return sorted(found, key=lambda alert: alert.row)


def _of(label: str, values: Sequence[float], delta: float) -> list[Alert]:
    from river.drift import ADWIN

    def fresh() -> Any:
        make: Any = ADWIN  # it has no types
        return make(delta=delta, clock=EVERY, grace_period=LEAST, min_window_length=SHORTEST)

    x = np.asarray(values, dtype=np.float64)
    found, start, detector = [], 0, fresh()
    for row, value in enumerate(x):
        detector.update(float(value))
        if detector.drift_detected:
            since = start + change_point(x[start : row + 1])
            before, after = x[start:since].mean(), x[since : row + 1].mean()
            found.append(Alert(label, row, since, float(before), float(after)))
            # What is new is a stream of its own: its rows are read again, without the old ones.
            start, detector = since, fresh()
            for again in x[since : row + 1]:
                detector.update(float(again))
    return found


def change_point(x: NDArray[np.float64]) -> int:
    """Where x [n] falls into two parts whose means explain most of it (least squares; Hinkley 1970
    for one change of a mean): the first place of the second part. Each part has SHORTEST rows at
    least; n is twice that or more."""
    n = len(x)
    k = np.arange(SHORTEST, n - SHORTEST + 1)
    first = np.cumsum(x)[k - 1]
    between = (first / k - (x.sum() - first) / (n - k)) ** 2 * k * (n - k)
    return int(k[between.argmax()])
