"""The noise of one Gaussian release, against known values and the definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from silotune.common.planning.gaussian_mechanism import noise_multiplier

FUZZ = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("epsilon", "delta", "sigma"),
    [  # dp-accounting 0.6, get_smallest_gaussian_noise
        (8.0, 1e-4, 0.543075),
        (1.0, 1e-4, 3.185703),
    ],
)
def test_known_values(epsilon: float, delta: float, sigma: float) -> None:
    assert noise_multiplier(epsilon, delta) == pytest.approx(sigma, rel=1e-5)


@FUZZ
@given(st.floats(0.05, 50.0), st.floats(-9.0, -2.1))
def test_delta_of_the_noise_is_the_integral_of_the_definition(
    epsilon: float, log_delta: float
) -> None:
    """delta = E over the output of max(0, 1 - exp(epsilon - loss)), integrated."""
    delta = 10**log_delta
    sigma = noise_multiplier(epsilon, delta)
    mu = 1 / sigma

    def integrand(z: float) -> float:
        return float(norm.pdf(z) * -math.expm1(epsilon - mu * z - mu**2 / 2))

    start = epsilon / mu - mu / 2  # where the loss mu z + mu^2 / 2 is epsilon
    value, _ = quad(integrand, start, start + 40, epsabs=0, epsrel=1e-10, limit=500)
    assert value == pytest.approx(delta, rel=1e-5)


def test_a_larger_epsilon_needs_less_noise_at_both_ends() -> None:
    sigmas = [noise_multiplier(epsilon, 1e-9) for epsilon in (1e-6, 0.01, 1.0, 100.0)]
    assert sigmas == sorted(sigmas, reverse=True)
    assert all(math.isfinite(sigma) for sigma in sigmas)
