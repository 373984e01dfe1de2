"""The accountant as an object: Opacus' own interface and figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
from opacus import accountants

from silotune.client import RDPAccountant
from silotune.client.privacy.accountant import Mechanism

STEPS = [(1.1, 0.25, 30), (2.0, 0.5, 10), (2.0, 0.5, 5)]


def test_it_gives_what_opacus_gives() -> None:
    ours, theirs = RDPAccountant(), accountants.RDPAccountant()
    for noise, rate, steps in STEPS:
        for _ in range(steps):
            ours.step(noise_multiplier=noise, sample_rate=rate)
            theirs.step(noise_multiplier=noise, sample_rate=rate)
    assert ours.history == theirs.history == [(1.1, 0.25, 30), (2.0, 0.5, 15)]
    assert len(ours) == len(theirs)
    assert ours.mechanism() == theirs.mechanism()
    for delta in (1e-3, 1e-5):
        assert ours.get_epsilon(delta) == pytest.approx(theirs.get_epsilon(delta), rel=1e-9)


def test_several_steps_at_once_are_the_same_history() -> None:
    ours = RDPAccountant()
    for noise, rate, steps in STEPS:
        ours.step(noise_multiplier=noise, sample_rate=rate, steps=steps)
    assert ours.history == [Mechanism(1.1, 0.25, 30), Mechanism(2.0, 0.5, 15)]


def test_of_much_noise_it_gives_a_smaller_epsilon_than_opacus() -> None:
    ours, theirs = RDPAccountant(), accountants.RDPAccountant()
    for found in (ours, theirs):
        found.step(noise_multiplier=100.0, sample_rate=1.0)
    with pytest.warns(UserWarning, match="Optimal order is the largest alpha"):
        largest = theirs.get_epsilon(1e-5)
    assert 0 < ours.get_epsilon(1e-5) < 0.5 * largest


def test_no_steps_cost_nothing_and_steps_without_noise_everything() -> None:
    ours = RDPAccountant()
    assert ours.get_epsilon(1e-5) == 0
    ours.step(noise_multiplier=0.0, sample_rate=0.5)
    assert math.isinf(ours.get_epsilon(1e-5))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"noise_multiplier": math.nan}, "noise_multiplier = nan must be finite and at least 0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier = inf"),
        ({"noise_multiplier": -1.0}, r"noise_multiplier = -1\.0"),
        ({"sample_rate": 0.0}, r"sample_rate = 0\.0 must be above 0 and at most 1"),
        ({"sample_rate": 1.5}, r"sample_rate = 1\.5"),
        ({"sample_rate": math.nan}, "sample_rate = nan"),
        ({"steps": -9}, "steps = -9 must be a whole number, at least 1"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": 1.5}, r"steps = 1\.5"),
    ],
)
def test_what_is_outside_its_range_is_refused(wrong: dict[str, Any], words: str) -> None:
    ours = RDPAccountant()
    right: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 10}
    ours.step(**right)
    with pytest.raises(ValueError, match=words):
        ours.step(**right | wrong)
    assert ours.history == [(1.0, 0.5, 10)]
    ours.history = [tuple((right | wrong).values())]
    with pytest.raises(ValueError, match=words):
        ours.get_epsilon(1e-5)


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, 2.0, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match=r"delta = .* must be above 0 and below 1"):
        RDPAccountant().get_epsilon(delta)


def test_the_history_of_opacus_can_be_taken_over() -> None:
    ours, theirs = RDPAccountant(), accountants.RDPAccountant()
    theirs.step(noise_multiplier=1.1, sample_rate=0.25)
    ours.history = list(theirs.history)
    assert ours.get_epsilon(1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-9)
    ours.step(noise_multiplier=1.1, sample_rate=0.25, steps=2)
    assert ours.history == [(1.1, 0.25, 3)]
