"""Aggregation: pure functions on named float32 arrays.

Everything here acts on what the sites have already made private, so it costs no privacy
(post-processing). All of it needs only the weighted sum of the updates, never a single one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from silotune.common.contract.plan import Adaptive, AdaptiveClipping, Metric
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


def heavy_ball(
    adapter: Arrays, velocity: Arrays, change: Arrays, momentum: float
) -> tuple[Arrays, Arrays]:
    """v <- momentum v + change; x <- x + v (Polyak 1964). Tensors not in `change` stay, and so
    do their velocities.

    Returns the next adapter and velocity.
    """
    next_velocity = velocity | {
        name: momentum * velocity.get(name, np.zeros_like(step)) + step
        for name, step in change.items()
    }
    next_adapter = {
        name: (array + next_velocity[name]).astype(np.float32) if name in change else array
        for name, array in adapter.items()
    }
    return next_adapter, next_velocity


def adaptive_step(
    adapter: Arrays, first: Arrays, second: Arrays, change: Arrays, settings: Adaptive
) -> tuple[Arrays, Arrays, Arrays]:
    """m <- b1 m + (1 - b1) d; v <- b2 v + (1 - b2) d^2, or for Yogi
    v <- v - (1 - b2) d^2 sign(v - d^2); x <- x + rate m / (sqrt(v) + tau) (arXiv 2003.00295).

    first, second: m and v, zero where a tensor is missing. Returns the next adapter, m and v.
    """
    b1, b2 = np.float32(settings.beta1), np.float32(settings.beta2)
    next_first, next_second, moved = dict(first), dict(second), dict(adapter)
    for name, step in change.items():
        m, v = (moments.get(name, np.zeros_like(step)) for moments in (first, second))
        square = step * step
        m = b1 * m + (1 - b1) * step
        v = (
            (v - (1 - b2) * square * np.sign(v - square))
            if settings.kind == "yogi"
            else (b2 * v + (1 - b2) * square)
        )
        with np.errstate(all="ignore"):  # the caller looks for what is not finite
            x = adapter[name] + np.float32(settings.rate) * m / (np.sqrt(v) + settings.tau)
        next_first[name], next_second[name], moved[name] = m, v, x.astype(np.float32)
    return moved, next_first, next_second


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


def next_clip_norm(clip_norm: float, unclipped: float, settings: AdaptiveClipping) -> float:
    """C exp(-rate (mean of the sites' noised unclipped shares - quantile)), within the contract's
    bounds (arXiv 1905.03871, section 2.1, the geometric update)."""
    # A masked sum may hold what no honest site puts in.
    step = math.exp(-settings.rate * (min(max(unclipped, 0.0), 1.0) - settings.quantile))
    return min(max(clip_norm * step, settings.lowest), settings.highest)


def running_mean(mean: Arrays, count: int, latest: Arrays) -> Arrays:
    """The mean of count + 1 iterates from the mean of the first `count`."""
    return (
        {
            name: (mean[name] + (latest[name] - mean[name]) / (count + 1)).astype(np.float32)
            for name in latest
        }
        if count
        else dict(latest)
    )
