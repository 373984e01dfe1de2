"""Sums with public weights, against numpy and the equations themselves."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedYogi
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.contract.aggregation import Adaptive
from silotune.common.protocol.messages import Arrays
from silotune.server.aggregation.mean import weighted_mean
from silotune.server.aggregation.server_optimizer import (
    adaptive_step,
    running_mean,
    server_momentum_step,
)

FUZZ = settings(deadline=None, max_examples=60, derandomize=True, database=None)
SHAPES = {"head.bias": (2,), "head.weight": (2, 3), "x.lora_B": (3, 2)}

seeds = st.integers(0, 2**32 - 1)
weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


def draw(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Arrays:
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def same(first: Arrays, second: Arrays) -> bool:
    return first.keys() == second.keys() and all(
        first[name].tobytes() == second[name].tobytes() for name in first
    )


@FUZZ
@given(seeds, weights)
def test_weighted_mean(seed: int, w: list[float]) -> None:
    rng = np.random.default_rng(seed)
    updates = {f"s{i}": draw(rng) for i in range(len(w))}
    found = weighted_mean(updates, {f"s{i}": x for i, x in enumerate(w)})
    assert found.keys() == SHAPES.keys()
    for name, array in found.items():
        expected = np.average([u[name].astype(np.float64) for u in updates.values()], 0, w)
        assert array.dtype == np.float32
        assert array.shape == SHAPES[name]
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)


@FUZZ
@given(seeds, weights)
def test_the_order_of_replies_changes_no_bit(seed: int, w: list[float]) -> None:
    """Magnitudes from 1e-20 to 1e20, so that float64 too rounds differently in another order."""
    rng = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(len(w))]
    updates = {
        n: {k: a * np.float32(10) ** rng.integers(-20, 20, a.shape) for k, a in draw(rng).items()}
        for n in names
    }
    weight = dict(zip(names, w, strict=True))
    shuffled = {names[i]: updates[names[i]] for i in rng.permutation(len(names))}
    backwards = dict(reversed(weight.items()))
    assert same(weighted_mean(shuffled, backwards), weighted_mean(updates, weight))


def test_sums_that_cancel_do_not_depend_on_the_order() -> None:
    values = {"a": 2.0**60, "b": 1.0, "c": -(2.0**60)}
    updates = {site: {"x": np.array([v], np.float32)} for site, v in values.items()}
    found = {
        weighted_mean({s: updates[s] for s in order}, dict.fromkeys(values, 1.0))["x"].tobytes()
        for order in permutations(values)
    }
    assert len(found) == 1


def test_sites_that_did_not_answer_have_no_weight() -> None:
    rng = np.random.default_rng(0)
    updates = {"a": draw(rng), "b": draw(rng)}
    found = weighted_mean(updates, {"a": 1.0, "b": 3.0, "absent": 1e6})
    for name, array in found.items():
        np.testing.assert_allclose(
            array, (updates["a"][name] + 3 * updates["b"][name]) / 4, rtol=1e-5, atol=1e-6
        )


def test_a_site_without_a_weight_is_no_part_of_a_mean() -> None:
    with pytest.raises(KeyError):
        weighted_mean({"a": draw(np.random.default_rng(0))}, {"b": 1.0})


def test_the_sum_is_taken_in_float64() -> None:
    big, small = np.float32(2**24), np.float32(1)
    updates = {str(i): {"x": np.array([v])} for i, v in enumerate([big, small, small, -big])}
    assert weighted_mean(updates, dict.fromkeys(updates, 1.0))["x"] == np.float32(0.5)


def test_inputs_are_left_alone() -> None:
    rng = np.random.default_rng(0)
    updates, adapter, velocity = {"a": draw(rng)}, draw(rng), draw(rng)
    copies = [{n: a.copy() for n, a in d.items()} for d in (updates["a"], adapter, velocity)]
    for array in [*updates["a"].values(), *adapter.values(), *velocity.values()]:
        array.flags.writeable = False
    change = weighted_mean(updates, {"a": 2.0})
    server_momentum_step(adapter, velocity, change, 0.9)
    running_mean(adapter, 3, velocity)
    for before, after in zip(copies, (updates["a"], adapter, velocity), strict=True):
        assert same(before, after)


@FUZZ
@given(seeds, st.floats(0, 0.99), st.integers(1, 12))
def test_heavy_ball(seed: int, momentum: float, steps: int) -> None:
    """x_{t+1} = x_t + sum_{k<=t} momentum^(t-k) c_k, unrolled by hand."""
    rng = np.random.default_rng(seed)
    start = draw(rng)
    changes = [draw(rng) for _ in range(steps)]
    adapter: Arrays = start
    velocity: Arrays = {}
    for change in changes:
        adapter, velocity = server_momentum_step(adapter, velocity, change, momentum)
    for name, array in adapter.items():
        x = start[name].astype(np.float64)
        for t in range(steps):
            x = x + sum(
                momentum ** (t - k) * changes[k][name].astype(np.float64) for k in range(t + 1)
            )
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, x, rtol=1e-4, atol=1e-4)


def test_without_momentum_the_step_is_the_change() -> None:
    rng = np.random.default_rng(0)
    adapter, change = draw(rng), draw(rng)
    after, velocity = server_momentum_step(adapter, draw(rng), change, 0.0)
    assert same(velocity, change)
    assert same(after, {n: adapter[n] + change[n] for n in adapter})


def test_frozen_tensors_stay_bit_by_bit() -> None:
    rng = np.random.default_rng(0)
    adapter = draw(rng, SHAPES | {"x.lora_A": (2, 3)})
    change = draw(rng)
    after, velocity = server_momentum_step(adapter, {}, change, 0.9)
    assert after.keys() == adapter.keys()
    assert velocity.keys() == change.keys()
    assert after["x.lora_A"].tobytes() == adapter["x.lora_A"].tobytes()


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_adaptive_steps_are_flowers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's FedYogi as it is; of its FedAdam the moments (it corrects the first steps, the
    paper's Algorithm 2 does not)."""
    rng = np.random.default_rng(0)
    x = {
        "a": rng.standard_normal((3, 2)).astype(np.float32),
        "b": rng.standard_normal(4).astype(np.float32),
    }
    chosen = Adaptive.model_validate(
        {"kind": kind, "lr": 0.1, "beta1": 0.8, "beta2": 0.9, "tau": 0.01}
    )
    flower = {"adam": FedAdam, "yogi": FedYogi}[kind](eta=0.1, beta_1=0.8, beta_2=0.9, tau=0.01)
    flower.current_arrays = {n: a.astype(np.float64) for n, a in x.items()}
    first: Arrays = {}
    second: Arrays = {}
    for number in range(1, 8):
        change = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in x.items()}
        theirs = ArrayRecord(
            {n: Array(flower.current_arrays[n] + change[n]) for n in flower.current_arrays}
        )
        monkeypatch.setattr(FedAvg, "aggregate_train", lambda *_, t=theirs: (t, None))
        before = {n: a.copy() for n, a in flower.current_arrays.items()}
        found, _ = flower.aggregate_train(number, [])
        assert found is not None
        x, first, second = adaptive_step(x, first, second, change, chosen)
        for name in x:
            np.testing.assert_allclose(first[name], flower.m_t[name], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(second[name], flower.v_t[name], rtol=1e-4, atol=1e-6)
            step = 0.1 * flower.m_t[name] / (np.sqrt(flower.v_t[name]) + 0.01)
            if kind == "yogi":
                np.testing.assert_allclose(found[name].numpy(), before[name] + step, atol=1e-9)
            np.testing.assert_allclose(x[name], before[name] + step, rtol=1e-4, atol=1e-5)
        flower.current_arrays = {
            n: before[n] + 0.1 * flower.m_t[n] / (np.sqrt(flower.v_t[n]) + 0.01) for n in before
        }


def test_a_tensor_without_velocity_starts_at_rest() -> None:
    rng = np.random.default_rng(0)
    adapter, change = draw(rng), draw(rng)
    old = {"head.bias": np.ones(2, np.float32)}
    after, _ = server_momentum_step(adapter, old, change, 0.5)
    np.testing.assert_array_equal(
        after["head.weight"], adapter["head.weight"] + change["head.weight"]
    )
    np.testing.assert_allclose(
        after["head.bias"], adapter["head.bias"] + change["head.bias"] + 0.5, rtol=1e-6
    )


@FUZZ
@given(seeds, st.integers(1, 20))
def test_running_mean(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    iterates = [draw(rng) for _ in range(count)]
    mean: Arrays = {}
    for seen, latest in enumerate(iterates):
        mean = running_mean(mean, seen, latest)
    for name, array in mean.items():
        expected = np.mean([i[name].astype(np.float64) for i in iterates], axis=0)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)


@FUZZ
@given(seeds, weights)
def test_ffa_lora_averages_exactly(seed: int, w: list[float]) -> None:
    """With A shared, mean(B_i) A = mean(B_i A) (arXiv 2403.12313)."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((4, 6))
    names = [f"s{i}" for i in range(len(w))]
    b = {n: {"B": rng.standard_normal((5, 4)).astype(np.float32)} for n in names}
    mean = weighted_mean(b, dict(zip(names, w, strict=True)))["B"]
    products = [b[n]["B"].astype(np.float64) @ a for n in names]
    np.testing.assert_allclose(mean @ a, np.average(products, 0, w), rtol=1e-5, atol=1e-5)
