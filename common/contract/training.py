"""What a contract says of training: its phases, their learning rates and schedules.

Optional settings are None when absent, and what is None is no part of a contract's hash.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from silotune.common.config.types import (
    Count,
    Frozen,
    Positive,
    Rate,
    SamplingRate,
)

LearningRate = Annotated[float, Field(gt=0, le=1e4, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1, strict=True)]
MOST_STEPS = 1_000_000  # of a phase: what the ledger's entries and the accounts are made for


class Adam(Frozen):
    """Adam within a round instead of plain steps; its moments begin at zero each round.

    The noise's known variance is taken off the second moment, and what is left is at least `floor`
    squared (client/training/dp_adam.py). It needs several local steps to be of use.
    """

    beta1: Fraction = Field(
        default=0.9, description="Decay rate of the first moment, the mean of gradients."
    )
    beta2: Fraction = Field(
        default=0.999, description="Decay rate of the second moment, the mean of squared gradients."
    )
    floor: Annotated[float, Field(ge=1e-15, le=1e6, strict=True)] = Field(
        default=1e-3,
        description="Lower bound of the root of the second moment after the noise's variance is "
        "subtracted.",
    )


class Schedule(Frozen):
    """What the rates of a phase are multiplied by, round by round: up from 0 over `warmup_rounds`
    rounds, then down towards `final_factor` along a line or half a cosine, or not at all.
    `final_factor` is what one more
    round would have: a round at rate 0 would be charged and change nothing."""

    shape: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Course of the learning rates after the warmup: constant, linear decay or "
        "cosine decay.",
    )
    warmup_rounds: Annotated[int, Field(ge=0, le=1_000_000, strict=True)] = Field(
        default=0,
        description="Rounds in which the learning rates rise linearly from 0; fewer than the "
        "phase's rounds.",
    )
    final_factor: Annotated[float, Field(ge=0, le=1, strict=True)] = Field(
        default=0.0,
        description="Factor of the learning rates that one more round after the phase's last "
        "would have.",
    )

    def factor(self, place: int, rounds: int) -> float:
        """For the 1-based round `place` of a phase of `rounds`."""
        if place <= self.warmup_rounds:
            return place / (self.warmup_rounds + 1)
        if self.shape == "constant":
            return 1.0
        done = (place - self.warmup_rounds - 1) / (rounds - self.warmup_rounds)
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_factor + (1 - self.final_factor) * left


class Phase(Frozen):
    """Consecutive rounds that train the same tensors; one that trains the head alone is a linear
    probe on frozen features. A language model has no head: its phases train the adapter.

    Each round a site does `local_steps` steps; each takes every unit with probability
    `sampling_rate`. `budget_share` is this phase's share of the privacy budget, nearly so where
    sampling rates differ much (client/privacy/accountant.py, plan; `silotune privacy plan
    --contract` shows it). With `noise_decay` each round has that multiple of the noise of the round
    before; together they cost the same. A phase ends at the mean of its later iterates
    (`aggregation.averaging_start`); the next starts there, with reset optimizer state. `dropout` is
    the share of the head's inputs left out in a step: the same for all its records, drawn from
    public numbers, so that no record is used. With `proximal_mu` = mu each local step's
    gradient has mu times the way from what the server sent added to it (FedProx, arXiv 1812.06127).
    With drift_correction = "scaffold" each step is corrected by how the site's mean gradient of the
    round before differed from all sites' (SCAFFOLD, arXiv 1910.06378, option II); where all sites
    answer in both rounds the corrections add up to nothing, and with them the noise that is in
    them. Both are post-processing of what is noised.

    `personal`, in the last phase, leaves each site something of its own
    (client/training/local_state.py), which is clipped and noised with all else: "head" or "adapter"
    do not leave the site at all; with "mean-regularised" a site has its own copy of all that is
    trained, sends how it changed, and `proximal_mu` pulls it to the mean: from a model for each
    (towards 0) to nearly one for all (MR-MTL, Liu, Hu, Wu and Smith 2022, arXiv 2206.07902). Where
    a part stays, public metrics are of the rest.
    """

    trains: Literal["head", "head+adapter", "adapter"] = Field(
        description="Tensors that are trained: the head, the adapter, or both."
    )
    rounds: Count = Field(description="Number of rounds of the phase, at least one.")
    sampling_rate: SamplingRate = Field(
        description="Probability with which each local step samples each unit (Poisson sampling)."
    )
    local_steps: Count = Field(
        default=1, description="Number of gradient steps that a site takes in a round."
    )
    budget_share: Rate = Field(
        default=1.0,
        description="Share of the privacy budget that the phase spends; the shares sum to 1.",
    )
    noise_decay: Annotated[float, Field(ge=0.5, le=1, strict=True)] | None = Field(
        default=None,
        description="Ratio of each round's noise multiplier to that of the round before; constant "
        "noise if absent.",
    )
    head_lr: LearningRate | None = Field(
        default=None,
        description="Learning rate of the head; required where the head is trained, and only "
        "there.",
    )
    adapter_lr: LearningRate | None = Field(
        default=None,
        description="Learning rate of the adapter; required where the adapter is trained, and "
        "only there.",
    )
    adam: Adam | None = Field(
        default=None,
        description="Adam within a round, corrected for the noise's variance; plain gradient "
        "steps if absent.",
    )
    schedule: Schedule | None = Field(
        default=None,
        description="Learning rate schedule over the phase's rounds; constant rates if absent.",
    )
    proximal_mu: Positive | None = Field(
        default=None,
        description="Strength μ of FedProx's proximal term, which pulls each local step towards "
        "the received model; none if absent.",
    )
    drift_correction: Literal["scaffold"] | None = Field(
        default=None,
        description='"scaffold" corrects each local step for client drift (arXiv 1910.06378, '
        "option II); none if absent.",
    )
    personal: Literal["head", "adapter", "mean-regularised"] | None = Field(
        default=None,
        description='What each site keeps for itself in the last phase: its "head", its '
        '"adapter", or with "mean-regularised" a copy of all that is trained; nothing '
        "if absent.",
    )
    dropout: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = Field(
        default=None,
        description="Share of the head's inputs that are dropped in a step, the same inputs for "
        "all its records; none if absent.",
    )
    rule: Count | None = Field(
        default=None,
        description="Version of the rule that gave rounds, head_lr and privacy.clip_norm from the "
        "contract's public facts; if absent, they were chosen otherwise.",
    )

    @model_validator(mode="after")
    def _rates(self) -> Self:
        for part, trained, rate in (
            ("adapter", self.adapts, self.adapter_lr),
            ("head", self.trains != "adapter", self.head_lr),
        ):
            if trained != (rate is not None):
                raise ValueError(
                    f"{part}_lr goes with a phase that trains the {part}, and only with it"
                )
        if self.schedule and self.schedule.warmup_rounds >= self.rounds:
            raise ValueError("schedule.warmup_rounds must be less than the phase's rounds")
        if self.personal == "mean-regularised" and not self.proximal_mu:
            raise ValueError(
                'personal = "mean-regularised" needs proximal_mu, which pulls them to their mean'
            )
        if self.personal not in (None, "mean-regularised", *self.trains.split("+")):
            raise ValueError(f'personal = "{self.personal}" is not what this phase trains')
        if self.proximal_mu and self.local_steps == 1 and self.personal != "mean-regularised":
            raise ValueError("proximal_mu pulls back from the second local step on; there is one")
        # Beyond that a step passes what it is pulled to, and two of them could cancel: what a site
        # sends would lie on a float32 grid as coarse as the weights that a server chose for it.
        if self.proximal_mu and self.proximal_mu * max(self.head_lr or 0, self.adapter_lr or 0) > 1:
            raise ValueError("proximal_mu times a rate is more than 1: a step would overshoot")
        if self.adam and self.personal == "mean-regularised":
            raise ValueError(
                'adam would measure the pull of personal = "mean-regularised", not the gradient'
            )
        if self.drift_correction and (
            self.local_steps == 1
            or self.rounds == 1
            or self.adam
            or self.proximal_mu
            or self.personal
        ):
            raise ValueError(
                "drift_correction is for several rounds of several plain local steps from one "
                "model: without adam, proximal_mu and personal"
            )
        if self.rule and self.trains != "head":
            raise ValueError("rule is of a phase that trains the head alone")
        if self.dropout and self.trains == "adapter":
            raise ValueError("dropout is of the head's inputs, and this phase trains no head")
        return self

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.rounds * self.local_steps > MOST_STEPS:
            raise ValueError(
                f"rounds times local_steps is {self.rounds * self.local_steps:,}; a phase has at "
                f"most {MOST_STEPS:,} steps. Lower one of them"
            )
        if self.noise_decay and self.noise_decay ** (self.rounds - 1) < 1e-3:
            raise ValueError(
                "noise_decay over this many rounds ends below a thousandth of the first noise"
            )
        return self

    @property
    def adapts(self) -> bool:
        """Whether layers are adapted, or the frozen ones' outputs are all that is needed."""
        return self.trains != "head"

    def rate(self, name: str, place: int) -> float:
        """What a step multiplies a tensor's gradient by, in the round at a 1-based place."""
        rate = self.head_lr if name.startswith("head.") else self.adapter_lr
        assert rate is not None
        return rate * (self.schedule.factor(place, self.rounds) if self.schedule else 1.0)
