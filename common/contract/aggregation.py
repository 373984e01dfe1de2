"""What a contract says of the server's side: how updates are aggregated, and how they are masked.

Optional settings are None when absent, and what is None is no part of a contract's hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from silotune.common.config.types import (
    Bound,
    Count,
    Frozen,
    Name,
    Positive,
)
from silotune.common.contract.training import Fraction, LearningRate


class Adaptive(Frozen):
    """The server's Adam or Yogi on the mean update (arXiv 2003.00295, Algorithm 2), instead of the
    momentum; both moments begin at zero, without correction."""

    kind: Literal["adam", "yogi"] = Field(
        description="Optimiser that the server applies to the mean update."
    )
    lr: LearningRate = Field(description="Learning rate of the server's step on the mean update.")
    beta1: Fraction = Field(
        default=0.9, description="Decay rate of the first moment of mean updates."
    )
    beta2: Fraction = Field(
        default=0.99, description="Decay rate of the second moment of mean updates."
    )
    tau: Annotated[float, Field(ge=1e-9, le=1e3, strict=True)] = Field(
        default=1e-3, description="Constant τ that is added to the root of the second moment."
    )


class EarlyStop(Frozen):
    """End a run in its last phase when `metric` on the operator's public rows has not been better
    for `patience` evaluations in a row, and release what the phase had come to at its best
    evaluation. The rounds that are left out cost nothing. No private record is used. Rows that
    choose when to stop make their own figures look better than others': report others."""

    metric: Name = Field(
        description="Metric on the operator's public rows that decides about stopping."
    )
    patience: Count = Field(
        default=5,
        description="Number of evaluations in a row without an improvement after which the run "
        "ends.",
    )


class PublicGate(Frozen):
    """Do not take a round's aggregate if the adapter that the server's step makes of it is worse by
    `metric` on the operator's public rows than the adapter before, by more than `max_degradation`.
    It needs the sum alone, so it goes with masks too. Nothing private has a part in what is
    compared but the noised sum itself, so it costs no privacy; what the round's sum cost its sites
    stays spent.

    It bounds one round's harm. A malicious change of less than `max_degradation` a round passes it,
    and one that spoils every round leaves no training at all."""

    metric: Name = Field(
        description="Metric on the operator's public rows that accepts or rejects a round's "
        "aggregate."
    )
    max_degradation: Annotated[float, Field(ge=0, le=1e6, strict=True)] = Field(
        description="Largest loss in the metric that one round's aggregate may cause, in the "
        "metric's own unit."
    )


class Robust(Frozen):
    """A mean on which up to `byzantine` malicious sites have limited effect
    (server/aggregation/robust.py). Each rule needs to see single updates, so it goes without
    masks; `max_norm` is the norm that "norm" cuts updates to."""

    rule: Literal["krum", "multi-krum", "trimmed-mean", "median", "norm"] = Field(
        description="Robust aggregation rule that replaces the weighted mean."
    )
    byzantine: Annotated[int, Field(ge=1, le=1000, strict=True)] = Field(
        default=1, description="Number of arbitrarily wrong sites that the rule tolerates."
    )
    max_norm: Positive | None = Field(
        default=None,
        description='L2 norm to which rule = "norm" clips each update; required with that rule, '
        "and only with it.",
    )

    @model_validator(mode="after")
    def _bound(self) -> Self:
        if (self.rule == "norm") != (self.max_norm is not None):
            raise ValueError('max_norm goes with rule = "norm", and only with it')
        return self


# What the methods train of LoRA's factors, and what the server makes of it
# (server/aggregation/mean.py).
Method = Literal["ffa", "fedsvd", "rolora", "fedsa", "fedavg", "flexlora", "fedex"]
BY_ONE = ("flexlora", "fedex")  # need each site's update by itself


class Aggregation(Frozen):
    """Mean of the sites' updates with public weights, then the server's momentum
    (`server_momentum`), or `server_optimizer`.

    method, of LoRA's B A:
    ffa        A is frozen, the mean is B's (FFA-LoRA, arXiv 2403.12313)
    fedsvd     the same, and after each round B A is re-factorised by SVD (arXiv 2505.12805)
    rolora     B in odd rounds of a phase, A in even ones (RoLoRA, arXiv 2409.02346)
    fedsa      both; A is averaged, each site's B is its own (FedSA-LoRA, arXiv 2410.01463)
    fedavg     both, averaged apart: the mean of products is not the product of means
    flexlora   both, and the mean of the products is factored by SVD (arXiv 2402.11505)
    fedex      both, averaged apart, and what that loses goes into the frozen weight (FedEx-LoRA,
               arXiv 2410.09432): exact, at the price of sending a matrix as large as the weight

    A phase's result is the mean of its iterates from the fraction `averaging_start` on; where A
    moves, a mean of factors would be no mean of products, and it is the last iterate. All act on
    noised sums only, so they cost no privacy (post-processing).
    """

    method: Method = Field(
        default="ffa",
        description="Which LoRA factors are trained, and how the server combines them.",
    )
    robust: Robust | None = Field(
        default=None,
        description="Robust aggregation against wrong updates, without secure aggregation only; "
        "the weighted mean if absent.",
    )
    server_momentum: Fraction = Field(
        default=0.9,
        description="Momentum of the server's step on the mean update; 0 is plain averaging.",
    )
    server_optimizer: Adaptive | None = Field(
        default=None,
        description="Adaptive server optimiser instead of momentum; none if absent.",
    )
    averaging_start: Fraction = Field(
        default=0.5,
        description="Fraction of a phase's rounds after which its iterates enter the mean that "
        "the phase ends with.",
    )
    max_update_norm: Positive | None = Field(
        default=None,
        description="Largest L2 norm of an unmasked update that counts; no limit if absent.",
    )
    early_stop: EarlyStop | None = Field(
        default=None,
        description="Rule that ends a run once its public metric stops improving; none if absent.",
    )
    gate: PublicGate | None = Field(
        default=None,
        description="Rule that rejects a round's aggregate if a public metric degrades; none if "
        "absent.",
    )

    def of_other_tasks(self, known: Sequence[str]) -> list[str]:
        """What is wrong with settings that look at a metric on public rows: it is none of these."""
        return [
            f'{key}.metric must be one of {", ".join(known)}, got "{setting.metric}"'
            for key, setting in (("early_stop", self.early_stop), ("gate", self.gate))
            if setting is not None and setting.metric not in known
        ]


USUAL_BOUND = 16.0  # of an update's entries


class SecureAggregation(Frozen):
    """Updates leave masked, and the server learns only their weighted sum
    (common/secagg/participant.py).

    A site sends no entry that exceeds the bound, and the ring's precision is the bound's
    (common/secagg/fixed_point.py).
    """

    threshold: Count | None = Field(
        default=None,
        description="Number of sites that must answer for a sum to open; floor(2 n / 3) + 1 of n "
        "sites if absent.",
    )
    max_colluding_sites: Annotated[int, Field(ge=0, le=126, strict=True)] = Field(
        default=0,
        description="Number of sites that may collude with the server without seeing more than "
        "the sum; 2 threshold must exceed n + max_colluding_sites.",
    )
    bound: Bound = Field(
        default=USUAL_BOUND,
        description="Largest absolute entry of an update; it also sets the precision of the "
        "fixed-point ring.",
    )
