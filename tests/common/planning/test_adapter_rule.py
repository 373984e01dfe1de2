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


def facts_of(rng: np.random.Generator) -> tuple[AdapterFacts, int, float, float]:
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
    )
    return facts, rounds, momentum, start


@pytest.mark.parametrize("seed", range(30))
def test_a_simulated_plan_leaves_the_noise_that_the_adapter_bears(seed: int) -> None:
    """Each site's noise drawn by itself, the server's momentum step by step, and the average of the
    later iterates: none of it is the rule's own formula."""
    rng = np.random.default_rng(seed)
    facts, rounds, momentum, start = facts_of(rng)
    rate = adapter_rate(facts)
    of_site = facts.noise_multiplier * facts.clip_norm / (facts.units * facts.sampling_rate)
    entry, velocity, late = np.zeros(DRAWS), np.zeros(DRAWS), []
    for t in range(1, rounds + 1):
        noise = of_site * rng.standard_normal((facts.sites, DRAWS)).mean(axis=0)
        velocity = momentum * velocity - rate * noise
        entry = entry + velocity
        if t > rounds * start:
            late.append(entry)
    assert np.mean(late, axis=0).std() == pytest.approx(facts.tolerated_noise, rel=0.1)


def test_the_ratio_is_that_of_the_norms() -> None:
    rng = np.random.default_rng(0)
    facts = facts_of(rng)[0]
    rate = adapter_rate(facts)
    signal = rate * facts.clip_norm * sum(facts.weights)
    noise = facts.tolerated_noise * math.sqrt(facts.entries)
    assert signal_ratio(facts) == pytest.approx(signal / noise)


@pytest.mark.parametrize(("ratio", "room"), [(LEAST_RATIO, True), (LEAST_RATIO * 0.99, False)])
def test_room(ratio: float, room: bool) -> None:
    assert AdapterPlan(1.0, 1.0, 0.5, ratio).has_room is room
