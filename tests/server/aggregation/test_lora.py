"""LoRA's factors at the server: what is exact is exact, what is lost is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.protocol.messages import Arrays
from silotune.common.protocol.tensors import orthonormal
from silotune.server.aggregation import lora, server_optimizer
from silotune.server.aggregation import mean as aggregate

FUZZ = settings(deadline=None, max_examples=40, derandomize=True, database=None)
RANK, IN, OUT = 3, 7, 5
A, B = "layer.0.query.lora_A", "layer.0.query.lora_B"
seeds = st.integers(0, 2**32 - 1)


def draw(rng: np.random.Generator, *, orthonormal_a: bool = False, out: int = OUT) -> Arrays:
    a = orthonormal(RANK, IN, rng) if orthonormal_a else rng.standard_normal((RANK, IN))
    found = {A: a, B: rng.standard_normal((out, RANK)), "head.bias": rng.standard_normal(2)}
    return {name: array.astype(np.float32) for name, array in found.items()}


def changes(rng: np.random.Generator, names: list[str], sites: int = 4) -> dict[str, Arrays]:
    like = draw(rng)
    return {
        f"s{k}": {n: (0.3 * rng.standard_normal(like[n].shape)).astype(np.float32) for n in names}
        for k in range(sites)
    }


def product(arrays: Arrays) -> np.ndarray:
    return arrays[B].astype(np.float64) @ arrays[A].astype(np.float64)


def by_hand(adapter: Arrays, updates: dict[str, Arrays], w: dict[str, float]) -> np.ndarray:
    """mean(B_i A_i), the long way."""
    moved = {
        site: {n: adapter[n] + change.get(n, np.float32(0)) for n in (A, B)}
        for site, change in updates.items()
    }
    return sum(w[s] * product(moved[s]) for s in updates) / sum(w.values())


@FUZZ
@given(seeds)
@pytest.mark.parametrize("trained", [[B], [A], [A, B]])
def test_the_residual_is_what_the_long_way_gives_and_0_where_theory_says_so(
    trained: list[str], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    adapter, updates = draw(rng), changes(rng, [*trained, "head.bias"])
    weights = {site: float(rng.uniform(0.5, 2)) for site in updates}
    change = aggregate.weighted_mean(updates, weights)
    apart = product({n: adapter[n] + change.get(n, np.float32(0)) for n in (A, B)})
    mean = by_hand(adapter, updates, weights)
    expected = np.linalg.norm(mean - apart) / np.linalg.norm(mean - product(adapter))
    found = lora.residual(adapter, updates, weights)
    assert found == pytest.approx(expected, abs=1e-6)
    if len(trained) == 1:
        assert found == pytest.approx(0, abs=1e-9)
    else:
        assert found > 0.01


def test_no_residual_where_no_factor_moved() -> None:
    rng = np.random.default_rng(0)
    updates = changes(rng, ["head.bias"])
    assert lora.residual(draw(rng), updates, dict.fromkeys(updates, 1.0)) is None
    head = {"head.bias": np.zeros(2, dtype=np.float32)}
    assert lora.residual(head, {"a": head}, {"a": 1.0}) is None


@FUZZ
@given(seeds, st.sampled_from([OUT, RANK, 2]))
def test_turning_keeps_every_product_and_makes_a_orthonormal(seed: int, out: int) -> None:
    rng = np.random.default_rng(seed)
    adapter = draw(rng, out=out)
    velocity = {B: draw(rng, out=out)[B]}
    mean = {A: adapter[A], B: draw(rng, out=out)[B]}
    turned, fast, slow = lora.refactorise(adapter, velocity, mean)
    np.testing.assert_allclose(turned[A] @ turned[A].T, np.eye(RANK), atol=1e-5)
    np.testing.assert_allclose(product(turned), product(adapter), atol=1e-4)
    np.testing.assert_allclose(product(slow), product(mean), atol=1e-4)
    np.testing.assert_allclose(
        fast[B].astype(np.float64) @ turned[A],
        velocity[B].astype(np.float64) @ adapter[A],
        atol=1e-4,
    )
    across = turned[B].T.astype(np.float64) @ turned[B]  # U S: columns at right angles
    np.testing.assert_allclose(across, np.diag(np.diag(across)), atol=1e-3)
    np.testing.assert_array_equal(turned["head.bias"], adapter["head.bias"])
    assert B in adapter  # what was given is as it was
    np.testing.assert_allclose(product(adapter), product(turned), atol=1e-4)


def test_a_product_of_zero_is_left_alone() -> None:
    adapter = draw(np.random.default_rng(0))
    adapter[B][:] = 0
    (turned,) = lora.refactorise(adapter)
    np.testing.assert_array_equal(turned[A], adapter[A])


@FUZZ
@given(seeds)
def test_with_an_orthonormal_a_fedsvd_is_ffa_in_other_coordinates(seed: int) -> None:
    """Ten rounds of private gradient steps on one squared loss for each site, each record's
    gradient clipped, and noise that turns with the coordinates: the same products."""
    rng = np.random.default_rng(seed)
    first = draw(rng, orthonormal_a=True)
    x, y = rng.standard_normal((4, 6, IN)), rng.standard_normal((4, 6, OUT))
    ffa, svd = dict(first), dict(first)
    fast: dict[str, Arrays] = {"ffa": {}, "svd": {}}
    for _ in range(10):
        noise = rng.standard_normal((4, OUT, IN))
        for name, state in (("ffa", ffa), ("svd", svd)):
            low = state[A].astype(np.float64)
            updates = {}
            for site in range(4):
                total = noise[site] @ low.T  # of a fixed matrix in the space of all weights
                for u, v in zip(x[site], y[site], strict=True):
                    g = np.outer(product(state) @ u - v, low @ u)
                    total += g * min(1.0, 1.0 / np.linalg.norm(g))
                updates[f"s{site}"] = {B: (-0.05 * total).astype(np.float32)}
            mean = aggregate.weighted_mean(updates, dict.fromkeys(updates, 1.0))
            moved, fast[name] = server_optimizer.server_momentum_step(state, fast[name], mean, 0.9)
            if name == "svd":
                moved, fast[name] = lora.refactorise(moved, fast[name])
            state.update(moved)
    np.testing.assert_allclose(product(svd), product(ffa), atol=2e-4)


@FUZZ
@given(seeds)
def test_flexlora_is_the_nearest_of_its_rank_to_the_mean_of_products(seed: int) -> None:
    rng = np.random.default_rng(seed)
    adapter, updates = draw(rng), changes(rng, [A, B, "head.bias"])
    weights = {site: float(rng.uniform(0.5, 2)) for site in updates}
    mean = aggregate.weighted_mean(updates, weights)
    change = lora.flex_change(adapter, updates, weights, mean)
    after = {name: adapter[name] + change[name] for name in adapter}
    u, s, v = np.linalg.svd(by_hand(adapter, updates, weights))
    nearest = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
    np.testing.assert_allclose(product(after), nearest, atol=1e-4)
    np.testing.assert_allclose(after[A] @ after[A].T, np.eye(RANK), atol=1e-5)
    np.testing.assert_array_equal(change["head.bias"], mean["head.bias"])
