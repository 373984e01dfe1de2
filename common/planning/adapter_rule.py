"""The rule that plans the training of an adapter from the noise alone.

The noise that a phase leaves in each entry of the adapter has the standard deviation

    v = r s C / (n q sqrt(S)) gain(T)

for a learning rate r, T rounds of noise multiplier s, clip norm C and sampling rate q, n expected
units at each of S sites, equal weights, plain steps, and the gain that momentum and the average of
the later iterates have on independent noise (common/planning/head_rule.py, `step_weights`). The
rule takes the rate at which v is what the adapter bears (client/operations/adapter_tolerance.py):
more would turn the features beyond use, less would learn less of what the same noise allows.

With many records the noise vanishes and that rate grows without bound. The rule's limit is the rate
at which the step r C of a round whose clipped gradients are all alike, in the direction that moves
the features most, is the largest that the adapter bears: beyond it learning overshoots.

The head beside the adapter has the rate of common/planning/head_rule.py with the phase's own noise,
and at most the rate by which the phase before has trained it.

Whether there is room for an adapter: were the gradients of all units alike and as large as the clip
norm, they would move the adapter by r C sum(weights), and the noise by v sqrt(D) for D trained
entries. `signal_ratio` is the quotient; no rate changes it. Below LEAST_RATIO the head alone is
trained. Measured with features of MiniLM: LoRA gained over the head at 22, 12 and 11, and at 6; not
at 2.3 and 1.7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The phase that trains head and adapter, after one of the head alone, which is cheap in budget.
HEAD_SHARE = 0.25  # of the budget, of the phase before
ROUNDS, SAMPLING_RATE = 20, 0.25  # five passes over the records
LEAST_RATIO = 3.0


@dataclass(frozen=True)
class AdapterFacts:
    """What the rule needs to know, all of it public.

    Attributes:
        noise_multiplier: Of a step of the phase, over the clip norm.
        clip_norm: The clip norm.
        sampling_rate: With which a step takes each unit.
        units: How many units (records or entities) a site is expected to have.
        sites: How many sites there are.
        weights: How often each round's mean update counts in what the phase ends with.
        entries: How many entries of the adapter are trained.
        tolerated_noise: The standard deviation of noise in an entry that the adapter bears.
        tolerated_step: The L2 norm of a round's step that the adapter bears in any direction.
    """

    noise_multiplier: float
    clip_norm: float
    sampling_rate: float
    units: float
    sites: int
    weights: Sequence[float]
    entries: int
    tolerated_noise: float
    tolerated_step: float

    @property
    def noise_at_unit_rate(self) -> float:
        """The standard deviation of what noise leaves in an entry at a learning rate of 1."""
        of_step = self.noise_multiplier * self.clip_norm / (self.units * self.sampling_rate)
        gain = math.sqrt(sum(weight**2 for weight in self.weights))
        return of_step / math.sqrt(self.sites) * gain


def adapter_rate(facts: AdapterFacts) -> float:
    """The learning rate at which noise alone leaves in an entry what the adapter bears, or the one
    of the largest step that it bears if that is less."""
    by_noise = facts.tolerated_noise / facts.noise_at_unit_rate
    return min(by_noise, facts.tolerated_step / facts.clip_norm)


def signal_ratio(facts: AdapterFacts) -> float:
    """The largest movement by gradients over the movement by noise, both as L2 norms."""
    by_gradients = facts.clip_norm * sum(facts.weights)
    return by_gradients / (facts.noise_at_unit_rate * math.sqrt(facts.entries))


@dataclass(frozen=True)
class AdapterPlan:
    """What the rule plans for a phase that trains an adapter, and the head with it.

    Attributes:
        adapter_lr: phases.adapter_lr.
        head_lr: phases.head_lr of the same phase; None where no head is trained, or the rule for
            heads does not know its features' norm.
        cosine: The least mean cosine that the noise alone leaves between a text's features with
            and without the adapter.
        signal_ratio: The largest movement by gradients over the movement by noise.
    """

    adapter_lr: float
    head_lr: float | None
    cosine: float
    signal_ratio: float

    @property
    def has_room(self) -> bool:
        """Whether an adapter can learn more than the noise takes away."""
        return self.signal_ratio >= LEAST_RATIO
