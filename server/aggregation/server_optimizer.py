"""The server's steps on an aggregate: momentum, adaptive steps, clip norm, running mean."""

from __future__ import annotations

import math

import numpy as np

from silotune.common.contract.aggregation import Adaptive
from silotune.common.contract.privacy import AdaptiveClipping
from silotune.common.protocol.messages import Arrays


def server_momentum_step(
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
            x = adapter[name] + np.float32(settings.lr) * m / (np.sqrt(v) + settings.tau)
        next_first[name], next_second[name], moved[name] = m, v, x.astype(np.float32)
    return moved, next_first, next_second


def next_clip_norm(clip_norm: float, unclipped: float, settings: AdaptiveClipping) -> float:
    """C exp(-rate (mean of the sites' noised unclipped shares - quantile)), within the contract's
    bounds (arXiv 1905.03871, section 2.1, the geometric update)."""
    # A masked sum may hold what no honest site puts in.
    step = math.exp(-settings.lr * (min(max(unclipped, 0.0), 1.0) - settings.quantile))
    return min(max(clip_norm * step, settings.min_clip_norm), settings.max_clip_norm)


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
