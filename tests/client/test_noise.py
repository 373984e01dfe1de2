"""The cryptographic stream: its distribution, its independence, and that nothing repeats."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from silotune.client.noise import NoiseSource


def test_normal_has_the_gaussian_distribution() -> None:
    x = NoiseSource(site="a", insecure_seed=1).normal((400, 500)).ravel()
    assert abs(x.mean()) < 4 / np.sqrt(len(x))
    # The standard error of a standard deviation is 1 / sqrt(2n).
    assert abs(x.std() - 1) < 4 / np.sqrt(2 * len(x))
    assert stats.kstest(x, "norm").pvalue > 1e-3


def test_half_the_noise_would_be_seen() -> None:
    x = 0.5 * NoiseSource(site="a", insecure_seed=1).normal((400, 500)).ravel()
    assert stats.kstest(x, "norm").pvalue < 1e-12


def test_poisson_sample_has_the_variance_of_a_binomial() -> None:
    source = NoiseSource(site="a", insecure_seed=2)
    n, q, trials = 200, 0.3, 4000
    sizes = np.array([len(source.poisson_sample(n, q)) for _ in range(trials)])
    assert abs(sizes.mean() - n * q) < 4 * np.sqrt(n * q * (1 - q) / trials)
    # A shuffled batch would have variance 0. Relative error of a variance: sqrt(2 / trials).
    assert abs(sizes.var() / (n * q * (1 - q)) - 1) < 4 * np.sqrt(2 / trials)


def test_each_record_is_drawn_at_the_same_rate() -> None:
    source = NoiseSource(site="a", insecure_seed=3)
    counts = np.zeros(50)
    for _ in range(2000):
        counts[source.poisson_sample(50, 0.2)] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_rate_one_takes_everybody() -> None:
    assert len(NoiseSource(site="a").poisson_sample(1000, 1.0)) == 1000


def test_no_site_shares_noise_even_with_one_seed() -> None:
    a, b = (NoiseSource(site=s, insecure_seed=7).normal((5000,)) for s in ("a", "b"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
    assert not np.isin(a, b).any()


def test_two_secure_sources_of_one_site_differ() -> None:
    a, b = (NoiseSource(site="a").normal((1000,)) for _ in range(2))
    assert not np.isin(a, b).any()
    assert not NoiseSource(site="a").insecure


def test_a_seed_repeats_itself_and_says_so() -> None:
    a, b = (NoiseSource(site="a", insecure_seed=7) for _ in range(2))
    assert a.insecure
    assert np.array_equal(a.normal((3, 4)), b.normal((3, 4)))
    assert not np.array_equal(a.normal((3, 4)), a.normal((3, 4)))


def test_neither_torch_nor_numpy_seeds_reach_the_noise() -> None:
    import torch

    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(NoiseSource(site="a").normal((100,)))
    assert not np.isin(draws[0], draws[1]).any()


def test_the_extreme_uniforms_give_finite_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    source = NoiseSource(site="a")
    monkeypatch.setattr(source, "uniform", lambda n: np.tile([0.5 * 2.0**-53, 1.0], n // 2))
    x = source.normal((2,))
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 16.8
