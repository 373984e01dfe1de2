"""Aggregation: pure functions on named float32 arrays.

Everything here acts on what the sites have already made private, so it costs no privacy
(post-processing). All of it needs only the weighted sum of the updates, never a single one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from silotune.common.contract.privacy import Metric
from silotune.common.protocol.messages import Arrays


def weighted_mean(updates: Mapping[str, Arrays], weights: Mapping[str, float]) -> Arrays:
    """sum_i w_i u_i / sum_i w_i over the sites in `updates`; weights are the contract's.

    FFA-LoRA (arXiv 2403.12313): with A frozen and equal at every site, the mean of the B_i gives
    mean(B_i A) = mean(B_i) A exactly. float64 inside; sites in sorted order, so that the result
    does not depend on who answered first.
    """
    sites = sorted(updates)
    total = sum(weights[site] for site in sites)
    return {
        name: np.asarray(
            sum(weights[site] * updates[site][name].astype(np.float64) for site in sites) / total,
            dtype=np.float32,
        )
        for name in updates[sites[0]]
    }


def mean_figures(
    figures: Mapping[str, Mapping[Metric, float]],
    weights: Mapping[str, float],
    ranges: Mapping[Metric, tuple[float, float]],
) -> dict[Metric, float]:
    """The weighted mean of the sites' released metrics, each held to its range: what a masked sum
    gives as well."""
    total = sum(weights[site] for site in figures)
    return {
        metric: sum(
            weights[site] * min(max(figures[site][metric], low), high) for site in sorted(figures)
        )
        / total
        for metric, (low, high) in ranges.items()
    }
