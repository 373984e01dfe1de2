"""The rule for heads: noise alone does what it says, and training by it does not diverge."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from silotune.common.planning import head_rule
from silotune.common.planning.gaussian_mechanism import noise_multiplier
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
    steps = noise_multiplier(facts.epsilon, facts.delta) * math.sqrt(
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
