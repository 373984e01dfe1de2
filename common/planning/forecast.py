"""What a plan for a linear head can learn at all, before a record is read.

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
learnt has an error of sqrt(d^2 - d'^2) / sqrt(D (K - 1)) in d'. It is checked on synthetic sets
(tests/common/planning/test_forecast.py).

Limits: features equally strong (where few carry most of the variance, signals along these are
learnt from fewer records), classes equally common or as rare as their weights say, full batches,
plain steps, one epsilon for all sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from silotune.common.planning.head_rule import (
    HeadFacts,
    first_gradient_norm,
    input_norm,
    output_noise,
    step_weights,
    weight_noise,
)

MEDIUM = math.erf(1 / math.sqrt(8))  # of the way to always right: d = 1 of two classes
TEST_RECORDS = 1_000
STRONGEST = 20.0  # an effect that nobody can miss
MOST_EPSILON, MOST_UNITS = 100.0, 1e8  # what a contract may have
TOLERANCE = 1e-4
NODES = 60  # of the integral over Z
BETWEEN = {
    "multi-label": "records with a label and as many without",
    "ranking": "pairs that belong together and as many others",
}


@dataclass(frozen=True)
class PlanFacts:
    """A plan for a head, and what it is trained on; all of it public.

    Attributes:
        head: Task, sizes and guarantee.
        rounds: Of the phase.
        rate: What a round's mean gradient is multiplied by: learning rate times local steps.
        clip_norm: The clip norm.
        server_momentum: Of the server's step.
        averaging_start: After which share of the rounds iterates are averaged.
        features: How many features the head has, less those that follow from the others.
        spread: Root mean square norm of the features less their mean.
    """

    head: HeadFacts
    rounds: int
    rate: float
    clip_norm: float
    server_momentum: float
    averaging_start: float
    features: int
    spread: float

    @property
    def classes(self) -> int:
        """K: two where each output is a logit of its own."""
        return self.head.outputs if self.head.task == "classification" else 2


@dataclass(frozen=True)
class Forecast:
    """What a plan can do.

    Attributes:
        task: The task's kind.
        classes: How many there are; two of a logit of its own.
        epsilon: Of the guarantee.
        units: Expected units of a site.
        output_noise: The standard deviation of an output by noise alone.
        attainable: The share of right answers of the best possible model, of a medium signal.
        expected: The share that this plan's model is expected to have.
        weakest: The attainable share of the weakest signal that shows; None if none does.
        shows: Whether the medium signal does.
        least_units: From how many units at each site it would; None if it does or no number would.
        least_epsilon: From which epsilon it would; None if it does or none up to 100 would.
    """

    task: str
    classes: int
    epsilon: float
    units: float
    output_noise: float
    attainable: float
    expected: float
    weakest: float | None
    shows: bool
    least_units: int | None
    least_epsilon: float | None

    def sentences(self, unit: str, plan: str = "this plan") -> list[str]:
        """For people who know their records, not the method.

        Args:
            unit: "record" or "entity".
            plan: What the model is trained by, in words.

        Returns:
            First whether a medium signal shows, and what would help if it does not.
        """
        few = {"record": "records", "entity": "entities"}[unit]
        classes = f"{self.classes} classes with as many test records of each"
        between = BETWEEN.get(self.task, classes)
        medium = (
            f"a medium signal (the best possible model is right in {100 * self.attainable:.0f} of "
            f"100 cases between {between}, a constant answer in {100 / self.classes:.0f})"
        )
        noise = f"the noise alone moves a score by {self.output_noise:.2g} (standard deviation)"
        if self.weakest is not None:
            noise += (
                f"; the weakest signal that shows on {TEST_RECORDS:,} test records is one by which "
                f"the best possible model is right in {100 * self.weakest:.0f}"
            )
        if self.shows:
            expected = f"is expected to be right in {100 * self.expected:.0f}"
            return [f"with {medium} the model of {plan} {expected}", noise]
        ways = [f"n ≥ {self.least_units:,}"] if self.least_units else []
        ways += [f"ε ≥ {self.least_epsilon:g}"] if self.least_epsilon else []
        remedy = f"{' or '.join(ways)} would do" if ways else "no ε and no n would do"
        return [
            f"too few {few} for a medium signal at this ε (n = {self.units:,.0f} {few} per site, "
            f"ε = {self.epsilon:g}): {remedy}",
            f"with {medium} the model of {plan} can hardly be told from the constant answer",
            noise,
        ]


def forecast(facts: PlanFacts) -> Forecast | None:
    """What a plan can learn.

    Args:
        facts: The plan.

    Returns:
        The forecast; None for tokens and regressions, whose signals are of another kind.
    """
    head, classes = facts.head, facts.classes
    if head.task not in ("classification", *BETWEEN):
        return None
    medium = _effect(1 / classes + MEDIUM * (1 - 1 / classes), classes)
    shows = _shows(facts, medium)
    units = epsilon = None
    if not shows:
        units = _least(lambda n: _shows(_with(facts, units=n), medium), 1, MOST_UNITS)
        epsilon = _least(lambda e: _shows(_with(facts, epsilon=e), medium), 1e-3, MOST_EPSILON)
    weakest = _least(lambda effect: _shows(facts, effect), 1e-3, STRONGEST)
    noise = output_noise(
        head,
        facts.rounds,
        facts.rate,
        facts.clip_norm,
        facts.server_momentum,
        facts.averaging_start,
    )
    return Forecast(
        task=head.task,
        classes=classes,
        epsilon=head.epsilon,
        units=head.units,
        output_noise=noise,
        attainable=_share(medium, classes),
        expected=_share(_kept(facts, medium), classes),
        weakest=_share(weakest, classes) if weakest else None,
        shows=shows,
        least_units=int(_rounded_up(units)) if units else None,
        least_epsilon=_rounded_up(epsilon) if epsilon else None,
    )


def _kept(facts: PlanFacts, effect: float) -> float:
    """d' of the formula: the effect that is left in the model's outputs."""
    head = facts.head
    weights = step_weights(facts.rounds, facts.server_momentum, facts.averaging_start)
    uncut = min(1.0, facts.clip_norm / first_gradient_norm(head))
    noise = weight_noise(
        head, facts.rounds, facts.clip_norm, facts.server_momentum, facts.averaging_start
    )
    relative = noise * facts.features * input_norm(head) / (sum(weights) * uncut * facts.spread**2)
    records = head.units * head.sites
    if head.task == "classification":
        weights_of = head.class_weights or (1.0,) * head.outputs
        alike = 1 / sum(1 / weight for weight in weights_of)
        mean = sum(weights_of) / len(weights_of)
        of_noise = 2 * (relative / alike) ** 2
        of_chance = 2 * mean / alike * facts.features / records
    else:
        labels = head.outputs if head.task == "multi-label" else 1
        of_noise = (4 * labels * relative) ** 2
        of_chance = 4 * facts.features / records
    return effect / math.sqrt(1 + (of_noise + of_chance) / effect**2)


def _shows(facts: PlanFacts, effect: float) -> bool:
    """Whether the expected share of right answers beats a constant one by two standard errors."""
    kept, classes = _kept(facts, effect), facts.classes
    error = math.sqrt((effect**2 - kept**2) / (facts.features * (classes - 1)))
    expected, constant = _share(kept, classes), 1 / classes
    by_chance = _share(kept + error, classes) - expected
    of_test = math.sqrt(constant * (1 - constant) / TEST_RECORDS)
    return expected - constant > 2 * math.hypot(of_test, by_chance)


def _share(effect: float, classes: int) -> float:
    """A of the formula."""
    from scipy.special import ndtr

    nodes, weights = _nodes()
    return float(weights @ ndtr(nodes + effect / math.sqrt(2)) ** (classes - 1))


@cache
def _nodes() -> tuple[Any, Any]:
    """By which the mean of a function of a standard normal number is taken."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / weights.sum()


def _effect(share: float, classes: int) -> float:
    """The effect by which the best possible model is right in this share of cases."""
    return _least(lambda effect: _share(effect, classes) >= share, 1e-3, STRONGEST) or STRONGEST


def _with(facts: PlanFacts, **changes: float) -> PlanFacts:
    return replace(facts, head=replace(facts.head, **changes))  # type: ignore[arg-type]


def _least(holds: Callable[[float], bool], low: float, high: float) -> float | None:
    """The least number from which `holds` is true, as it stays then; None if beyond `high`."""
    if holds(low):
        return low
    if not holds(high):
        return None
    while high / low > 1 + TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _rounded_up(value: float) -> float:
    """The next number with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.10g}")
