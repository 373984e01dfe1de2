"""The exact noise of the Gaussian mechanism without sampling, in closed form."""

from __future__ import annotations

import math

PRECISION = 1e-9  # relative, of the noise multiplier


def noise_multiplier(epsilon: float, delta: float) -> float:
    """The smallest noise multiplier of one release that is (epsilon, delta)-DP.

    With mu = 1 / sigma the mechanism is (epsilon, delta)-DP exactly if
    Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu) <= delta (Balle and Wang
    2018, arXiv 1805.06530, Theorem 8). T releases with noise multipliers s_t are one with
    1 / sigma^2 = sum of 1 / s_t^2, so T equal ones need sqrt(T) times what is returned here.

    Args:
        epsilon: Of the guarantee, above 0.
        delta: Of the guarantee, between 0 and 1.

    Returns:
        The standard deviation of the noise over the L2 sensitivity, too large by 1e-9 of it at
        most.
    """
    low = high = 1.0
    while _delta(1 / high, epsilon) > delta:
        high *= 2
    while _delta(1 / low, epsilon) <= delta:
        low /= 2
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _delta(1 / middle, epsilon) > delta else (low, middle)
    return high


def _delta(mu: float, epsilon: float) -> float:
    """The least delta at which one release with noise multiplier 1 / mu keeps to epsilon."""
    above, below = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    # exp(epsilon) overflows where its factor is 0; both tails then vanish together.
    tail = _normal_cdf(below)
    return _normal_cdf(above) - (math.exp(epsilon + math.log(tail)) if tail > 0 else 0.0)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2
