"""What a contract's plan costs each site in privacy, before anything is computed on records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from silotune.client.privacy import accountant
from silotune.client.privacy.accountant import Mechanism
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import epsilon_text
from silotune.common.errors import UsageError, did_you_mean

__all__ = ["PrivacyPlan", "plan"]


@dataclass(frozen=True)
class PrivacyPlan:
    """The noise of a contract's plan and what it costs.

    Attributes:
        noise_multiplier: One for each phase: the standard deviation of a step's noise in clip
            norms. Where a phase's noise decays, that of its first round. 0 without privacy.
        noise_by_round: The same for each round.
        sampling_rate: One for each phase: the probability with which a step takes a unit.
        steps: One for each phase: how many noised steps a site does.
        epsilon_by_round: What all rounds up to each one cost together, as a worker reports it after
            that round; infinite without privacy.
        epsilon: What the whole plan costs.
        delta: The δ that goes with every ε here.
        unit: What is protected: one record, or one entity with all its records.
        accountant: How the cost is composed.
        contract: The name of the contract.
        site: Whose plan this is; None for the limits of [privacy].
    """

    noise_multiplier: tuple[float, ...]
    noise_by_round: tuple[float, ...]
    sampling_rate: tuple[float, ...]
    steps: tuple[int, ...]
    epsilon_by_round: tuple[float, ...]
    epsilon: float
    delta: float
    unit: str
    accountant: str
    contract: str
    site: str | None = None

    @property
    def guarantee(self) -> str:
        """The guarantee in one sentence."""
        if not math.isfinite(self.epsilon):
            return "no differential privacy"
        return (
            f"ε ≤ {epsilon_text(self.epsilon)}, δ = {self.delta:g} per {self.unit} and site "
            f"({self.accountant}; add or remove one {self.unit})"
        )

    def __repr__(self) -> str:
        whose = f" at {self.site}" if self.site else ""
        lines = [f"PrivacyPlan of {self.contract}{whose}: {self.guarantee}"]
        lines += [
            f"  phase {phase}: noise multiplier {noise:.3f}, {steps} steps, sampling rate {rate:g}"
            for phase, noise, steps, rate in self._phases()
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(
            f"<th>{title}</th>" for title in ("phase", "noise multiplier", "steps", "sampling rate")
        )
        rows = "".join(
            f"<tr><td>{phase}</td><td>{noise:.3f}</td><td>{steps}</td><td>{rate:g}</td></tr>"
            for phase, noise, steps, rate in self._phases()
        )
        whose = f" at {escape(self.site)}" if self.site else ""
        return (
            f"<p>{escape(self.contract)}{whose}: {escape(self.guarantee)}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )

    def _phases(self) -> list[tuple[int, float, int, float]]:
        columns = zip(self.noise_multiplier, self.steps, self.sampling_rate, strict=True)
        return [(number, *column) for number, column in enumerate(columns, 1)]


def plan(contract: Contract, site: str | None = None) -> PrivacyPlan:
    """The noise that a contract's plan needs, and the ε after each round.

    The plan is the same that each site's worker computes, by exact
    composition. No record has a part in it.

    Args:
        contract: The contract.
        site: A site of the contract with an ε or δ of its own; without it the limits of [privacy].

    Returns:
        Noise, steps and cost of the plan.

    Raises:
        UsageError: If `contract` is no contract, if it has no such site, or if its ε cannot be
            reached with any noise that is accounted for.

    Example:
        >>> plan = silotune.privacy.plan(silotune.Contract.load("heart.toml"))
        >>> plan.noise_multiplier, plan.epsilon
    """
    if not isinstance(contract, Contract):
        raise UsageError(
            f"contract is a {type(contract).__name__}, and must be a Contract: read one with "
            "Contract.load(path)."
        )
    names = [one.name for one in contract.sites]
    if site is not None and site not in names:
        raise UsageError(
            f"site = {site!r} is no site of the contract.{did_you_mean(str(site), names)} "
            f"Known: {', '.join(names)}."
        )
    p = contract.privacy
    delta = contract.target_of(site).delta if site else p.delta
    mechanisms = accountant.plan(contract, contract.target_of(site) if site else None)
    by_round = [
        accountant.mechanism_of(contract, mechanisms, number)
        for number in range(1, contract.rounds + 1)
    ]
    steps, spent = dict[tuple[float, float], int](), list[float]()
    for noise, rate, more in by_round:
        steps[noise, rate] = steps.get((noise, rate), 0) + more
        history = [Mechanism(*same, count) for same, count in steps.items()]
        spent.append(accountant.plan_epsilon(history, delta))
    firsts, first = list[int](), 0
    for phase in contract.phases:
        firsts.append(first)
        first += phase.rounds
    return PrivacyPlan(
        noise_multiplier=tuple(by_round[first].noise_multiplier for first in firsts),
        noise_by_round=tuple(mechanism.noise_multiplier for mechanism in by_round),
        sampling_rate=tuple(phase.sampling_rate for phase in contract.phases),
        steps=tuple(phase.rounds * phase.local_steps for phase in contract.phases),
        epsilon_by_round=tuple(spent),
        epsilon=spent[-1],
        delta=delta,
        unit=p.unit,
        accountant=accountant.EXACT,
        contract=contract.name,
        site=site,
    )
