"""Exact composition: what a fixed set of noised steps costs, with nothing lost to a bound.

Adjacency: add or remove one unit. Each step is the Poisson-subsampled Gaussian mechanism with noise
multiplier s, rate q and clip norm C. With S the other units' part of its sum, what leaves is
S + sC Z without the unit, and S + b g + sC Z with it: b is 1 with probability q, else 0, g with
|g| <= C is the unit's part, and Z is standard normal. Both are one function of a single number x
and of fresh noise: with c = |g|, u = g / c, and standard normal W and Z', Z' orthogonal to u,

    S + (c x + sqrt(C^2 - c^2) s W) u + sC Z'

where x is drawn from P = N(0, s^2) without the unit and from Q = (1 - q) N(0, s^2) + q N(1, s^2)
with it. So all that leaves in n steps is a function of n independent numbers x, whatever the
records and the weights are. That stays true where whoever asks chooses inputs, the order of the
steps or an early end after each reply: a step not taken is an x not looked at, and the next x is
independent of all that was seen. So (data processing) what leaves is as private as the product of
the steps' P against the product of their Q, in both directions. Only the set of the steps has to be
fixed beforehand; steps that are not need a filter (client/privacy/budget.py). (P, Q) is the
dominating pair of a step: Zhu, Dong and Wang 2022, arXiv 2106.08567.

Where q = 1 in every step the product is one Gaussian mechanism with noise multiplier
(sum of 1 / s^2)^(-1/2), and epsilon follows in closed form (Balle and Wang 2018, arXiv 1805.06530,
Theorem 8). Otherwise it is the larger one by both directions' privacy loss distributions, which
dp-accounting composes numerically on a grid that rounds to the worse side (Doroshenko et al. 2022,
arXiv 2207.04380).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from silotune.client.privacy.accountant import Mechanism

# Points of the grid to the standard deviation of one step's loss, and of the loss of all steps.
# Epsilon is then at most about 1e-4 of itself too large; with a million steps 2e-3.
POINTS = 30
MOST_POINTS = 6_000
FINEST = 2.0**-27  # of the grid: below it rounding shows
# What the numerical composition resolves; its Fourier transforms leave about 1e-16 a step.
LEAST_DELTA, DELTA_OF_A_STEP = 1e-10, 1e-14


@lru_cache(maxsize=1 << 13)
def epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Epsilon of all steps together.

    Args:
        mechanisms: Each kind of step once, with noise; at least one.
        delta: The δ that goes with it; at least `least_delta` of them.
    """
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    sampled = [m for m in mechanisms if m.sampling_rate < 1]
    mu = math.sqrt(sum(m.steps / m.noise_multiplier**2 for m in mechanisms if m.sampling_rate == 1))
    if not sampled:
        return float(get_epsilon_gaussian(1 / mu, delta))
    interval = _interval(mechanisms)
    composed: Any = _loss(1 / mu, 1.0, interval) if mu else None
    for m in sampled:
        loss = _loss(m.noise_multiplier, m.sampling_rate, interval).self_compose(m.steps)
        composed = composed.compose(loss) if composed else loss
    return float(composed.get_epsilon_for_delta(delta))


def least_delta(mechanisms: Sequence[Mechanism]) -> float:
    """The smallest δ at which `epsilon` is no less than what these steps cost."""
    if all(m.sampling_rate == 1 for m in mechanisms):
        return 0.0
    return max(LEAST_DELTA, DELTA_OF_A_STEP * sum(m.steps for m in mechanisms))


def loss_variance(mechanisms: Sequence[Mechanism]) -> float:
    """About the variance of the privacy loss of all steps together: exact at q = 1 and where the
    loss is small."""
    of_steps = np.array([(1 / m.noise_multiplier**2, m.sampling_rate, m.steps) for m in mechanisms])
    unsampled, rate, steps = of_steps.T
    # The smaller one counts, which is the first where the exponential would overflow.
    sampled = rate**2 * np.expm1(np.minimum(unsampled, 500))
    return float((steps * np.minimum(unsampled, sampled)).sum())


def _interval(mechanisms: Sequence[Mechanism]) -> float:
    """The grid's: a power of two, so that a plan and its beginning have the same one."""
    steps = sum(m.steps for m in mechanisms)
    points = min(POINTS * math.sqrt(steps), MOST_POINTS)
    interval = math.sqrt(loss_variance(mechanisms)) / points
    return max(2.0 ** math.floor(math.log2(interval)), FINEST)


@lru_cache(maxsize=64)
def _loss(noise_multiplier: float, sampling_rate: float, interval: float) -> Any:
    """Both directions' privacy loss of one step."""
    from dp_accounting.pld import privacy_loss_distribution  # half a second: only who samples waits

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=interval
    )
