"""What a head that a plan trains makes of numbers with a signal of a stated size.

A signal is the share r of the targets' variance that the best possible linear model explains; a
constant answer explains nothing. Targets lie between 0 and 1 and are taken to have the standard
deviation s = SPREAD. A plan is judged by the signal MEDIUM.

Derivation. Let D features be equally strong, with mean square R^2 of all together less their mean,
and Q^2 with the mean and the bias; N = n S records at S sites. A gradient is the error e times the
features, cut to the clip norm C: it counts as e while |e| < c = C / Q, so for errors of standard
deviation s a step follows the squared error by the factor f = erf(c / (s sqrt(2))). Along each
feature the weight then moves like a heavy ball pulled to its best value, with the step r f R^2 / D
for the rate r. That is linear: g is the share of the way that the average of the later iterates has
gone, G the sum of the squares of what an impulse in one round leaves in it (`_response`; both are
computed round by round), G' the same for the bias, whose curvature is 1 and not R^2 / D. What is
explained is

    r (1 - (1 - g)^2)                         of the variance s^2, less
    r'^2 u^2 (G R^2 + G' (Q^2 - R^2))         by noise u in a round's mean gradient at the rate r',
    (D / N) g^2 E[min(|e|, c)^2] / f^2        by the chance that made these N records.

It can be less than nothing: then the noise makes the model worse than a constant answer.

A signal "shows" if what is explained is positive by two standard errors: those of TEST_RECORDS test
records, 2 sqrt(w / TEST_RECORDS) for predictions with w of the targets' variance, and of what the
noise has in common with the signal by chance, 2 sqrt(r) sqrt(noise and chance) / (s sqrt(D)).

Limits: features equally strong, full batches, plain steps, one epsilon for all sites, and SPREAD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from silotune.common.planning.head_rule import input_norm, round_noise
from silotune.common.planning.plan_facts import TEST_RECORDS, PlanFacts

MEDIUM = 0.25
SPREAD = 0.2


class _Parts(NamedTuple):
    """reached: g of the formula. noise, chance: what is taken off, in parts of the variance."""

    reached: float
    noise: float
    chance: float


@dataclass(frozen=True)
class NumberSignals:
    """Signals by the share of the variance that the best model explains, which is the score."""

    facts: PlanFacts
    weakest: float = 1e-4
    strongest: float = 1.0
    medium: float = MEDIUM

    @property
    def noise(self) -> float:
        """The standard deviation of a prediction by noise alone, as a share of the bounds."""
        return SPREAD * math.sqrt(_parts(self.facts).noise)

    def attainable(self, signal: float) -> float:
        """The score of the best possible model: the signal itself."""
        return signal

    def expected(self, signal: float) -> float:
        """The score of the plan's model."""
        parts = _parts(self.facts)
        return signal * (1 - (1 - parts.reached) ** 2) - parts.noise - parts.chance

    def shows(self, signal: float) -> bool:
        """Whether the expected score is more than 0 by two standard errors."""
        parts = _parts(self.facts)
        without_signal = parts.noise + parts.chance
        predicted = signal * parts.reached**2 + without_signal
        of_test = 2 * math.sqrt(predicted / TEST_RECORDS)
        by_chance = 2 * math.sqrt(signal * without_signal / self.facts.features)
        return self.expected(signal) > 2 * math.hypot(of_test, by_chance)


@cache
def _parts(facts: PlanFacts) -> _Parts:
    head, norm = facts.head, input_norm(facts.head)
    cut = facts.clip_norm / norm
    z = cut / SPREAD
    uncut = math.erf(z / math.sqrt(2))
    curvature = facts.spread**2 / facts.features
    reached, gain = _response(facts, facts.rate * uncut * curvature)
    _, gain_of_bias = _response(facts, facts.rate * uncut)
    noise = facts.rate * round_noise(head, facts.rounds, facts.clip_norm)
    of_noise = noise**2 * (gain * facts.spread**2 + gain_of_bias * (norm**2 - facts.spread**2))
    density = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    cut_error = SPREAD**2 * (uncut - 2 * z * density) + cut**2 * (1 - uncut)
    of_chance = facts.features / (head.units * head.sites) * (reached / uncut) ** 2 * cut_error
    return _Parts(reached, of_noise / SPREAD**2, of_chance / SPREAD**2)


def _response(facts: PlanFacts, step: float) -> tuple[float, float]:
    """g and G of the formula for a weight whose way to its best value has this step."""
    first_averaged = math.floor(facts.rounds * facts.averaging_start) + 1

    def averaged(pull: float, impulse: int) -> float:
        weight = velocity = total = 0.0
        for number in range(1, facts.rounds + 1):
            velocity = facts.server_momentum * velocity + step * (pull - weight)
            velocity += number == impulse
            weight += velocity
            if number >= first_averaged:
                total += weight
        return total / (facts.rounds - first_averaged + 1)

    gains = (averaged(0.0, number) ** 2 for number in range(1, facts.rounds + 1))
    return averaged(1.0, 0), sum(gains)
