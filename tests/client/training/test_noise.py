"""The noise: its distribution, its independence, and that no two sites share any.

Each property has at least one mutation below that breaks the noise on purpose; the property must
see it. The sample has its own file, test_sampling.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtri

from silotune.client.training import noise
from silotune.client.training.noise import NoiseSource

Floats = NDArray[np.float64]

N = 1_000_000
# Every bound is this many standard errors wide: right noise falls outside one in 1.7 million
# times, so that a change of the stream cannot fail a test by bad luck.
Z = 5.0
RARE = 2 * stats.norm.sf(Z)


def _draw(n: int = N) -> Floats:
    return NoiseSource(site="a", insecure_seed=1).normal((4, n // 4)).ravel()


# --- properties that a mutation below must break ---------------------------------------------


def mean_is_zero_and_standard_deviation_one() -> None:
    x = _draw()
    assert abs(x.mean()) < Z / np.sqrt(N)
    # The standard error of a standard deviation is 1 / sqrt(2n): 0.35 % more or less is seen.
    assert abs(x.std() - 1) < Z / np.sqrt(2 * N)


def distribution_is_gaussian() -> None:
    # Kolmogorov: the distance exceeds 2.69 / sqrt(n) with probability 2 exp(-2 * 2.69^2) = 1e-6.
    assert stats.kstest(_draw(), "norm").statistic < 2.69 / np.sqrt(N)


def tails_are_gaussian() -> None:
    """The Kolmogorov distance hardly sees the tails, and there is where delta comes from."""
    x = _draw()
    for sigmas in (3, 4):  # about 1350 and 32 on each side
        low, high = stats.binom.interval(1 - RARE, N, stats.norm.sf(sigmas))
        assert low > 0
        assert low <= np.sum(x > sigmas) <= high
        assert low <= np.sum(x < -sigmas) <= high


def no_value_repeats() -> None:
    """Of a million numbers of 53 bits, two are equal with probability 1e-4; of float32, surely."""
    assert len(np.unique(_draw())) == N


def coordinates_are_independent() -> None:
    x = _draw()
    for lag in (1, 2, 3, 4, N // 4, N // 2):  # the four that are added come from N // 4 apart
        assert abs(np.mean(x[lag:] * x[:-lag])) < Z / np.sqrt(N - lag)


def steps_are_independent() -> None:
    source = NoiseSource(site="a", insecure_seed=1)
    first, second = (source.normal((N // 4,)) for _ in range(2))
    assert abs(np.mean(first * second)) < Z / np.sqrt(N // 4)
    assert not np.isin(first, second).any()


def noise_tells_nothing_of_the_sample() -> None:
    """Both come from one stream: a unit's inclusion is not correlated with its step's noise."""
    source, n, q, steps = NoiseSource(site="a", insecure_seed=2), 50, 0.25, 2000
    total = 0.0
    for _ in range(steps):
        drawn = np.isin(np.arange(n), source.poisson_sample(n, q))
        total += float(source.normal((n,)) @ (drawn - q)) / np.sqrt(q * (1 - q))
    assert abs(total) < Z * np.sqrt(n * steps)


def equally_seeded_sites_draw_unrelated_noise() -> None:
    a, b = (NoiseSource(site=s, insecure_seed=7).normal((N // 4,)) for s in ("a", "b"))
    assert abs(np.mean(a * b)) < Z / np.sqrt(N // 4)
    assert not np.isin(a, b).any()


def equally_seeded_sites_draw_unrelated_samples() -> None:
    sources = [NoiseSource(site=s, insecure_seed=7) for s in ("a", "b")]
    n, q, steps = 100, 0.25, 2000
    a, b = (
        np.array([np.isin(np.arange(n), s.poisson_sample(n, q)) for _ in range(steps)]) - q
        for s in sources
    )
    # Unit by unit, and the sizes of the batches.
    assert abs(np.sum(a * b)) / (q * (1 - q)) < Z * np.sqrt(n * steps)
    assert abs(np.corrcoef(a.sum(1), b.sum(1))[0, 1]) < Z / np.sqrt(steps)


def sources_without_a_seed_differ() -> None:
    a, b = (NoiseSource(site="a").normal((10_000,)) for _ in range(2))
    assert not np.isin(a, b).any()


def library_seeds_do_not_reach_the_noise() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(NoiseSource(site="a").normal((100,)))
    assert not np.isin(draws[0], draws[1]).any()


PROPERTIES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        mean_is_zero_and_standard_deviation_one,
        distribution_is_gaussian,
        tails_are_gaussian,
        no_value_repeats,
        coordinates_are_independent,
        steps_are_independent,
        noise_tells_nothing_of_the_sample,
        equally_seeded_sites_draw_unrelated_noise,
        equally_seeded_sites_draw_unrelated_samples,
        sources_without_a_seed_differ,
        library_seeds_do_not_reach_the_noise,
    )
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str) -> None:
    PROPERTIES[name]()


# --- mutations: the noise broken on purpose --------------------------------------------------

_init, _normal, _uniform = NoiseSource.__init__, NoiseSource.normal, NoiseSource.uniform


def half_the_noise(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    return 0.5 * _normal(self, shape)


def one_percent_less_noise(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    return 0.99 * _normal(self, shape)


def noise_off_centre(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    return _normal(self, shape) + 0.01


def uniform_noise_of_the_same_variance(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    return np.asarray(np.sqrt(12) * (self.uniform(int(np.prod(shape))).reshape(shape) - 0.5))


def a_sum_of_four_uniforms(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    """Nearly Gaussian, and never beyond 3.5 sigma: a quantile function forgotten."""
    u = self.uniform(4 * int(np.prod(shape))).reshape(4, *shape)
    return np.asarray(np.sqrt(3) * (u.sum(axis=0) - 2))


def noise_truncated_at_three_sigma(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    return _normal(self, shape).clip(-3, 3)


def noise_in_float32(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    return _normal(self, shape).astype(np.float32).astype(np.float64)


def noise_in_float16(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    return _normal(self, shape).astype(np.float16).astype(np.float64)


def four_neighbours_share_their_uniforms(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    """A right distribution, made with a quarter of the random numbers."""
    g = ndtri(np.minimum(self.uniform(int(np.prod(shape)) + 3), 1 - 2.0**-53))
    return np.asarray(np.convolve(g, np.ones(4), "valid").reshape(shape) / 2)


def noise_from_numpys_generator(self: NoiseSource, shape: tuple[int, ...]) -> Floats:
    return np.random.standard_normal(shape)


def a_stream_that_rewinds(self: NoiseSource, n: int) -> Floats:
    return _uniform(NoiseSource(site="a", insecure_seed=1), n)


def a_key_without_the_site(
    self: NoiseSource, *, site: str, insecure_seed: int | None = None
) -> None:
    _init(self, site="", insecure_seed=insecure_seed)


def a_key_from_the_site_alone(
    self: NoiseSource, *, site: str, insecure_seed: int | None = None
) -> None:
    _init(self, site=site, insecure_seed=0)


# mutation: (what it replaces in NoiseSource, the properties that must see it)
MUTATIONS: dict[Callable[..., Any], tuple[str, tuple[Callable[[], None], ...]]] = {
    half_the_noise: (
        "normal",
        (mean_is_zero_and_standard_deviation_one, distribution_is_gaussian, tails_are_gaussian),
    ),
    one_percent_less_noise: ("normal", (mean_is_zero_and_standard_deviation_one,)),
    noise_off_centre: ("normal", (mean_is_zero_and_standard_deviation_one,)),
    uniform_noise_of_the_same_variance: ("normal", (distribution_is_gaussian, tails_are_gaussian)),
    a_sum_of_four_uniforms: ("normal", (distribution_is_gaussian, tails_are_gaussian)),
    noise_truncated_at_three_sigma: ("normal", (tails_are_gaussian, no_value_repeats)),
    noise_in_float32: ("normal", (no_value_repeats,)),
    noise_in_float16: ("normal", (no_value_repeats,)),
    four_neighbours_share_their_uniforms: ("normal", (coordinates_are_independent,)),
    noise_from_numpys_generator: ("normal", (library_seeds_do_not_reach_the_noise,)),
    a_stream_that_rewinds: (
        "uniform",
        (steps_are_independent, noise_tells_nothing_of_the_sample),
    ),
    a_key_without_the_site: (
        "__init__",
        (equally_seeded_sites_draw_unrelated_noise, equally_seeded_sites_draw_unrelated_samples),
    ),
    a_key_from_the_site_alone: ("__init__", (sources_without_a_seed_differ,)),
}


@pytest.mark.parametrize(
    ("mutation", "seen_by"),
    [
        pytest.param(m, p, id=f"{m.__name__}-{p.__name__}")
        for m, (_, properties) in MUTATIONS.items()
        for p in properties
    ],
)
def test_broken_noise_is_caught(
    mutation: Callable[..., Any], seen_by: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NoiseSource, MUTATIONS[mutation][0], mutation)
    with pytest.raises(AssertionError):
        seen_by()


def test_every_property_has_a_mutation_that_it_sees() -> None:
    assert {p.__name__ for _, seen in MUTATIONS.values() for p in seen} == set(PROPERTIES)


# --- what no mutation goes with --------------------------------------------------------------


def test_a_seed_repeats_itself_and_says_so() -> None:
    a, b = (NoiseSource(site="a", insecure_seed=7) for _ in range(2))
    assert a.insecure
    assert not NoiseSource(site="a").insecure
    assert np.array_equal(a.normal((3, 4)), b.normal((3, 4)))
    assert not np.array_equal(a.normal((3, 4)), a.normal((3, 4)))


def test_the_extreme_uniforms_give_finite_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    source = NoiseSource(site="a")
    monkeypatch.setattr(source, "uniform", lambda n: np.tile([0.5 * 2.0**-53, 1.0], n // 2))
    x = source.normal((2,))
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 16.8


# --- one key gives 2^32 blocks, a stream has no end ------------------------------------------


def _keys_of(monkeypatch: pytest.MonkeyPatch, start: int = 0) -> list[bytes]:
    """The keys that streams take from now on; each counts its blocks from `start` on."""
    keys: list[bytes] = []

    def cipher(key: bytes, nonce: bytes) -> ChaCha20:
        assert nonce == bytes(16)
        keys.append(key)
        return ChaCha20(key, start.to_bytes(4, "little") + bytes(12))

    monkeypatch.setattr(noise, "ChaCha20", cipher)
    return keys


def test_a_stream_goes_on_after_the_last_block_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = 4
    keys = _keys_of(monkeypatch, start=2**32 - blocks)
    monkeypatch.setattr(noise, "BLOCKS_OF_A_KEY", blocks)
    drawn = NoiseSource(site="a").uniform(100 * blocks * noise.BLOCK // 8)
    assert len(set(drawn)) == len(drawn)
    assert len(set(keys)) == len(keys) == 100


def test_a_key_changes_long_before_its_last_block() -> None:
    assert 2 * noise.BLOCKS_OF_A_KEY <= 2**32
    with pytest.raises(ValueError, match="counter"):  # what a stream of one key comes to
        Cipher(ChaCha20(bytes(32), b"\xff" * 4 + bytes(12)), mode=None).encryptor().update(
            bytes(noise.BLOCK + 1)
        )


def test_how_a_stream_is_cut_into_draws_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "BLOCKS_OF_A_KEY", 3)
    numbers = 3 * noise.BLOCK // 8  # of one key
    whole = NoiseSource(site="a", insecure_seed=7).uniform(5 * numbers)
    source = NoiseSource(site="a", insecure_seed=7)
    sizes = (1, numbers - 1, numbers + 1, 0, numbers - 1, 2 * numbers)
    assert np.array_equal(np.concatenate([source.uniform(size) for size in sizes]), whole)


def test_the_later_keys_come_from_a_secret_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "BLOCKS_OF_A_KEY", 1)
    draws = []
    for first in (b"a", b"b"):  # equal first keys, different second secrets, and the reverse
        for later in (b"c", b"d"):
            secrets = iter([later * 32, first * 32])
            monkeypatch.setattr(noise.os, "urandom", lambda size, left=secrets: next(left))
            draws.append(NoiseSource(site="a").uniform(24).reshape(3, 8))
    ac, ad, bc, _ = draws
    assert np.array_equal(ac[0], ad[0])
    assert not np.isin(ac[1:], ad[1:]).any()
    assert not np.isin(ac[0], bc[0]).any()
    assert np.array_equal(ac[1:], bc[1:])
    assert not np.isin(ac[1], ac[2]).any()


def test_the_noise_is_right_across_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "BLOCKS_OF_A_KEY", 512)  # a thousand keys in a million numbers
    for holds in (
        mean_is_zero_and_standard_deviation_one,
        distribution_is_gaussian,
        no_value_repeats,
        coordinates_are_independent,
        steps_are_independent,
    ):
        holds()


def test_a_seed_gives_the_keystream_of_its_hash() -> None:
    key = hashlib.sha256(b"insecure\x007\x00a").digest()
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(80))
    bits = np.frombuffer(stream, dtype="<u8") >> np.uint64(11)
    expected = (bits.astype(np.float64) + 0.5) * 2.0**-53
    assert np.array_equal(NoiseSource(site="a", insecure_seed=7).uniform(10), expected)
