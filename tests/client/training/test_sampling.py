"""The Poisson sample: each unit by itself, at each step anew, with the public rate.

Amplification by sampling (client/privacy/accountant.py) is proved for this sample and no other:
batches of a fixed size, or a permutation cut into batches, cost more than the accountant says. Each
property has at least one mutation below that breaks the sample on purpose; the property must see
it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from silotune.client.training.noise import NoiseSource

UNITS, RATE, STEPS = 200, 0.25, 4000
# Every bound is this many standard errors wide: a right sample falls outside one in 1.7 million
# times, so that a change of the stream cannot fail a test by bad luck.
Z = 5.0
RARE = 2 * stats.norm.sf(Z)

Sample = Callable[[NoiseSource, int, float], NDArray[np.int64]]


def _counts(units: int = UNITS, rate: float = RATE, steps: int = STEPS) -> NDArray[np.int64]:
    """[steps, units]: how often each step drew each unit."""
    source = NoiseSource(site="a", insecure_seed=2)
    return np.array(
        [np.bincount(source.poisson_sample(units, rate), minlength=units) for _ in range(steps)]
    )


def _scores() -> NDArray[np.float64]:
    """[STEPS, UNITS]: inclusion with mean zero and variance one."""
    return np.asarray((_counts() - RATE) / np.sqrt(RATE * (1 - RATE)))


# --- properties that a mutation below must break ---------------------------------------------


def batch_size_has_the_binomial_mean() -> None:
    sizes = _counts().sum(axis=1)
    deviation = np.sqrt(UNITS * RATE * (1 - RATE) / STEPS)
    assert abs(sizes.mean() - UNITS * RATE) < Z * deviation


def batch_size_has_the_binomial_variance() -> None:
    sizes = _counts().sum(axis=1)
    # The sizes are close to normal (excess kurtosis -0.003), so their sum of squares is chi-square.
    value = (STEPS - 1) * sizes.var(ddof=1) / (UNITS * RATE * (1 - RATE))
    low, high = stats.chi2.interval(1 - RARE, STEPS - 1)  # 11 % more or less
    assert low < value < high


def batch_size_has_the_binomial_distribution() -> None:
    """For few units, where batches are often empty: an empty one is a batch like any other."""
    units = 6
    seen = np.bincount(_counts(units).sum(axis=1), minlength=units + 1)
    assert len(seen) == units + 1
    expected = STEPS * stats.binom.pmf(np.arange(units + 1), units, RATE)
    common = expected > 10  # chi-square needs some in each bin; the rest goes into one
    f_obs = [*seen[common], seen[~common].sum()]
    f_exp = [*expected[common], expected[~common].sum()]
    assert stats.chisquare(f_obs, f_exp).pvalue > RARE


def each_unit_is_drawn_at_the_rate() -> None:
    scores = _scores().sum(axis=0) / np.sqrt(STEPS)
    assert np.abs(scores).max() < Z + 1  # the largest of 200
    low, high = stats.chi2.interval(1 - RARE, UNITS)
    assert low < np.sum(scores**2) < high


def no_unit_is_drawn_twice_in_a_step() -> None:
    assert _counts(steps=100).max() == 1


def the_rate_is_kept_from_tiny_to_one() -> None:
    source, n = NoiseSource(site="a", insecure_seed=3), 1_000_000
    for rate in (1e-5, 1e-3, 0.1, 0.7, 0.999, 1 - 1e-5):
        low, high = stats.binom.interval(1 - RARE, n, rate)
        assert low <= len(source.poisson_sample(n, rate)) <= high
    assert np.array_equal(source.poisson_sample(n, 1.0), np.arange(n))


def units_are_independent_in_pairs() -> None:
    scores = _scores()
    pairs = (scores.T @ scores / np.sqrt(STEPS))[np.triu_indices(UNITS, 1)]  # each about N(0, 1)
    assert np.abs(pairs).max() < Z + 1.5  # the largest of 19,900
    # Each about chi-square with one degree, and uncorrelated: variance 2.
    assert abs(np.mean(pairs**2) - 1) < Z * np.sqrt(2 / len(pairs))


def steps_are_independent() -> None:
    scores = _scores()
    sizes = scores.sum(axis=1) / np.sqrt(UNITS)
    for lag in (1, 2, 3, 4, 10):
        n = STEPS - lag
        assert abs(np.sum(scores[lag:] * scores[:-lag])) < Z * np.sqrt(n * UNITS)
        assert abs(np.sum(sizes[lag:] * sizes[:-lag])) < Z * np.sqrt(n)


PROPERTIES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        batch_size_has_the_binomial_mean,
        batch_size_has_the_binomial_variance,
        batch_size_has_the_binomial_distribution,
        each_unit_is_drawn_at_the_rate,
        no_unit_is_drawn_twice_in_a_step,
        the_rate_is_kept_from_tiny_to_one,
        units_are_independent_in_pairs,
        steps_are_independent,
    )
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str) -> None:
    PROPERTIES[name]()


# --- mutations: the sample broken on purpose -------------------------------------------------

_sample = NoiseSource.poisson_sample


def shuffled_batches(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    """A permutation cut into batches, as data loaders do it."""
    left: list[NDArray[np.int64]] = self.__dict__.setdefault("left", [])
    if not left:
        left += np.array_split(np.argsort(self.uniform(n)), round(1 / rate))
    return np.sort(left.pop())


def batches_of_a_fixed_size(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    return np.sort(np.argsort(self.uniform(n))[: round(n * rate)])


def with_replacement(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    """With the right mean and variance of the batch size."""
    size = len(_sample(self, n, rate))
    return np.sort(np.minimum((n * self.uniform(size)).astype(np.int64), n - 1))


def the_same_sample_every_step(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    return _sample(NoiseSource(site="a", insecure_seed=2), n, rate)


def every_other_sample_repeats(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    last = self.__dict__.pop("last", None)
    if last is None:
        last = self.__dict__["last"] = _sample(self, n, rate)
    return np.asarray(last)


def neighbours_share_their_draw(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    return np.flatnonzero(np.repeat(self.uniform(n // 2), 2) < rate)


def the_last_unit_is_never_drawn(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    return _sample(self, n - 1, rate)


def an_empty_batch_is_drawn_again(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    while not len(drawn := _sample(self, n, rate)):
        pass
    return drawn


def a_rate_that_wanders(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    """Right on average over the steps; a unit's chance depends on the step."""
    return _sample(self, n, rate * (0.8 if self.uniform(1)[0] < 0.5 else 1.2))


def a_rate_of_eight_bits(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    return np.flatnonzero(np.floor(256 * self.uniform(n)) < 256 * rate)


def five_percent_too_many(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
    return _sample(self, n, 1.05 * rate)


MUTATIONS: dict[Sample, tuple[Callable[[], None], ...]] = {
    shuffled_batches: (batch_size_has_the_binomial_variance, steps_are_independent),
    batches_of_a_fixed_size: (
        batch_size_has_the_binomial_variance,
        units_are_independent_in_pairs,
    ),
    with_replacement: (no_unit_is_drawn_twice_in_a_step,),
    the_same_sample_every_step: (steps_are_independent, each_unit_is_drawn_at_the_rate),
    every_other_sample_repeats: (steps_are_independent,),
    neighbours_share_their_draw: (
        units_are_independent_in_pairs,
        batch_size_has_the_binomial_variance,
    ),
    the_last_unit_is_never_drawn: (each_unit_is_drawn_at_the_rate,),
    an_empty_batch_is_drawn_again: (batch_size_has_the_binomial_distribution,),
    a_rate_that_wanders: (batch_size_has_the_binomial_variance, units_are_independent_in_pairs),
    a_rate_of_eight_bits: (the_rate_is_kept_from_tiny_to_one,),
    five_percent_too_many: (batch_size_has_the_binomial_mean, each_unit_is_drawn_at_the_rate),
}


@pytest.mark.parametrize(
    ("mutation", "seen_by"),
    [
        pytest.param(m, p, id=f"{m.__name__}-{p.__name__}")
        for m, properties in MUTATIONS.items()
        for p in properties
    ],
)
def test_a_broken_sample_is_caught(
    mutation: Sample, seen_by: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NoiseSource, "poisson_sample", mutation)
    with pytest.raises(AssertionError):
        seen_by()


def test_every_property_has_a_mutation_that_it_sees() -> None:
    assert {p.__name__ for seen in MUTATIONS.values() for p in seen} == set(PROPERTIES)
