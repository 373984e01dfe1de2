"""What a contract says of privacy: unit, budget, clipping, and the metrics that are released.

Optional settings are None when absent, and what is None is no part of a contract's hash.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from silotune.common.config.types import (
    Bound,
    Count,
    Delta,
    Distinct,
    Epsilon,
    Frozen,
    Positive,
)

Unit = Literal["record", "entity"]
Metric = Literal["loss", "accuracy", "unclipped"]
Share = Annotated[float, Field(gt=0, le=0.5, strict=True)]


class Target(NamedTuple):
    """What one run may cost a unit of one site."""

    epsilon: float
    delta: float


def delta_for(units: float) -> float:
    """The largest power of ten that is at most min(1e-4, 1 / (10 units))."""
    digits = 4
    while 10**digits < 10 * units:
        digits += 1
    return float(f"1e-{digits}")


def epsilon_text(epsilon: float) -> str:
    """An ε for people: two decimals, or two significant digits of one below 0.01."""
    if not math.isfinite(epsilon):
        return "∞"
    return f"{epsilon:.2f}" if epsilon >= 0.1 or epsilon == 0 else f"{epsilon:#.2g}"


DeltaSize = Literal["small", "large", "meaningless"]


def size_of_delta(delta: float, units: float) -> DeltaSize:
    """How a delta compares with the number of units that it protects.

    A mechanism that publishes each unit whole with probability delta is (0, delta)-DP. Of `units`
    it publishes delta * units on average: "small" is at most 0.1 (each factor is a decimal number,
    so the product is compared with room for its rounding), "meaningless" is 1 or more.
    """
    published = delta * units
    if published >= 1 - 1e-9:
        return "meaningless"
    return "small" if published <= 0.1 * (1 + 1e-9) else "large"


class Entity(Frozen):
    """The unit when somebody has several records: all rows with equal `key` columns are one entity.

    Of an entity's rows the first (or last) `max_records_per_entity` in the file's order are used;
    which those are does not depend on any other entity. Their gradients are averaged or added, and
    the result is clipped
    once: whatever an entity's rows hold, it moves the sum by at most the clip norm.
    """

    key: Annotated[tuple[str, ...], Field(min_length=1), Distinct] = Field(
        description="Columns whose equal values mark the rows of one entity."
    )
    max_records_per_entity: Count = Field(
        description="Largest number of an entity's rows that are used; further rows are left out."
    )
    select: Literal["first", "last"] = Field(
        default="first",
        description="Which of an entity's rows are used, in the file's order, if it has more.",
    )
    reduce: Literal["mean", "sum"] = Field(
        default="mean",
        description="How the gradients of an entity's rows are combined before they are clipped.",
    )


class AdaptiveClipping(Frozen):
    """A clip norm that follows a quantile of the gradients' norms (Andrew, Thakkar, McMahan and
    Ramaswamy 2021, arXiv 1905.03871, section 2).

    Each site releases the noised share of units that were not clipped (`unclipped`), charged with
    `share` of each step's budget. After a round the server multiplies the clip norm C by
    exp(-lr (unclipped - quantile)), within [min_clip_norm, max_clip_norm]. The first C is
    privacy.clip_norm.
    The guarantee holds for any C that a server asks for: the noise is a multiple of it.
    """

    quantile: Annotated[float, Field(gt=0, lt=1, strict=True)] = Field(
        default=0.5, description="Target share of units whose gradients are not clipped."
    )
    lr: Annotated[float, Field(gt=0, le=10, strict=True)] = Field(
        default=0.2,
        description="Learning rate of the clip norm's geometric update after each round.",
    )
    share: Share = Field(
        default=0.05,
        description="Share of each step's privacy budget that pays for the noised share of "
        "unclipped units.",
    )
    min_clip_norm: Bound = Field(
        default=1e-3, description="Lower bound of the clip norm, an L2 norm."
    )
    max_clip_norm: Bound = Field(
        default=1.0,
        description="Upper bound of the clip norm, which sites compare with permits.max_clip_norm.",
    )


class Privacy(Frozen):
    """The guarantee every site gives, whatever the server and the other sites do.

    (epsilon, delta)-DP of all the run's replies of one site together; adjacency: add or remove one
    `unit`. A site trains with per-unit gradients clipped to `clip_norm`, summed, plus Gaussian
    noise, divided by the public constant `expected_units` (how many units a site is expected to
    have: records or entities) times the sampling rate. mode "none" trains without noise, and
    without clipping unless `clip_only` is set, for comparison; a site refuses it unless its owner
    allows it. A delta of 1 /
    expected_units or more needs `allow_large_delta` (`size_of_delta`).
    """

    mode: Literal["dp", "none"] = Field(
        default="dp",
        description='"dp" clips and noises; "none" adds no noise and gives no guarantee, for '
        "comparison alone.",
    )
    clip_only: Literal[True] | None = Field(
        default=None,
        description='With mode = "none": true clips gradients to clip_norm as "dp" does, to '
        "compare with a private run at the same learning rates; not clipped if absent.",
    )
    unit: Unit = Field(
        default="record",
        description="Privacy unit: what is added or removed between two neighbouring data sets.",
    )
    entity: Entity | None = Field(
        default=None,
        description='How rows belong to entities; required with unit = "entity", and only then.',
    )
    epsilon: Epsilon = Field(
        default=8.0,
        description="ε of the guarantee: an upper bound on the privacy loss of one run for each "
        "unit of a site.",
    )
    delta: Delta = Field(
        default=1e-4,
        description="δ of the guarantee; at most 1 / (10 expected_units) is recommended.",
    )
    allow_large_delta: Literal[True] | None = Field(
        default=None,
        description="true permits a δ of 1 / expected_units or more, with which publishing one "
        "whole record would satisfy the guarantee; refused if absent.",
    )
    clip_norm: Bound = Field(
        default=1.0,
        description="Largest L2 norm of a unit's gradient; the first one with adaptive clipping.",
    )
    adaptive: AdaptiveClipping | None = Field(
        default=None,
        description="Adaptive clipping, where the clip norm follows a quantile of gradient norms; "
        "constant if absent.",
    )
    expected_units: Positive = Field(
        description="Public number of units that a site is expected to have; noised sums are "
        "divided by it times the sampling rate."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.unit == "entity") != (self.entity is not None):
            raise ValueError('unit = "entity" and a table [privacy.entity] go together')
        if self.clip_only and self.mode == "dp":
            raise ValueError('clip_only goes with mode = "none": mode = "dp" always clips')
        if self.adaptive and self.mode == "none":
            raise ValueError('mode = "none" does not clip adaptively: that takes a noised share')
        if self.adaptive and not (
            self.adaptive.min_clip_norm <= self.clip_norm <= self.adaptive.max_clip_norm
        ):
            raise ValueError(
                "clip_norm must be between adaptive.min_clip_norm and adaptive.max_clip_norm: "
                "it is the first"
            )
        return self

    @property
    def largest_clip_norm(self) -> float:
        return self.adaptive.max_clip_norm if self.adaptive else self.clip_norm


class Released(Frozen):
    """A figure of a round's training that leaves a site with the update: bounded, noised, charged.

    Each sampled unit adds its value, clipped to [0, bound]: its loss, or for accuracy 1 if it was
    classified rightly (an entity the mean over its records). `share` is the part of each step's
    privacy budget that goes into it (client/training/local_round.py). What leaves is the noised sum
    over the public expected batch.
    """

    metric: Literal["loss", "accuracy"] = Field(
        description="Metric of the sampled units that is released with each update."
    )
    share: Share = Field(
        description="Share of each step's privacy budget that pays for this metric."
    )
    bound: Bound = Field(
        default=1.0, description="Upper bound to which each unit's value is clipped."
    )
