"""The rule for heads: noise alone does what it says, and training by it does not diverge."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting.gaussian_mechanism import get_sigma_gaussian

from silotune.common.planning import head_rule
from silotune.common.planning.head_rule import HeadFacts, HeadTask, plan_head
from silotune.server.aggregation.server_optimizer import running_mean, server_momentum_step

FACTS = HeadFacts("classification", 3, 1.0, 1000.0, 4, 8.0, 1e-4)
SOFTMAX: tuple[HeadTask, ...] = ("classification", "tokens")


def random_facts(number: int) -> HeadFacts:
    rng = np.random.default_rng(number)
    tasks: tuple[HeadTask, ...] = (*SOFTMAX, "multi-label", "ranking", "regression")
    task = tasks[number % len(tasks)]
    outputs = 1 if task in ("ranking", "regression") else round(2 * 50 ** rng.random())
    return HeadFacts(
        task=task,
        outputs=outputs,
        feature_norm=float(2.0 ** rng.uniform(-1, 4)),
        units=float(round(100 * 1000 ** rng.random())),
        sites=int(rng.integers(1, 21)),
        epsilon=float(0.3 * 33 ** rng.random()),
        delta=1e-6,
        budget_share=float(rng.choice([0.25, 1.0])),
    )


def features(facts: HeadFacts, rows: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random directions of the facts' norm, and the bias' own feature."""
    x = rng.normal(size=(rows, size))
    x *= facts.feature_norm / np.linalg.norm(x, axis=1, keepdims=True)
    return np.hstack([x, np.ones((rows, 1))])


@pytest.mark.parametrize("number", range(30))
def test_noise_alone_moves_the_outputs_as_the_rule_says(number: int) -> None:
    """The plan's rounds on sites whose gradients are all 0, by the server's own steps."""
    facts, rng = random_facts(number), np.random.default_rng(1000 + number)
    plan = plan_head(facts)
    size, repeats = int(rng.integers(8, 24)), 1 + 300 // facts.outputs
    shape = (size + 1, facts.outputs * repeats)
    steps = get_sigma_gaussian(facts.epsilon, facts.delta) * math.sqrt(
        plan.rounds / facts.budget_share
    )
    change = plan.head_lr * steps * plan.clip_norm / facts.units
    head, velocity, mean, averaged = {"w": np.zeros(shape, np.float32)}, {}, {}, 0
    for place in range(1, plan.rounds + 1):
        noise = rng.normal(size=(facts.sites, *shape)).mean(axis=0) * change
        head, velocity = server_momentum_step(
            head, velocity, {"w": noise.astype(np.float32)}, plan.server_momentum
        )
        if place > plan.rounds * plan.averaging_start:
            mean, averaged = running_mean(mean, averaged, head), averaged + 1
    outputs = features(facts, 30, size, rng) @ mean["w"]
    outputs = outputs.reshape(30, repeats, facts.outputs)
    if facts.task in SOFTMAX:
        outputs -= outputs.mean(axis=2, keepdims=True)
    said = head_rule.output_noise(facts, plan.rounds, plan.head_lr, plan.clip_norm)
    assert np.sqrt((outputs**2).mean()) == pytest.approx(said, rel=0.1)
    target = head_rule.target_noise(facts)
    bounded = plan.head_lr >= 0.95 * head_rule.largest_rate(facts, plan.clip_norm)
    assert said == pytest.approx(target, rel=0.06) or (bounded and said < target)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def error_and_loss(task: HeadTask, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """d loss / d output of each row [N, K], and the mean loss."""
    if task in SOFTMAX:
        p = softmax(z)
        return p - y, float(-np.log(np.maximum((p * y).sum(axis=1), 1e-300)).mean())
    if task == "regression":
        return z - y, float(((z - y) ** 2).mean() / 2)
    share = z.shape[1]  # the loss of many labels is their mean
    sigmoid = (1 + np.tanh(z / 2)) / 2
    return (sigmoid - y) / share, float((np.logaddexp(0, z) - z * y).mean())


@pytest.mark.parametrize("number", range(30))
def test_training_by_the_rule_does_not_diverge(number: int) -> None:
    """Without noise the released average fits rows of a noisy linear rule better than the first
    head does, also where all features lie close together and curvature is largest."""
    rng, facts = np.random.default_rng(2000 + number), random_facts(number)
    facts = replace(facts, outputs=min(facts.outputs, 20))
    plan = plan_head(facts)
    x = features(facts, 300, 12, rng)
    x[:, :-1] += 2 * x[:1, :-1]
    x[:, :-1] *= facts.feature_norm / np.linalg.norm(x[:, :-1], axis=1, keepdims=True)
    scores = (x - x.mean(axis=0)) @ rng.normal(size=(13, facts.outputs)) / facts.feature_norm
    scores += 0.3 * scores.std() * rng.normal(size=scores.shape)
    y = (scores > 0).astype(float)
    if facts.task in SOFTMAX:
        y = np.eye(facts.outputs)[scores.argmax(axis=1)]
    elif facts.task == "regression":
        y = np.clip(0.5 + 0.2 * scores / scores.std(), 0, 1)
    head, velocity, mean = {"w": np.zeros((13, facts.outputs), np.float32)}, {}, {}
    for place in range(1, plan.rounds + 1):
        error, _ = error_and_loss(facts.task, x @ head["w"], y)
        norms = np.linalg.norm(error, axis=1) * np.linalg.norm(x, axis=1)
        error *= np.minimum(1, plan.clip_norm / np.maximum(norms, 1e-12))[:, None]
        change = (-plan.head_lr * x.T @ error / len(x)).astype(np.float32)
        head, velocity = server_momentum_step(head, velocity, {"w": change}, plan.server_momentum)
        late = place - 1 - math.floor(plan.rounds * plan.averaging_start)
        if late >= 0:
            mean = running_mean(mean, late, head)
    trained = error_and_loss(facts.task, x @ mean["w"], y)
    first = error_and_loss(facts.task, np.zeros_like(y), y)
    if facts.task == "regression":
        assert trained[1] < first[1]
        return
    predicted = x @ mean["w"]
    if facts.task in SOFTMAX:
        right = (predicted.argmax(axis=1) == y.argmax(axis=1)).mean()
        assert right > 1.2 * y.mean(axis=0).max()
    else:
        right = ((predicted > 0) == (y > 0.5)).mean()
        assert right > max(0.6, np.maximum(y.mean(axis=0), 1 - y.mean(axis=0)).mean())


def test_class_weights_are_not_undone_by_the_clip_norm() -> None:
    """A record of the heaviest class keeps its first gradient, and what weighs little may take
    larger steps."""
    facts = replace(FACTS, outputs=2, units=1e6)
    weighted = replace(facts, class_weights=(0.02, 1.0))
    plan = plan_head(weighted)
    assert plan.clip_norm == pytest.approx(head_rule.first_gradient_norm(weighted), rel=0.06)
    assert plan_head(facts).clip_norm == pytest.approx(plan.clip_norm / 4, rel=0.06)
    alike = replace(facts, class_weights=(1.0, 1.0))
    largest = [head_rule.largest_rate(f, plan.clip_norm) for f in (weighted, alike, facts)]
    assert largest[0] > 10 * largest[1]
    assert largest[1] == pytest.approx(largest[2])


@pytest.mark.parametrize(
    ("task", "share"),
    [
        ("classification", head_rule.CLIP_SHARE),
        ("multi-label", head_rule.CLIP_SHARE),
        ("tokens", head_rule.CLIP_SHARE_OF_WORDS),
        ("regression", head_rule.CLIP_SHARE_OF_NUMBER),
    ],
)
def test_the_clip_norm_is_a_share_of_the_first_gradients(task: HeadTask, share: float) -> None:
    facts = replace(FACTS, task=task)
    found = plan_head(facts).clip_norm / head_rule.first_gradient_norm(facts)
    assert found == pytest.approx(share, rel=0.06)


def test_a_given_clip_norm_changes_the_rate_alone() -> None:
    """Half the clip norm has half the noise: twice the rate gives it the same effect."""
    own = plan_head(FACTS)
    half = plan_head(FACTS, own.clip_norm / 2)
    assert half.clip_norm == own.clip_norm / 2
    assert half == replace(own, clip_norm=half.clip_norm, head_lr=half.head_lr)
    assert half.head_lr == pytest.approx(2 * own.head_lr, rel=0.06)


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({"units": 4000.0}, 4.0),
        ({"sites": 16}, 2.0),
        ({"budget_share": 0.25}, 0.5),
        ({"feature_norm": math.sqrt(7.0)}, 0.25),  # of the features and of the clip norm
    ],
)
def test_the_rate_follows_from_the_facts(change: dict[str, float], factor: float) -> None:
    facts = replace(FACTS, epsilon=1.0)
    rates = [plan_head(f).head_lr for f in (facts, replace(facts, **change))]
    assert rates[1] / rates[0] == pytest.approx(factor, rel=0.1)
