"""The forecast: its formula on synthetic sets, its numbers and its sentences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from silotune.client.privacy import accountant
from silotune.common.planning.forecast import Forecast, forecast
from silotune.common.planning.head_rule import HeadFacts, plan_head
from silotune.common.planning.number_signals import SPREAD
from silotune.common.planning.plan_facts import TEST_RECORDS, PlanFacts

# Classes, features, their norm, sites and ε of the synthetic sets.
SETS = [(2, 384, 2.0, 4, 1.0), (2, 200, 1.0, 5, 3.0), (3, 384, 4.0, 4, 8.0), (8, 384, 1.0, 6, 8.0)]
SEEDS = 5  # of each, so that there are 20
RIGHT = 17
TESTED = 10_000  # records, so that what is compared with the margin is the model, not the test


def facts_by_rule(head: HeadFacts, features: int) -> PlanFacts:
    """The rule's plan for a head whose features have mean 0."""
    plan = plan_head(head)
    return PlanFacts(
        head=head,
        rounds=plan.rounds,
        rate=plan.head_lr,
        clip_norm=plan.clip_norm,
        server_momentum=plan.server_momentum,
        averaging_start=plan.averaging_start,
        features=features,
        spread=head.feature_norm,
    )


def planned(
    classes: int,
    features: int,
    norm: float,
    sites: int,
    epsilon: float,
    units: float,
    weights: tuple[float, ...] | None = None,
) -> PlanFacts:
    """The rule's plan for these facts."""
    head = HeadFacts(
        "classification", classes, norm, units, sites, epsilon, 1e-4, class_weights=weights
    )
    return facts_by_rule(head, features)


def forecast_of(facts: PlanFacts) -> Forecast:
    found = forecast(facts)
    assert found is not None
    return found


def effect_of(attainable: float, classes: int) -> float:
    """By simulation: the distance of two means over the deviation within a class."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200_000, classes))
    best = scores[:, 1:].max(axis=1) - scores[:, 0]
    # Right with probability P(best < d / sqrt(2)).
    return float(np.quantile(best, attainable)) * math.sqrt(2)


def accuracy(facts: PlanFacts, effect: float, seed: int) -> float:
    """Of a head that the plan trains; the noise is that of the exact accountant."""
    head, rng = facts.head, np.random.default_rng(seed)
    classes, features = head.outputs, facts.features
    within = facts.spread / math.sqrt(features)
    directions = np.linalg.qr(rng.normal(size=(features, classes)))[0].T
    means = (directions - directions.mean(axis=0)) * effect * within / math.sqrt(2)

    factors = np.array(head.class_weights or (1.0,) * classes)

    def drawn(count: int, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(classes), np.round(count * shares / shares.sum()).astype(int))
        count = len(labels)
        rows = means[labels] + within * rng.normal(size=(count, features))
        return np.concatenate([rows, np.ones((count, 1))], axis=1), labels

    records = round(head.units) * head.sites
    x, y = drawn(records, 1 / factors)
    norms, wanted = np.linalg.norm(x, axis=1), np.eye(classes)[y]
    multiplier = accountant.noise_for(head.epsilon, head.delta, 1.0, facts.rounds)
    noise = multiplier * facts.clip_norm * math.sqrt(head.sites)
    weights = np.zeros((features + 1, classes))
    velocity, averaged = np.zeros_like(weights), []
    for number in range(1, facts.rounds + 1):
        scores = np.exp(x @ weights)
        errors = factors[y][:, None] * (wanted - scores / scores.sum(axis=1, keepdims=True))
        lengths = np.linalg.norm(errors, axis=1) * norms
        errors *= np.minimum(1, facts.clip_norm / lengths)[:, None]
        total = x.T @ errors + noise * rng.normal(size=weights.shape)
        velocity = facts.server_momentum * velocity + total / records
        weights = weights + facts.rate * velocity
        if number > facts.rounds * facts.averaging_start:
            averaged.append(weights)
    test, truth = drawn(TESTED, np.ones(classes))
    return float(np.mean((test @ np.mean(averaged, axis=0)).argmax(axis=1) == truth))


def beats_a_constant_answer(share: float, classes: int) -> bool:
    """By more than two standard errors of as many test records as the forecast names."""
    constant = 1 / classes
    return share - constant > 2 * math.sqrt(constant * (1 - constant) / TEST_RECORDS)


@pytest.mark.parametrize(("times", "wanted"), [(1 / 2, False), (1.5, True)])
def test_a_medium_signal_shows_where_the_forecast_says_so(times: float, wanted: bool) -> None:
    """Of 20 synthetic sets with half of the records that the forecast asks for, and of 20 with half
    as many again."""
    right = 0
    for at, (classes, *rest) in enumerate(SETS):
        few = forecast_of(planned(classes, *rest, units=10))
        assert few.least_units is not None
        facts = planned(classes, *rest, units=round(few.least_units * times))
        found = forecast_of(facts)
        assert found.shows == wanted
        effect = effect_of(found.attainable, classes)
        for seed in range(SEEDS):
            share = accuracy(facts, effect, 100 * at + seed)
            right += beats_a_constant_answer(share, classes) == wanted
    assert right >= RIGHT


@pytest.mark.parametrize("units", [100, 400])
def test_the_expected_share_is_what_synthetic_sets_have(units: int) -> None:
    facts = planned(2, 384, 2.0, 4, 3.0, units)
    shares = [accuracy(facts, 1.0, seed) for seed in range(4)]
    assert forecast_of(facts).attainable == pytest.approx(0.691, abs=0.001)
    assert forecast_of(facts).expected == pytest.approx(float(np.mean(shares)), abs=0.02)


@pytest.mark.parametrize("units", [500, 2000])
def test_a_rare_class_with_its_weight_needs_more_records(units: int) -> None:
    rare = planned(2, 200, 2.0, 4, 3.0, units, weights=(0.1, 1.0))
    shares = [accuracy(rare, 1.0, seed) for seed in range(3)]
    expected = forecast_of(rare).expected
    assert expected == pytest.approx(float(np.mean(shares)), abs=0.02)
    assert expected < forecast_of(planned(2, 200, 2.0, 4, 3.0, units)).expected - 0.02


NUMBERS = [(100, 1.4, 5, 1.0), (200, 1.0, 4, 8.0)]  # features, their norm, sites, ε
OF_NUMBERS, RIGHT_NUMBERS = 5, 9  # seeds of each, and how many of all must be right


def planned_number(
    features: int, norm: float, sites: int, epsilon: float, units: float
) -> PlanFacts:
    """The rule's plan for a regression."""
    head = HeadFacts("regression", 1, norm, units, sites, epsilon, 1e-4)
    return facts_by_rule(head, features)


def explained(facts: PlanFacts, signal: float, seed: int) -> tuple[float, float]:
    """R^2 of a head that the plan trains on numbers between 0 and 1, and the variance of what it
    predicts over that of the numbers."""
    head, rng = facts.head, np.random.default_rng(seed)
    features, of_one = facts.features, facts.spread / math.sqrt(facts.features)
    direction = rng.normal(size=features)
    direction *= SPREAD * math.sqrt(signal) / np.linalg.norm(direction) / of_one

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        rows = of_one * rng.normal(size=(count, features))
        rest = SPREAD * math.sqrt(1 - signal) * rng.normal(size=count)
        numbers = np.clip(0.5 + rows @ direction + rest, 0, 1)
        return np.concatenate([rows, np.ones((count, 1))], axis=1), numbers

    records = round(head.units) * head.sites
    x, y = drawn(records)
    norms = np.linalg.norm(x, axis=1)
    multiplier = accountant.noise_for(head.epsilon, head.delta, 1.0, facts.rounds)
    noise = multiplier * facts.clip_norm * math.sqrt(head.sites)
    weights, velocity, averaged = np.zeros(features + 1), np.zeros(features + 1), []
    for number in range(1, facts.rounds + 1):
        errors = y - x @ weights
        errors *= np.minimum(1, facts.clip_norm / np.maximum(np.abs(errors) * norms, 1e-12))
        total = x.T @ errors + noise * rng.normal(size=weights.shape)
        velocity = facts.server_momentum * velocity + total / records
        weights = weights + facts.rate * velocity
        if number > facts.rounds * facts.averaging_start:
            averaged.append(weights)
    test, truth = drawn(TESTED)
    predicted = test @ np.mean(averaged, axis=0)
    return (
        float(1 - np.mean((truth - predicted) ** 2) / np.var(truth)),
        float(np.var(predicted) / np.var(truth)),
    )


@pytest.mark.parametrize(("times", "wanted"), [(1 / 2, False), (1.5, True)])
def test_a_medium_signal_of_numbers_shows_where_the_forecast_says_so(
    times: float, wanted: bool
) -> None:
    """The plan stays, for of numbers its learning rate counts."""
    right = 0
    for at, numbers in enumerate(NUMBERS):
        few = planned_number(*numbers, units=100)
        least = forecast_of(few).least_units
        assert least is not None
        facts = replace(few, head=replace(few.head, units=round(least * times)))
        found = forecast_of(facts)
        assert found.shows == wanted
        for seed in range(OF_NUMBERS):
            share, variance = explained(facts, found.attainable, 100 * at + seed)
            right += (share > 4 * math.sqrt(variance / TEST_RECORDS)) == wanted
    assert right >= RIGHT_NUMBERS


@pytest.mark.parametrize("units", [50, 200, 800])
def test_the_expected_variance_is_what_synthetic_numbers_have(units: int) -> None:
    facts = planned_number(100, 1.4, 5, 3.0, units)
    shares = [explained(facts, 0.25, seed)[0] for seed in range(4)]
    assert forecast_of(facts).expected == pytest.approx(float(np.mean(shares)), abs=0.03)


def test_sentences_of_numbers() -> None:
    enough = forecast_of(planned_number(100, 1.4, 5, 3.0, 800)).sentences("record")
    assert "the best possible model explains 25 % of the numbers' variance" in enough[0]
    assert enough[0].endswith(" %")
    assert "moves a prediction by" in enough[1]
    few = forecast_of(planned_number(100, 1.4, 5, 1.0, 100)).sentences("record")
    assert few[0].startswith("too few records for a medium signal at this ε (n = 100 records per")


@pytest.mark.parametrize("at", range(len(SETS)))
def test_the_numbers_that_would_do_do(at: int) -> None:
    """And a tenth less would not."""
    few = forecast_of(facts := planned(*SETS[at], units=30))
    assert not few.shows
    assert few.least_units is not None
    for factor, shows in ((1.0, True), (0.9, False)):
        head = replace(facts.head, units=factor * few.least_units)
        assert forecast_of(replace(facts, head=head)).shows == shows
    if few.least_epsilon is not None:
        for factor, shows in ((1.0, True), (0.9, False)):
            head = replace(facts.head, epsilon=factor * few.least_epsilon)
            assert forecast_of(replace(facts, head=head)).shows == shows


def test_no_epsilon_would_do_where_the_records_alone_are_too_few() -> None:
    found = forecast_of(planned(2, 384, 2.0, 2, 1.0, units=5))
    assert (found.shows, found.least_epsilon) == (False, None)
    assert found.sentences("record")[0].endswith(" would do")
    assert "ε ≥" not in found.sentences("record")[0]


def test_sentences() -> None:
    few = forecast_of(planned(2, 384, 2.0, 4, 1.0, units=200)).sentences("entity")
    assert few[0] == (
        "too few entities for a medium signal at this ε (n = 200 entities per site, ε = 1): "
        "n ≥ 350 or ε ≥ 1.9 would do"
    )
    assert (
        "right in 69 of 100 cases between 2 classes with as many test records of each, a constant "
        "answer in 50" in (few[1])
    )
    enough = forecast_of(planned(2, 384, 2.0, 4, 8.0, units=2000)).sentences("record")
    assert "expected to be right in 67" in enough[0]
    assert enough[1].startswith("the noise alone moves a score by ")
    labels = replace(planned(2, 384, 2.0, 4, 8.0, units=2000).head, task="multi-label", outputs=9)
    found = forecast_of(replace(planned(2, 384, 2.0, 4, 8.0, units=2000), head=labels))
    assert "between records with a label and as many without" in found.sentences("record")[0]


def test_no_forecast_of_tokens() -> None:
    facts = planned(2, 384, 2.0, 4, 8.0, units=2000)
    assert forecast(replace(facts, head=replace(facts.head, task="tokens"))) is None
