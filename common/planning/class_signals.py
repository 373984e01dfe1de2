"""What a head that a plan trains makes of classes with a signal of a stated size.

Classes whose features differ in their means alone have an effect d between any two of them: the
distance of the two means over the standard deviation within a class. The best possible model of K
equally common classes is then right in the share

    A(d) = E[Phi(Z + d / sqrt(2))^(K - 1)]      (Z standard normal; K = 2: Phi(d / 2))

of cases, and a constant answer in 1 / K. A plan is judged by a medium signal: the one of which the
best possible model covers the share MEDIUM of the way from 1 / K to 1 (two classes: d = 1, right in
69 of 100). Records with and without a label, or pairs that belong together and others, count as two
classes.

Derivation. Let D features be equally strong, with mean square R^2 of all together less their mean,
and Q^2 with the mean and the bias; N = n S records at S sites. While outputs are small, a record's
gradient for the weights of class k is (1{k} - 1/K) x, cut to the clip norm by a factor f, alike for
all records. So the mean gradient is f (m_k - m) / K for class means m_k around m, and what the
phase ends with is that times W, the sum of the rounds' weights (head_rule.step_weights, at a
learning rate of 1: the rate changes nothing in what follows, nor do several steps a round). Two
means are d R / sqrt(D) apart, so with a = W f / K the difference of the outputs of two classes has

    a d^2 R^2 / D           between these classes,
    a d R^2 / D             as standard deviation within a class,
    sqrt(2) v Q             by noise v in each weight (head_rule.weight_noise),
    a R^2 sqrt(2 K / (N D)) by the chance that made these N records of all possible ones.

The effect that is left in the model's outputs is the first over the root of the sum of squares of
the others:

    d' = d / sqrt(1 + B / d^2),   B = 2 (K D v Q / (W f R^2))^2 + 2 K D / N.

Where classes have weights w_k, their shares count as h / w_k with h = 1 / sum(1 / w_k), so that all
weigh alike, and a share of right answers is one of as many test records of each class. Then h takes
the place of 1 / K in a, f is that of the largest weight, and the means are known by fewer records:
B = 2 (D v Q / (W f h R^2))^2 + 2 mean(w) D / (h N).

Of a logit of its own (a label of L, a pair) the gradient is half as long, of one output, and a mean
over the labels: B = (4 L D v Q / (W f R^2))^2 + 4 D / N. The expected share of right answers is
A(d').

A signal "shows" if that share beats 1 / K by two standard errors: those of TEST_RECORDS test
records, and of what the noise has in common with the signal by chance: the direction that was
learnt has an error of sqrt(d^2 - d'^2) / sqrt(D (K - 1)) in d'.

Limits: features equally strong (where few carry most of the variance, signals along these are
learnt from fewer records), classes equally common or as rare as their weights say, full batches,
plain steps, one epsilon for all sites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from silotune.common.planning.head_rule import (
    first_gradient_norm,
    input_norm,
    output_noise,
    step_weights,
    weight_noise,
)
from silotune.common.planning.plan_facts import TEST_RECORDS, PlanFacts

MEDIUM = math.erf(1 / math.sqrt(8))  # of the way to always right: d = 1 of two classes
NODES = 60  # of the integral over Z


@dataclass(frozen=True)
class ClassSignals:
    """Signals by their effect d; scores are shares of right answers."""

    facts: PlanFacts
    weakest: float = 1e-3
    strongest: float = 20.0

    @property
    def classes(self) -> int:
        """K: two where each output is a logit of its own."""
        return self.facts.head.outputs if self.facts.head.task == "classification" else 2

    @property
    def medium(self) -> float:
        """The effect of a medium signal."""
        low, high = self.weakest, self.strongest
        share = 1 / self.classes + MEDIUM * (1 - 1 / self.classes)
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (low, middle) if self.attainable(middle) >= share else (middle, high)
        return high

    @property
    def noise(self) -> float:
        """The standard deviation of a score by noise alone."""
        facts = self.facts
        return output_noise(
            facts.head,
            facts.rounds,
            facts.rate,
            facts.clip_norm,
            facts.server_momentum,
            facts.averaging_start,
        )

    def attainable(self, effect: float) -> float:
        """A of the formula: the score of the best possible model."""
        from scipy.special import ndtr

        nodes, weights = _nodes()
        return float(weights @ ndtr(nodes + effect / math.sqrt(2)) ** (self.classes - 1))

    def expected(self, effect: float) -> float:
        """The score of the plan's model."""
        return self.attainable(self._kept(effect))

    def shows(self, effect: float) -> bool:
        """Whether the expected score beats a constant answer's by two standard errors."""
        kept, classes = self._kept(effect), self.classes
        error = math.sqrt((effect**2 - kept**2) / (self.facts.features * (classes - 1)))
        expected, constant = self.attainable(kept), 1 / classes
        by_chance = self.attainable(kept + error) - expected
        of_test = math.sqrt(constant * (1 - constant) / TEST_RECORDS)
        return expected - constant > 2 * math.hypot(of_test, by_chance)

    def _kept(self, effect: float) -> float:
        """d' of the formula: the effect that is left in the model's outputs."""
        facts, head = self.facts, self.facts.head
        shared = (facts.server_momentum, facts.averaging_start)
        uncut = min(1.0, facts.clip_norm / first_gradient_norm(head))
        sum_of_weights = sum(step_weights(facts.rounds, *shared))
        noise = weight_noise(head, facts.rounds, facts.clip_norm, *shared)
        relative = noise * input_norm(head) / (sum_of_weights * uncut * facts.spread**2)
        relative *= facts.features
        a_record = facts.features / (head.units * head.sites)
        if head.task == "classification":
            weights = head.class_weights or (1.0,) * head.outputs
            alike = 1 / sum(1 / weight for weight in weights)
            of_noise = 2 * (relative / alike) ** 2
            of_chance = 2 * sum(weights) / len(weights) / alike * a_record
        else:
            labels = head.outputs if head.task == "multi-label" else 1
            of_noise = (4 * labels * relative) ** 2
            of_chance = 4 * a_record
        return effect / math.sqrt(1 + (of_noise + of_chance) / effect**2)


@cache
def _nodes() -> tuple[Any, Any]:
    """By which the mean of a function of a standard normal number is taken."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / weights.sum()
