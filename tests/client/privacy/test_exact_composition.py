"""Exact composition against closed forms and integrals of its own, and broken on purpose.

What the comparisons tolerate: the grid makes epsilon at most 2e-4 of itself larger, never smaller;
Opacus' PRV accountant states an error of 0.01 and adds it to what it finds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution  # type: ignore[import-untyped]
from opacus.accountants import PRVAccountant
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import norm

from silotune.client.privacy import exact_composition
from silotune.client.privacy.accountant import Mechanism, exact_epsilon

DELTA = 1e-5
ONE_STEP = (
    Mechanism(1.19, 0.02, 1),
    Mechanism(0.6, 0.25, 1),
    Mechanism(2.0, 0.5, 1),
    Mechanism(1.0, 0.99, 1),
    Mechanism(40.0, 0.3, 1),
)
SAMPLED = (
    (Mechanism(1.03, 0.25, 30),),
    (Mechanism(2.5, 0.5, 40), Mechanism(4.0, 1.0, 16)),
    (Mechanism(1.5, 0.1, 100), Mechanism(3.0, 0.4, 7), Mechanism(2.0, 1.0, 1)),
)


def closed_form(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism (Balle and Wang 2018, Theorem 8)."""

    def excess(e: float) -> float:
        return math.exp(log_ndtr(mu / 2 - e / mu)) - math.exp(e + log_ndtr(-mu / 2 - e / mu))

    return float(brentq(lambda e: excess(e) - delta, 0, 500, xtol=1e-12))


def integral(step: Mechanism, epsilon: float, *, added: bool) -> float:
    """Delta of one step in one direction, by the integral that defines it."""
    sigma, q, _ = step

    def densities(x: float) -> tuple[float, float]:
        without = norm.pdf(x, 0, sigma)
        return without, (1 - q) * without + q * norm.pdf(x, 1, sigma)

    def beyond(x: float) -> float:
        without, with_ = densities(x)
        first, second = (with_, without) if added else (without, with_)
        return max(0.0, first - math.exp(epsilon) * second)

    # Where it begins: the privacy loss is monotone in x.
    kink = 0.5
    inside = (math.exp(epsilon) - (1 - q)) / q if added else (math.exp(-epsilon) - (1 - q)) / q
    if inside > 0:
        kink = sigma**2 * math.log(inside) + 0.5
    edges = sorted({-12 * sigma, min(max(kink, -12 * sigma), 1 + 12 * sigma), 1 + 12 * sigma})
    return sum(
        quad(beyond, low, high, epsabs=1e-14, epsrel=1e-10, limit=500)[0]
        for low, high in pairwise(edges)
    )


def by_integrals(step: Mechanism, delta: float) -> float:
    """Epsilon of one step: the larger one of both directions."""

    def excess(e: float) -> float:
        return max(integral(step, e, added=a) for a in (True, False)) - delta

    return float(brentq(excess, 0, 60, xtol=1e-8))


def bounds(history: Sequence[Mechanism], delta: float, interval: float) -> tuple[float, float]:
    """Epsilon from below and from above: each step's loss rounded down or up to a grid, composed
    by Fourier transform, in both directions."""
    found = []
    for up in (False, True):
        costs = []
        for added in (True, False):
            size = 1 << 19
            spectrum = np.ones(size // 2 + 1, dtype=complex)
            for sigma, q, steps in history:
                spectrum *= np.fft.rfft(rounded(sigma, q, interval, size, added, up)) ** steps
            mass = np.fft.irfft(spectrum, size)
            loss = np.fft.fftfreq(size, 1 / size) * interval

            def excess(e: float, loss: object = loss, mass: object = mass) -> float:
                above = loss > e  # type: ignore[operator]
                parts = -np.expm1(e - loss[above]) * mass[above]  # type: ignore[index,operator]
                return float(parts.sum()) - delta

            costs.append(brentq(excess, 0, 40))
        found.append(max(costs))
    return found[0], found[1]


def rounded(
    sigma: float, q: float, interval: float, size: int, added: bool, up: bool
) -> np.ndarray:
    """[size] The probabilities of one step's loss on the grid; negative losses at the end."""
    k = np.arange(-size // 2, size // 2)
    ratio = np.exp((k if added else -k) * interval)  # of the densities with and without the unit
    with np.errstate(all="ignore"):
        x = np.where(ratio > 1 - q, sigma**2 * np.log((ratio - (1 - q)) / q) + 0.5, -np.inf)
    if added:
        below = (1 - q) * norm.cdf(x, 0, sigma) + q * norm.cdf(x, 1, sigma)
    else:
        below = norm.sf(x, 0, sigma)
    mass = np.diff(below, prepend=0.0)  # of the losses in (k - 1, k]
    mass = mass if up else np.roll(mass, -1)
    return np.roll(mass, size // 2)


Property = Callable[[], None]


def without_sampling_it_is_the_closed_form() -> None:
    for noise, steps in ((0.5, 1), (4.0, 30), (60.0, 40), (3000.0, 100)):
        for delta in (1e-3, DELTA, 1e-12):
            found = exact_epsilon([Mechanism(noise, 1.0, steps)], delta)
            assert found == pytest.approx(
                closed_form(math.sqrt(steps) / noise, delta), rel=1e-6, abs=1e-9
            )
    mixed = [Mechanism(4.0, 1.0, 30), Mechanism(7.0, 1.0, 12)]
    mu = math.sqrt(30 / 16 + 12 / 49)
    assert exact_epsilon(mixed, DELTA) == pytest.approx(closed_form(mu, DELTA), rel=1e-6)


def a_rate_of_nearly_one_is_nearly_the_closed_form() -> None:
    """By the grid then, down to an epsilon of 0.005."""
    for noise, steps in ((0.9, 2), (20.0, 30), (2000.0, 30)):
        found = exact_epsilon([Mechanism(noise, 1 - 1e-12, steps)], DELTA)
        exact = closed_form(math.sqrt(steps) / noise, DELTA)
        assert exact * (1 - 1e-7) <= found <= exact * (1 + 2e-4)


def one_step_is_the_integral_of_the_worse_direction() -> None:
    for step in ONE_STEP:
        exact = by_integrals(step, DELTA)
        assert exact * (1 - 1e-7) <= exact_epsilon([step], DELTA) <= exact * (1 + 2e-4)


def many_steps_lie_between_their_bounds() -> None:
    for history in SAMPLED:
        below, above = bounds(history, DELTA, 2e-4)
        assert above - below < 0.04
        assert below <= exact_epsilon(history, DELTA) <= above


def many_steps_lie_in_the_interval_of_opacus_prv() -> None:
    for history in SAMPLED:
        accountant = PRVAccountant()
        accountant.history = [tuple(m) for m in history]
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            prv = accountant.get_epsilon(DELTA)
        assert prv - 0.03 <= exact_epsilon(history, DELTA) <= prv + 0.001


def both_directions_count() -> None:
    """It does not matter which of them is called which."""
    before = [exact_epsilon(history, DELTA) for history in SAMPLED]
    forget()
    make = privacy_loss_distribution.from_gaussian_mechanism

    def swapped(*args: object, **kwargs: object) -> object:
        found = make(*args, **kwargs)
        if found._symmetric:
            return found
        return privacy_loss_distribution.PrivacyLossDistribution(found._pmf_add, found._pmf_remove)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(privacy_loss_distribution, "from_gaussian_mechanism", swapped)
        assert [exact_epsilon(history, DELTA) for history in SAMPLED] == pytest.approx(before)


PROPERTIES: dict[str, Property] = {
    f.__name__: f
    for f in (
        without_sampling_it_is_the_closed_form,
        a_rate_of_nearly_one_is_nearly_the_closed_form,
        one_step_is_the_integral_of_the_worse_direction,
        many_steps_lie_between_their_bounds,
        many_steps_lie_in_the_interval_of_opacus_prv,
        both_directions_count,
    )
}


def forget() -> None:
    """What was found is not that of a mutation, nor the other way round."""
    _exact.cache_clear()
    _make.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str) -> None:
    PROPERTIES[name]()


# --- mutations: exact composition broken on purpose ------------------------------------------

_exact, _make, _grid = (
    exact_composition.epsilon,
    exact_composition._loss,
    exact_composition._interval,
)


def _one_direction(patch: pytest.MonkeyPatch, name: str) -> None:
    patch.setattr(
        exact_composition,
        "_loss",
        lambda *of: privacy_loss_distribution.PrivacyLossDistribution(getattr(_make(*of), name)),
    )


def only_the_direction_without_the_unit(patch: pytest.MonkeyPatch) -> None:
    _one_direction(patch, "_pmf_add")


def only_the_direction_with_the_unit(patch: pytest.MonkeyPatch) -> None:
    _one_direction(patch, "_pmf_remove")


def rounded_to_the_better_side(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        exact_composition,
        "_loss",
        lambda sigma, q, interval: privacy_loss_distribution.from_gaussian_mechanism(
            sigma,
            sampling_prob=q,
            value_discretization_interval=interval,
            pessimistic_estimate=False,
            use_connect_dots=False,
        ),
    )


def a_coarse_grid(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exact_composition, "_interval", lambda m: 32 * _grid(m))


def sampling_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        exact_composition,
        "epsilon",
        lambda m, d: _exact(tuple(s._replace(sampling_rate=1.0) for s in m), d),
    )


def the_first_kind_of_step_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exact_composition, "epsilon", lambda m, d: _exact(m[:1], d))


def a_step_too_few(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        exact_composition,
        "epsilon",
        lambda m, d: _exact(tuple(s._replace(steps=max(1, s.steps - 1)) for s in m), d),
    )


MUTATIONS: dict[Callable[[pytest.MonkeyPatch], None], tuple[Property, ...]] = {
    only_the_direction_without_the_unit: (
        one_step_is_the_integral_of_the_worse_direction,
        many_steps_lie_between_their_bounds,
        both_directions_count,
    ),
    only_the_direction_with_the_unit: (both_directions_count,),
    rounded_to_the_better_side: (
        a_rate_of_nearly_one_is_nearly_the_closed_form,
        one_step_is_the_integral_of_the_worse_direction,
    ),
    a_coarse_grid: (a_rate_of_nearly_one_is_nearly_the_closed_form,),
    sampling_forgotten: (
        one_step_is_the_integral_of_the_worse_direction,
        many_steps_lie_in_the_interval_of_opacus_prv,
    ),
    the_first_kind_of_step_alone: (
        without_sampling_it_is_the_closed_form,
        many_steps_lie_between_their_bounds,
    ),
    a_step_too_few: (without_sampling_it_is_the_closed_form, many_steps_lie_between_their_bounds),
}


@pytest.mark.parametrize(
    ("mutation", "seen_by"),
    [
        pytest.param(m, p, id=f"{m.__name__}-{p.__name__}")
        for m, properties in MUTATIONS.items()
        for p in properties
    ],
)
def test_a_broken_composition_is_caught(
    mutation: Callable[[pytest.MonkeyPatch], None],
    seen_by: Property,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        seen_by()


def test_every_property_has_a_mutation_that_it_sees() -> None:
    assert {p.__name__ for seen in MUTATIONS.values() for p in seen} == set(PROPERTIES)


def test_more_steps_never_cost_less() -> None:
    """Up to the whole plan, whose epsilon a worker's report must not exceed."""
    costs = [exact_epsilon([Mechanism(1.3, 0.25, n)], DELTA) for n in range(1, 41)]
    assert costs == sorted(costs)
    first = Mechanism(5.0, 1.0, 12)
    costs = [exact_epsilon([first, Mechanism(1.3, 0.25, n)], DELTA) for n in range(1, 31)]
    assert costs == sorted(costs)
