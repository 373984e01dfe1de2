"""The variants of a comparison: each is a contract of its own, run by the same worker and server
code.

federated-lora      the recipe's contract, also where it trains a head alone
alone               the same plan and epsilon, each site by itself; scored on its own test rows
alone-tuned         the same with learning rates chosen for a site alone
federated-head      DP, frozen encoder, only the head, where the recipe's contract adapts layers
federated-one-hot   DP, regression on the one-hot public bins (tables only)
federated-no-dp     the contract without noise, and without clipping unless the plan asks for it
pooled-no-dp        the same with all rows in one place
plain               a small model of scikit-learn of all rows in one place, without DP
                    (plain_baseline.py); none for language

The others are of every recipe but for alone-tuned, federated-head and federated-one-hot, which are
there if recipe.toml has their phases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import TableInput
from silotune.common.contract.model import OneHotModel
from silotune.common.errors import ErrorCode
from silotune.common.tasks.calibration import Calibration
from silotune.server.rounds.run import RoundRecord
from silotune.simulations.attacks.poisoning import Poison
from silotune.simulations.datasets import split

MAIN = "federated-lora"
PLAIN = "plain"
POOLED = "all sites"
PLAIN_COST = 1.0


@dataclass(frozen=True)
class Variant:
    name: str
    label: str
    private: bool
    cheap: bool
    contracts: tuple[Contract, ...]  # one, or one a site

    @property
    def federated(self) -> bool:
        return len(self.contracts) == 1 and len(self.contracts[0].sites) > 1


def main_of(variants: Sequence[Variant]) -> Variant:
    """The variant that a comparison is about: the contract's own; where that was not asked for the
    first federated one, or else the first that trains one model."""
    for fits in (lambda v: v.name == MAIN, lambda v: v.federated, lambda v: len(v.contracts) == 1):
        for variant in variants:
            if fits(variant):
                return variant
    return variants[0]


@dataclass(frozen=True)
class Job:
    """One run of one contract of a variant. public: the folder with its rows for tests and those to
    calibrate by, if these are not in `data`. keeps_outputs: whether the result has the outputs of
    each test row. optional: where it fails, the others go on."""

    variant: str
    repeat: int
    contract: Contract
    folder: Path
    model_folder: Path | None
    data: Path
    federated: bool
    evaluate_every: int
    insecure_seed: int | None = None
    performance: Performance = field(default_factory=Performance)
    keys: Mapping[str, bytes] = field(default_factory=dict)  # of the roster's sites, if it has any
    poison: Poison | None = None  # goes with federated = False
    optional: bool = False
    public: Path | None = None
    keeps_outputs: bool = False

    def public_files(self, part: str) -> dict[str, Path]:
        """The public rows of each site (simulations/datasets/split.py)."""
        return split.public_files(self.public or self.data, part)

    @property
    def cost(self) -> float:
        """A rough relative cost, for the estimate of the time left; adapter rounds dominate."""
        if self.variant == PLAIN:
            return PLAIN_COST
        return sum(self.cost_of(r) for r in range(1, self.contract.rounds + 1))

    def cost_of(self, round_number: int) -> float:
        """The same for one round."""
        phase = self.contract.round_plan(round_number).phase
        if not phase.adapts:
            return 0.15
        return 0.3 + 1.5 * phase.sampling_rate * len(self.contract.sites)


@dataclass(frozen=True)
class Stopped:
    """Why a run has no model: a code of common/errors.py, and the sentence with the remedy."""

    code: ErrorCode
    why: str

    @property
    def word(self) -> str:
        """For tables."""
        return "diverged" if self.code == ErrorCode.DIVERGED else "failed"


@dataclass(frozen=True)
class JobResult:
    """scores: "" is all public test rows, then each test group -> metric -> value; poison.TRIGGERED
    is the rows with a backdoor's trigger, where there are some. own: where each site's model is its
    own, the same of that model, by site. gpu: its name, where one computed. stopped: None where
    the run ended as planned; otherwise there are no scores, and the rounds until then. outputs:
    what evaluation keeps of each test row, by file, if the job keeps it. calibration: of the
    model's outputs, where there are rows for it. untrained: of a language task the outputs of the
    base model as it is, from the main variant's jobs whose outputs are kept."""

    variant: str
    repeat: int
    sites: tuple[str, ...]
    scores: Mapping[str, Mapping[str, float | None]]
    rounds: tuple[RoundRecord, ...]
    seconds: float
    peak_bytes: int
    pid: int
    own: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    gpu: str = ""
    stopped: Stopped | None = None
    outputs: Sequence[Any] = ()
    calibration: Calibration | None = None
    untrained: Sequence[Any] = ()


def scale_learning_rates(contract: Contract, factor: float) -> Contract:
    """The contract with its learning rates times `factor`."""
    return contract.changed(
        phases=scaled_phases(contract.model_dump(mode="json")["phases"], factor)
    )


def scaled_phases(phases: Sequence[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Phases, as tables, with their learning rates times `factor`."""
    rates = "head_lr", "adapter_lr"
    return [p | {k: p[k] * factor for k in rates if p.get(k)} for p in phases]


def trained(contract: Contract) -> str:
    """What a contract trains, in a word."""
    if contract.adapter:
        return "LoRA"
    return "one-hot" if isinstance(contract.model, OneHotModel) else "head"


def plain_model(contract: Contract) -> str:
    """What the plain baseline of a contract is, in words; "" if there is none."""
    task = contract.task.kind
    if task == "language":
        return ""
    if task == "tokens":
        return "Word-window tagger"
    if isinstance(contract.input, TableInput):
        return "Gradient boosting"
    return f"TF-IDF + {'ridge' if task == 'regression' else 'logistic'} regression"


def alone(contract: Contract) -> tuple[Contract, ...]:
    """The same plan at each site by itself."""
    return tuple(
        contract.changed(
            sites=[{"name": s.name, "epsilon": s.epsilon, "delta": s.delta}],
            quorum=1,
            secure_aggregation=None,
        )
        for s in contract.sites
    )


def pooled(contract: Contract) -> Contract:
    """The same plan where one place holds the rows of all: the divisor grows with them."""
    return contract.changed(
        sites=[{"name": POOLED}],
        quorum=1,
        privacy={"expected_units": contract.privacy.expected_units * len(contract.sites)},
    )


def variants_of(contract: Contract, plans: dict[str, Any]) -> list[Variant]:
    """All variants of a recipe; `plans` holds the phases of the baselines (recipe.toml,
    [variants])."""
    what = trained(contract)
    private = "DP-LoRA" if what == "LoRA" else f"DP {what}"
    variants = [Variant(MAIN, f"Federated {private}", True, False, (contract,))]
    by_itself = {"alone": (f"Alone, {private}, same plan", contract)}
    if "alone-tuned" in plans:
        tuned = contract.changed(phases=plans["alone-tuned"]["phases"])
        by_itself["alone-tuned"] = (f"Alone, {private}, own rates", tuned)
    for name, (label, plan) in by_itself.items():
        variants.append(Variant(name, label, True, False, alone(plan)))
    if "head" in plans:
        head = contract.changed(adapter=None, phases=plans["head"]["phases"])
        variants.append(Variant("federated-head", "Federated DP head", True, True, (head,)))
    if "one-hot" in plans:
        one_hot = Contract.model_validate(
            contract.model_dump(mode="json")
            | plans["one-hot"]
            | {"adapter": None, "model": {"kind": "one-hot"}}
        )
        variants.append(
            Variant("federated-one-hot", "Federated DP one-hot", True, True, (one_hot,))
        )
    # Without noise an adapter may pay that with it does not: [variants.no-dp] may have one of its
    # own.
    changes = dict(plans["no-dp"])
    privacy = {"mode": "none", "adaptive": None} | changes.pop("privacy", {})
    plain = contract.changed(privacy=privacy, secure_aggregation=None, **changes)
    what = f"{trained(plain)} without {'noise' if plain.privacy.clip_only else 'DP'}"
    variants.append(Variant("federated-no-dp", f"Federated {what}", False, False, (plain,)))
    variants.append(Variant("pooled-no-dp", f"Pooled {what}", False, False, (pooled(plain),)))
    if words := plain_model(contract):
        variants.append(Variant(PLAIN, f"{words}, pooled, no DP", False, True, (pooled(plain),)))
    return variants
