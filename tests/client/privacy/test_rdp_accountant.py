"""The accountant as an object: Opacus' own interface and figures."""

from __future__ import annotations

import math

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
