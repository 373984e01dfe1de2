"""What one round of a contract does: computed once for a request, then handed on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from silotune.common.contract.aggregation import Aggregation
from silotune.common.contract.training import Phase

TensorGroup = Literal["head", "adapter", "A"]
TensorGroups = frozenset[TensorGroup]


@dataclass(frozen=True)
class RoundPlan:
    """One round of the plan.

    "head" is the head, "A" LoRA's A; "adapter" is LoRA's B, or all of another adapter.

    Attributes:
        server_round: The round's number, 1-based, over all phases.
        round_in_phase: The same within its phase.
        phase: The phase that it belongs to.
        trains: What a site changes in it.
        stays: What of it is each site's own and does not leave it.
        averaged: Whether its iterate counts in the mean that its phase comes to. Where A moves none
            does: a mean of factors is not the factors of a mean.
    """

    server_round: int
    round_in_phase: int
    phase: Phase
    trains: TensorGroups
    stays: TensorGroups
    averaged: bool

    @property
    def sends(self) -> TensorGroups:
        """What of `trains` leaves a site."""
        return self.trains - self.stays

    @property
    def ends_phase(self) -> bool:
        return self.round_in_phase == self.phase.rounds

    def learning_rate(self, tensor: str) -> float:
        """What a step multiplies a tensor's gradient by."""
        return self.phase.rate(tensor, self.round_in_phase)


def format_groups(groups: Collection[TensorGroup]) -> str:
    """ "head+adapter+A", in this order."""
    return "+".join(group for group in ("head", "adapter", "A") if group in groups)


def groups_in_words(groups: Collection[TensorGroup], *, lora: bool) -> str:
    """ "head and LoRA (B)"; an adapter of another kind is "the adapter"."""
    factors = " and ".join(name for name, g in (("A", "A"), ("B", "adapter")) if g in groups)
    adapter = [f"LoRA ({factors})" if lora else "the adapter"] if factors else []
    return " and ".join([*(["head"] if "head" in groups else []), *adapter])


def round_plan(phases: Sequence[Phase], settings: Aggregation, server_round: int) -> RoundPlan:
    """The plan of a 1-based round. ValueError outside the plan."""
    left = server_round
    for phase in phases if left >= 1 else ():
        if left <= phase.rounds:
            return _of_phase(phase, settings, server_round, left)
        left -= phase.rounds
    total = sum(phase.rounds for phase in phases)
    raise ValueError(f"round {server_round} is not in the plan of {total} rounds")


def kinds_of_round(phases: Sequence[Phase], settings: Aggregation) -> Iterator[RoundPlan]:
    """A plan of each kind: the first two rounds of each phase, for RoLoRA alternates."""
    before = 0
    for phase in phases:
        for place in range(1, min(phase.rounds, 2) + 1):
            yield _of_phase(phase, settings, before + place, place)
        before += phase.rounds


def _of_phase(
    phase: Phase, settings: Aggregation, server_round: int, round_in_phase: int
) -> RoundPlan:
    trains = _trained(phase, settings, round_in_phase)
    stays: set[TensorGroup] = {"adapter"} if settings.method == "fedsa" else set()
    if phase.personal in ("head", "adapter"):
        stays.add(phase.personal)
    late = round_in_phase > phase.rounds * settings.averaging_start
    factors_stay = settings.method in ("ffa", "fedsvd") or not phase.adapts
    return RoundPlan(
        server_round, round_in_phase, phase, trains, trains & stays, late and factors_stay
    )


def _trained(phase: Phase, settings: Aggregation, round_in_phase: int) -> TensorGroups:
    head: set[TensorGroup] = set() if phase.trains == "adapter" else {"head"}
    if not phase.adapts:
        return frozenset(head)
    if settings.method in ("ffa", "fedsvd"):
        return frozenset(head | {"adapter"})
    if settings.method == "rolora":
        return frozenset(head | ({"adapter"} if round_in_phase % 2 else {"A"}))
    return frozenset(head | {"adapter", "A"})
