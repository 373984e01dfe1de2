"""A plan for a head and what it is trained on: what a forecast starts from."""

from __future__ import annotations

from dataclasses import dataclass

from silotune.common.planning.head_rule import HeadFacts

TEST_RECORDS = 1_000  # by which a signal is to show


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
