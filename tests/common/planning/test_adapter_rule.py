"""The rule for adapters: the noise that it says is the noise that a plan leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from silotune.common.planning.adapter_rule import (
    LEAST_RATIO,
    AdapterFacts,
    AdapterPlan,
    adapter_rate,
    signal_ratio,
)
from silotune.common.planning.head_rule import step_weights

DRAWS = 4000


def settings_of(seed: int) -> tuple[AdapterFacts, int, float, float]:
    rng = np.random.default_rng(seed)
    rounds, momentum = int(rng.integers(4, 41)), float(rng.choice([0.0, 0.5, 0.9]))
    start = float(rng.choice([0.0, 0.5, 0.75]))
    facts = AdapterFacts(
        noise_multiplier=float(10 ** rng.uniform(-0.3, 1.3)),
        clip_norm=float(10 ** rng.uniform(-1, 0.5)),
        sampling_rate=float(rng.choice([0.05, 0.25, 1.0])),
        units=float(10 ** rng.uniform(2, 5)),
        sites=int(rng.integers(1, 21)),
        weights=step_weights(rounds, momentum, start),
        entries=int(rng.integers(10, 100_000)),
        tolerated_noise=float(10 ** rng.uniform(-2, 0)),
        tolerated_step=float(10 ** rng.uniform(-0.5, 0.5)),
    )
    return facts, rounds, momentum, start


@pytest.mark.parametrize("seed", range(30))
def test_a_simulated_plan_leaves_the_noise_that_the_adapter_bears(seed: int) -> None:
    """Each site's noise drawn by itself, the server's momentum step by step, and the average of the
    later iterates: none of it is the rule's own formula."""
    facts, rounds, momentum, start = settings_of(seed)
    rng = np.random.default_rng(seed + 100)
    rate = adapter_rate(facts)
    of_site = facts.noise_multiplier * facts.clip_norm / (facts.units * facts.sampling_rate)
    entry, velocity, late = np.zeros(DRAWS), np.zeros(DRAWS), []
    for t in range(1, rounds + 1):
        noise = of_site * rng.standard_normal((facts.sites, DRAWS)).mean(axis=0)
        velocity = momentum * velocity - rate * noise
        entry = entry + velocity
        if t > rounds * start:
            late.append(entry)
    found = np.mean(late, axis=0).std()
    limited = rate * facts.clip_norm == pytest.approx(facts.tolerated_step)
    assert found < 1.1 * facts.tolerated_noise
    assert limited or found == pytest.approx(facts.tolerated_noise, rel=0.1)
    assert rate * facts.clip_norm < 1.01 * facts.tolerated_step


def test_both_limits_are_met_in_some_of_the_settings() -> None:
    settings = [settings_of(seed)[0] for seed in range(30)]
    limited = [adapter_rate(f) * f.clip_norm == pytest.approx(f.tolerated_step) for f in settings]
    assert 5 < sum(limited) < 25


def test_the_ratio_is_that_of_the_norms() -> None:
    facts, rate = settings_of(0)[0], 0.3
    signal = rate * facts.clip_norm * sum(facts.weights)
    noise = rate * facts.noise_at_unit_rate * math.sqrt(facts.entries)
    assert signal_ratio(facts) == pytest.approx(signal / noise)


@pytest.mark.parametrize(("ratio", "room"), [(LEAST_RATIO, True), (LEAST_RATIO * 0.99, False)])
def test_room(ratio: float, room: bool) -> None:
    assert AdapterPlan(1.0, 1.0, 0.5, ratio).has_room is room
