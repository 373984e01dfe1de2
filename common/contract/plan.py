"""What a contract says of privacy and of training: the unit, the budget, the phases, the releases.

All of it is public and agreed on beforehand. Optional settings are None when they are absent, and
what is None is no part of a contract's hash: a setting added here leaves older contracts what they
were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from silotune.common.config.types import (
    Bound,
    Count,
    Delta,
    Distinct,
    Epsilon,
    Frozen,
    Name,
    Positive,
    Rate,
    SamplingRate,
)

Unit = Literal["record", "entity"]
Metric = Literal["loss", "accuracy", "unclipped"]
Share = Annotated[float, Field(gt=0, le=0.5, strict=True)]
LearningRate = Annotated[float, Field(gt=0, le=1e4, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1, strict=True)]


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

    Of an entity's rows the first (or last) `cap` in the file's order are used; which those are does
    not depend on any other entity. Their gradients are averaged or added, and the result is clipped
    once: whatever an entity's rows hold, it moves the sum by at most the clip norm.
    """

    key: Annotated[tuple[str, ...], Field(min_length=1), Distinct]
    cap: Count
    keep: Literal["first", "last"] = "first"
    combine: Literal["mean", "sum"] = "mean"


class AdaptiveClipping(Frozen):
    """A clip norm that follows a quantile of the gradients' norms (Andrew, Thakkar, McMahan and
    Ramaswamy 2021, arXiv 1905.03871, section 2).

    Each site releases the noised share of units that were not clipped (`unclipped`), paid for with
    `share` of each step's budget. After a round the server multiplies the clip norm C by
    exp(-rate (unclipped - quantile)), within [lowest, highest]. The first C is privacy.clip_norm.
    The guarantee holds for any C that a server asks for: the noise is a multiple of it.
    """

    quantile: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.5
    rate: Annotated[float, Field(gt=0, le=10, strict=True)] = 0.2
    share: Share = 0.05
    lowest: Bound = 1e-3
    highest: Bound = 1.0


class Privacy(Frozen):
    """The guarantee every site gives, whatever the server and the other sites do.

    (epsilon, delta)-DP of all the run's replies of one site together; adjacency: add or remove one
    `unit`. A site trains with per-unit gradients clipped to `clip_norm`, summed, plus Gaussian
    noise, divided by the public constant `expected_records` (how many units a site is expected to
    have: records or entities) times the sampling rate. mode "none" trains without clipping or
    noise, for comparison; a site refuses it unless its owner allows it.

    allow_large_delta: permits a delta of 1 / expected_records or more, with which publishing one
    whole record of a site would satisfy the guarantee (`size_of_delta`).
    """

    mode: Literal["dp", "none"] = "dp"
    unit: Unit = "record"
    entity: Entity | None = None
    epsilon: Epsilon = 8.0
    delta: Delta = 1e-4
    allow_large_delta: Literal[True] | None = None
    clip_norm: Bound = 1.0
    adaptive: AdaptiveClipping | None = None
    expected_records: Positive

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.unit == "entity") != (self.entity is not None):
            raise ValueError('unit = "entity" and a table [privacy.entity] go together')
        if self.adaptive and self.mode == "none":
            raise ValueError('mode = "none" does not clip, so it has no adaptive clipping')
        if self.adaptive and not (self.adaptive.lowest <= self.clip_norm <= self.adaptive.highest):
            raise ValueError(
                "clip_norm must lie between adaptive.lowest and adaptive.highest: it is the first"
            )
        return self

    @property
    def largest_clip_norm(self) -> float:
        return self.adaptive.highest if self.adaptive else self.clip_norm


class Adam(Frozen):
    """Adam within a round instead of plain steps; its moments begin at zero each round.

    The noise's known variance is taken off the second moment, and what is left is at least `floor`
    squared (client/training/dp_adam.py). It needs several local steps to be of use.
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    floor: Annotated[float, Field(ge=1e-15, le=1e6, strict=True)] = 1e-3


class Schedule(Frozen):
    """What the rates of a phase are multiplied by, round by round: up from 0 over `warm_up` rounds,
    then down towards `last` along a line or half a cosine, or not at all. `last` is what one more
    round would have: a round at rate 0 would be paid for and change nothing."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warm_up: Annotated[int, Field(ge=0, le=1_000_000, strict=True)] = 0
    last: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.0

    def factor(self, place: int, rounds: int) -> float:
        """For the 1-based round `place` of a phase of `rounds`."""
        if place <= self.warm_up:
            return place / (self.warm_up + 1)
        if self.shape == "constant":
            return 1.0
        done = (place - self.warm_up - 1) / (rounds - self.warm_up)
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.last + (1 - self.last) * left


class Phase(Frozen):
    """Consecutive rounds that train the same tensors; one that trains the head alone is a linear
    probe on frozen features. A language model has no head: its phases train the adapter.

    Each round a site does `local_steps` steps; each takes every unit with probability
    `sampling_rate`. `budget` is this phase's share of the privacy budget, nearly so where sampling
    rates differ much (client/privacy/accountant.py, plan; `silotune privacy plan --contract` shows
    it). With `noise_decay` each round has that multiple of the noise of the round before; together
    they cost the same. A phase ends at the mean of its later iterates (`aggregation.average_from`);
    the next starts there, at rest. `dropout` is the share of the head's inputs left out in a step:
    the same for all its records, drawn from public numbers, so that no record has a part in it.
    With `proximal` = mu each local step's gradient has mu times the way from what the server sent
    added to it (FedProx, arXiv 1812.06127). With control = "scaffold" each step is corrected by how
    the site's mean gradient of the round before differed from all sites' (SCAFFOLD, arXiv
    1910.06378, option II); where all sites answer in both rounds the corrections add up to nothing,
    and with them the noise that is in them. Both are post-processing of what is noised.

    `personal`, in the last phase, leaves each site something of its own
    (client/training/local_state.py), which is
    clipped and noised with all else: "head" or "adapter" do not leave the site at all; with
    "copies" a site has its own copy of all that is trained, sends how it changed, and `proximal`
    pulls it to the mean: from a model for each (towards 0) to nearly one for all (MR-MTL, Liu, Hu,
    Wu and Smith 2022, arXiv 2206.07902). Where a part stays, public metrics are of the rest.
    """

    trains: Literal["head", "head+adapter", "adapter"]
    rounds: Count
    sampling_rate: SamplingRate
    local_steps: Count = 1
    budget: Rate = 1.0
    noise_decay: Annotated[float, Field(ge=0.5, le=1, strict=True)] | None = None
    head_rate: LearningRate | None = None
    adapter_rate: LearningRate | None = None
    adam: Adam | None = None
    schedule: Schedule | None = None
    proximal: Positive | None = None
    control: Literal["scaffold"] | None = None
    personal: Literal["head", "adapter", "copies"] | None = None
    dropout: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None

    @model_validator(mode="after")
    def _rates(self) -> Self:
        for part, trained, rate in (
            ("adapter", self.adapts, self.adapter_rate),
            ("head", self.trains != "adapter", self.head_rate),
        ):
            if trained != (rate is not None):
                raise ValueError(
                    f"{part}_rate goes with a phase that trains the {part}, and only with it"
                )
        if self.schedule and self.schedule.warm_up >= self.rounds:
            raise ValueError("schedule.warm_up must be less than the phase's rounds")
        if self.personal == "copies" and not self.proximal:
            raise ValueError('personal = "copies" needs proximal, which pulls them to their mean')
        if self.personal not in (None, "copies", *self.trains.split("+")):
            raise ValueError(f'personal = "{self.personal}" is not what this phase trains')
        if self.proximal and self.local_steps == 1 and self.personal != "copies":
            raise ValueError("proximal pulls back from the second local step on; there is one")
        # Beyond that a step passes what it is pulled to, and two of them could cancel: what a site
        # sends would lie on a float32 grid as coarse as the weights that a server chose for it.
        if self.proximal and self.proximal * max(self.head_rate or 0, self.adapter_rate or 0) > 1:
            raise ValueError("proximal times a rate is more than 1: a step would overshoot")
        if self.adam and self.personal == "copies":
            raise ValueError('adam would measure the pull of personal = "copies", not the gradient')
        if self.control and (
            self.local_steps == 1 or self.rounds == 1 or self.adam or self.proximal or self.personal
        ):
            raise ValueError(
                "control is for several rounds of several plain local steps from one "
                "model: without adam, proximal and personal"
            )
        if self.dropout and self.trains == "adapter":
            raise ValueError("dropout is of the head's inputs, and this phase trains no head")
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
        rate = self.head_rate if name.startswith("head.") else self.adapter_rate
        assert rate is not None
        return rate * (self.schedule.factor(place, self.rounds) if self.schedule else 1.0)


class Adaptive(Frozen):
    """The server's Adam or Yogi on the mean update (arXiv 2003.00295, Algorithm 2), instead of the
    heavy ball; both moments begin at zero, without correction. `rate` multiplies a step, `tau` is
    added to the root of the second moment."""

    kind: Literal["adam", "yogi"]
    rate: LearningRate
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Annotated[float, Field(ge=1e-9, le=1e3, strict=True)] = 1e-3


class EarlyStop(Frozen):
    """End a run in its last phase when `metric` on the operator's public rows has not been better
    for `patience` evaluations in a row. Nothing private has a part in it."""

    metric: Name
    patience: Count = 5


class PublicGate(Frozen):
    """Do not take a round's aggregate if the adapter that the server's step makes of it is worse by
    `metric` on the operator's public rows than the adapter before, by more than `most`. It needs
    the sum alone, so it goes with masks too. Nothing private has a part in what is compared but the
    noised sum itself, so it costs no privacy; what the round's sum cost its sites stays spent.

    It bounds one round's harm. A lie of less than `most` a round passes it, and one that spoils
    every round leaves no training at all."""

    metric: Name
    most: Annotated[float, Field(ge=0, le=1e6, strict=True)]


class Robust(Frozen):
    """A mean that up to `byzantine` of the sites cannot carry away (server/aggregation/robust.py).
    Each of them needs to see the updates one by one, so it goes without masks; `most` is the norm
    that "norm" cuts updates to."""

    rule: Literal["krum", "multi-krum", "trimmed-mean", "median", "norm"]
    byzantine: Annotated[int, Field(ge=1, le=1000, strict=True)] = 1
    most: Positive | None = None

    @model_validator(mode="after")
    def _bound(self) -> Self:
        if (self.rule == "norm") != (self.most is not None):
            raise ValueError('most goes with rule = "norm", and only with it')
        return self


# What the methods train of LoRA's factors, and what the server makes of it
# (server/aggregation/mean.py).
Method = Literal["ffa", "fedsvd", "rolora", "fedsa", "fedavg", "flexlora", "fedex"]
BY_ONE = ("flexlora", "fedex")  # need each site's update by itself


class Aggregation(Frozen):
    """Mean of the sites' updates with public weights, then the server's heavy ball, or `adaptive`.

    method, of LoRA's B A:
    ffa        A is frozen, the mean is B's (FFA-LoRA, arXiv 2403.12313)
    fedsvd     the same, and after each round B A is factored anew by SVD (arXiv 2505.12805)
    rolora     B in odd rounds of a phase, A in even ones (RoLoRA, arXiv 2409.02346)
    fedsa      both; A is averaged, each site's B is its own (FedSA-LoRA, arXiv 2410.01463)
    fedavg     both, averaged apart: the mean of products is not the product of means
    flexlora   both, and the mean of the products is factored by SVD (arXiv 2402.11505)
    fedex      both, averaged apart, and what that loses goes into the frozen weight (FedEx-LoRA,
               arXiv 2410.09432): exact, at the price of sending a matrix as large as the weight

    A phase's result is the mean of its iterates from the fraction `average_from` on; where A moves,
    a mean of factors would be no mean of products, and it is the last iterate. All act on noised
    sums only, so they cost no privacy (post-processing). largest_norm: an unmasked update with a
    larger L2 norm does not count.
    """

    method: Method = "ffa"
    robust: Robust | None = None
    momentum: Fraction = 0.9
    adaptive: Adaptive | None = None
    average_from: Fraction = 0.5
    largest_norm: Positive | None = None
    early_stop: EarlyStop | None = None
    gate: PublicGate | None = None

    def of_other_tasks(self, known: Sequence[str]) -> list[str]:
        """What is wrong with settings that look at a metric on public rows: it is none of these."""
        return [
            f'{key}.metric must be one of {", ".join(known)}, got "{setting.metric}"'
            for key, setting in (("early_stop", self.early_stop), ("gate", self.gate))
            if setting is not None and setting.metric not in known
        ]


class Released(Frozen):
    """A figure of a round's training that leaves a site with the update: bounded, noised, paid for.

    Each sampled unit adds its value, clipped to [0, bound]: its loss, or for accuracy 1 if it was
    classified rightly (an entity the mean over its records). `share` is the part of each step's
    privacy budget that goes into it (client/training/local_round.py). What leaves is the noised sum
    over the public expected batch.
    """

    metric: Literal["loss", "accuracy"]
    share: Share
    bound: Bound = 1.0


class SecureAggregation(Frozen):
    """Updates leave masked, and the server learns only their weighted sum
    (common/secagg/participant.py).

    threshold: how many sites must answer for a sum to open; by default floor(2 n / 3) + 1 of n.
    colluders: how many sites may work with the server without seeing more than the sum; 2 x
    threshold must exceed n + colluders. bound: the largest entry of an update; a site sends none
    that exceeds it, and the ring's precision is the bound's (common/secagg/fixed_point.py).
    """

    threshold: Count | None = None
    colluders: Annotated[int, Field(ge=0, le=126, strict=True)] = 0
    bound: Bound = 16.0
