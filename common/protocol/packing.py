"""A phase's update as one vector, the form in which it is masked.

First the trained tensors in sorted order of their names, then the metrics in the contract's, held
to their ranges (Contract.metric_ranges) and scaled so that a range's end is the bound of all
entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.protocol.messages import Arrays
from silotune.common.protocol.tensors import Shapes
from silotune.common.secagg import fixed_point

Vector = NDArray[np.float32]


def bound(contract: Contract) -> float:
    """Of each entry."""
    assert contract.secure_aggregation is not None
    return contract.secure_aggregation.bound


def factor(contract: Contract, weight: float) -> float:
    """Units of the ring per unit of value, for a site with this part of all weights."""
    return fixed_point.factor(bound(contract), weight, len(contract.sites))


def size(contract: Contract, shapes: Shapes) -> int:
    """shapes: of the tensors that the phase trains."""
    return sum(int(np.prod(shape)) for shape in shapes.values()) + len(contract.metrics)


def clamp_to_bound(contract: Contract, change: Arrays) -> Arrays:
    """The change with each entry held to the bound. To refuse it instead would say something of a
    single site's update, beside the masks; of what is private already this is post-processing."""
    most = np.float32(bound(contract))
    return {
        name: np.clip(np.nan_to_num(array, nan=0.0), -most, most) for name, array in change.items()
    }


def join(contract: Contract, change: Arrays, metrics: Mapping[Metric, float]) -> Vector:
    """[size]: what a site masks. change: held to the bound."""
    figures = [
        np.clip(metrics[metric], low, high) / high * bound(contract)
        for metric, (low, high) in contract.metric_ranges.items()
    ]
    parts = [change[name].ravel() for name in sorted(change)]
    return np.concatenate([*parts, np.asarray(figures)], dtype=np.float32, casting="same_kind")


def split(contract: Contract, shapes: Shapes, vector: Vector) -> tuple[Arrays, dict[Metric, float]]:
    """The tensors and the metrics in a (summed) vector."""
    change: Arrays = {}
    at = 0
    for name in sorted(shapes):
        count = int(np.prod(shapes[name]))
        change[name] = vector[at : at + count].reshape(shapes[name])
        at += count
    metrics = {
        metric: float(vector[at + place]) / bound(contract) * high
        for place, (metric, (_, high)) in enumerate(contract.metric_ranges.items())
    }
    return change, metrics
