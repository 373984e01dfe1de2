"""The contract: the one TOML file a federation runs on. Public, frozen, hashed.

Nothing in a contract is computed from private records: bin edges, labels, sampling rates and
divisors are public constants that the sites agree on before any of them looks at its data.
Unknown keys fail, and every error names file, line, key, value and what is allowed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from silotune.common.config import types
from silotune.common.config.diagnostics import CONSTRAINT_VIOLATIONS, contract_error
from silotune.common.config.types import (
    Count,
    Delta,
    Epsilon,
    Frozen,
    Name,
    Positive,
    Sha256,
)
from silotune.common.contract.adapter import Adapter, Lora
from silotune.common.contract.aggregation import (
    BY_ONE,
    USUAL_BOUND,
    Aggregation,
    SecureAggregation,
)
from silotune.common.contract.head_facts import rule_warnings
from silotune.common.contract.inputs import Input, PairInput, columns_of
from silotune.common.contract.model import Model
from silotune.common.contract.privacy import (
    DeltaSize,
    Metric,
    Privacy,
    Released,
    Target,
    delta_for,
    size_of_delta,
)
from silotune.common.contract.schedule import (
    RoundPlan,
    TensorGroups,
    groups_in_words,
    kinds_of_round,
    round_plan,
)
from silotune.common.contract.task import Task
from silotune.common.contract.training import Phase
from silotune.common.contract.validation import constraint_violations
from silotune.common.secagg import key_agreement


class Site(Frozen):
    """A site of the roster. Where its ε or δ differs from [privacy], its noise follows
    (silo-specific privacy), so a site that allows less should have less weight. With a `rank` of
    its own it trains the first so many rows of A and columns of B (zero-padding)."""

    name: Name = Field(description="Name of the site, unique within the contract.")
    weight: Positive = Field(
        default=1.0,
        description="Public weight of the site's update in the mean, relative to the other sites' "
        "weights.",
    )
    public_key: Sha256 | None = Field(
        default=None,
        description="Ed25519 public key (32 bytes, hexadecimal) that verifies the site's receipts "
        "and mask keys.",
    )
    epsilon: Epsilon | None = Field(
        default=None,
        description="ε that one run may cost each unit of this site, where it differs from "
        "privacy.epsilon.",
    )
    delta: Delta | None = Field(
        default=None, description="δ of this site's guarantee, where it differs from privacy.delta."
    )
    rank: Count | None = Field(
        default=None,
        description="LoRA rank that this site trains, at most adapter.rank; the remaining rows "
        "and columns stay unchanged (arXiv 2401.06432).",
    )


class Contract(Frozen):
    """What a federation runs on, validated: one value for each section of the contract's file.

    Read one by `load`, draft one by `draft`; `changed` gives a copy with other sections. Two
    contracts are the same if their `hash` is.
    """

    format: Literal[1] = Field(
        description="Version of the contract's file format; 1 is the only one."
    )
    name: Name = Field(description="Name of the contract, shown in reports and part of its hash.")
    task: Task = Field(
        description="The learning task, its target column and its public labels or bounds."
    )
    input: Input = Field(
        description="The input columns and the public schema by which they are read."
    )
    model: Model = Field(description="The frozen base model and how an input becomes features.")
    adapter: Adapter | None = Field(
        default=None,
        description="The parameter-efficient adapter that is trained in the base model's layers; "
        "without it only the head is trained.",
    )
    privacy: Privacy = Field(
        description="The differential privacy guarantee that every site gives, and how gradients "
        "are clipped."
    )
    phases: tuple[Phase, ...] = Field(
        min_length=1,
        description="The training phases, one after the other; each trains the same tensors in "
        "all its rounds.",
    )
    releases: tuple[Released, ...] = Field(
        default=(),
        description="Training metrics that leave a site with its update, bounded, noised and paid "
        "for.",
    )
    aggregation: Aggregation = Field(
        default=Aggregation(),
        description="How the server combines the sites' updates and applies the mean.",
    )
    secure_aggregation: SecureAggregation | None = Field(
        default=None,
        description="Secure aggregation of the updates; without it the server sees each site's "
        "update.",
    )
    quorum: Count = Field(
        description="Number of sites that must answer for a round to count, at most the number of "
        "sites."
    )
    deadline_seconds: Positive = Field(
        default=600.0,
        description="Seconds that the server waits for the sites' answers in one round.",
    )
    sites: tuple[Site, ...] = Field(
        min_length=1, description="The sites that take part: the roster."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = constraint_violations(self)
        if wrong:
            raise PydanticCustomError(CONSTRAINT_VIOLATIONS, "{wrong}", {"wrong": wrong})
        return self

    @classmethod
    def load(cls, path: str | Path) -> Contract:
        """Read and validate a contract's file.

        Args:
            path: A TOML file, or the contract.json of a run.

        Returns:
            The contract.

        Raises:
            UsageError: If the file cannot be read; as a ContractError if it is no valid contract,
                with every problem, its line, and what is allowed.
        """
        return load(Path(path))

    @classmethod
    def draft(
        cls,
        header: Iterable[str],
        *,
        task: str,
        label: str,
        sites: Sequence[str],
        records: int,
        name: str = "draft",
        labels: Sequence[object] = (),
        columns: Mapping[str, Sequence[object]] | None = None,
        text: str | None = None,
        pair: tuple[str, str] | None = None,
        query: str | None = None,
        others: Sequence[object] = (),
        bounds: tuple[float, float] | None = None,
        log: bool = False,
        entity: Sequence[str] = (),
        max_records_per_entity: int = 10,
        epsilon: float = 8.0,
        delta: float | None = None,
    ) -> Contract:
        """A contract from a table's header and its owner's answers, as `silotune contract new`.

        No table value is copied into it: labels, bin edges and numbers of records are what
        the field knows, since whoever gets the contract may know all that it says. One of
        `columns`, `text` and `pair` says what a model reads.

        Args:
            header: The names of the table's columns, of a DataFrame `df.columns`.
            task: classification, multi-label, tokens, regression, ranking or language.
            label: The column that holds what is to be learnt.
            sites: The names of the sites.
            records: How many records, or entities, a site is expected to have.
            name: Of the contract.
            labels: The values of the label column, or texts "name=value"; of a ranking those that
                say that a pair belongs together.
            columns: The columns of a table that the model reads: for a number its bin edges, for
                a category the values it may have.
            text: The column of text that the model reads.
            pair: The two columns of text of a ranking.
            query: Of a ranking, the column whose equal values are ranked together.
            others: Of a ranking, the values that say that a pair does not belong together.
            bounds: Of a regression, the lowest and the highest number.
            log: Of a regression, whether its logarithm is learnt.
            entity: The columns that identify a person with several records.
            max_records_per_entity: The most records of an entity that a step takes.
            epsilon: The ε of a run at each site.
            delta: By default the largest power of ten that is at most 1e-4 and 1 / (10 records).

        Returns:
            A valid contract, without secure aggregation, which needs the sites' keys:
            `silotune server contract` adds it from the roster, `silotune.simulate` with keys of its
            own.

        Raises:
            UsageError: If answers are missing, or do not go together.
            DataError: If the header lacks a column that the answers name; a note names the nearest.
        """
        from silotune.common.contract import drafting  # which needs contracts

        given = {key: value for key, value in locals().items() if key not in ("cls", "drafting")}
        return drafting.contract_of(**given)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a record's input is made of."""
        return columns_of(self.input)

    @property
    def reads_apart(self) -> bool:
        """Whether a record's two texts go through the layers each by itself."""
        return isinstance(self.input, PairInput) and self.input.by == "bi"

    @property
    def leaves(self) -> str:
        """What leaves a site under this contract, in words."""
        between = " or " if self.aggregation.method == "rolora" else ", then "
        trained = between.join(
            groups_in_words(groups, lora=isinstance(self.adapter, Lora)) for groups in self.sendings
        )
        secure = self.secure_aggregation
        also = (
            "a receipt of the ledger; names of site and run, numbers of round and attempt, hashes "
            "of contract and request; signatures; "
            + ("public keys and key shares of secure aggregation; " if secure else "")
            + "after an error its code and a random incident number"
        )
        if self.privacy.mode == "none":
            return f"updates of {trained}, without noise: they can reveal records; {also}"
        metrics = ", ".join(self.metrics)
        masked = (
            f", masked so that only the sum of at least {self.quorum} sites can be read"
            if self.secure_aggregation
            else ""
        )
        return (
            f"updates of {trained}, clipped per {self.privacy.unit} and noised"
            + (f", with {metrics}, bounded, noised and charged to ε" if metrics else "")
            + f"{masked}; the ε spent; {also}"
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The figures that leave with each update."""
        adaptive: tuple[Metric, ...] = ("unclipped",) if self.privacy.adaptive else ()
        return (*(released.metric for released in self.releases), *adaptive)

    @property
    def metric_ranges(self) -> dict[Metric, tuple[float, float]]:
        """What a site's figure counts as at least and at most. Noise has no ends, but a share
        beyond [0, 1] says no more than its end, and a sum a hundred times one unit's is noise."""
        wide = {r.metric: 100.0 * r.bound for r in self.releases}
        return {m: (-wide[m], wide[m]) if m in wide else (0.0, 1.0) for m in self.metrics}

    @property
    def threshold(self) -> int:
        """How many sites must answer for a masked sum to open."""
        secure, sites = self.secure_aggregation, len(self.sites)
        return (secure and secure.threshold) or key_agreement.default_threshold(sites)

    @property
    def can_be_masked(self) -> bool:
        """Whether there are sites enough for secure aggregation, and no rule that needs each site's
        update by itself."""
        needs_single = self.aggregation.robust or self.aggregation.method in BY_ONE
        return len(self.sites) >= key_agreement.LEAST_SITES and not needs_single

    @property
    def warnings(self) -> list[str]:
        """What is allowed, and what the sites should know before they agree to it, in sentences."""
        return [
            *self.delta_warnings,
            *self.site_warnings,
            *self.masking_warnings,
            *rule_warnings(self),
        ]

    @property
    def site_warnings(self) -> tuple[str, ...]:
        """Of a contract with nobody to train with."""
        if len(self.sites) > 1:
            return ()
        return (
            "there is one site: it refuses this contract unless its site.toml has "
            "permits.min_sites = 1. Name two sites at least.",
        )

    @property
    def masking_warnings(self) -> tuple[str, ...]:
        """Of missing secure aggregation, and of sites that must not be missing."""
        sites, secure = len(self.sites), self.secure_aggregation
        all_needed = f"all {sites} sites must answer in every round: one missing site stops the run"
        if secure is None and self.can_be_masked:
            drafted = key_agreement.default_threshold(sites)
            return (
                "there is no [secure_aggregation]: sites refuse this contract unless their "
                "site.toml has permits.masked_only = false. `silotune server contract` adds it"
                + (f"; then {all_needed}." if drafted == sites else "."),
            )
        if secure is None or self.quorum < sites:
            return ()
        fewer = sites - 1
        if key_agreement.problem_with(sites, fewer, secure.max_colluding_sites):
            return (f"{all_needed}.",)
        return (
            f"{all_needed}. With quorum = {fewer} and secure_aggregation.threshold = {fewer} "
            f"one may be missing; the server then sees sums of {fewer} sites.",
        )

    @property
    def masks(self) -> str:
        """What secure aggregation hides, in words."""
        if self.secure_aggregation is None:
            return "none: the server sees each site's update by itself"
        max_colluding_sites = self.secure_aggregation.max_colluding_sites
        if self.privacy.mode == "none":
            return (
                "without differential privacy they hide nothing from a server that chooses who "
                "survives: sums of equal updates can be subtracted"
            )
        helped = (
            f", also with the help of {max_colluding_sites} of them" if max_colluding_sites else ""
        )
        return (
            f"the server sees sums of at least {self.quorum} of {len(self.sites)} sites{helped}; "
            f"{self.threshold} open one"
        )

    def terms(self, run: str, first: int, attempt: int) -> key_agreement.Terms:
        """What an agreement on keys is for that serves the rounds from `first` on."""
        assert self.secure_aggregation is not None
        return key_agreement.Terms(
            contract=self.hash,
            roster={s.name: s.public_key or "" for s in self.sites},
            run=run,
            attempt=attempt,
            first=first,
            rounds=min(key_agreement.MOST_ROUNDS, self.rounds - first + 1),
            threshold=self.threshold,
            max_colluding_sites=self.secure_aggregation.max_colluding_sites,
            min_survivors=self.quorum,
        )

    def weight_share(self, name: str) -> float:
        """A site's part of the weights of all."""
        weights = self.weights()
        return weights[name] / sum(weights.values())

    @property
    def released_share(self) -> float:
        """The part of each step's privacy budget that goes into released metrics."""
        adaptive = self.privacy.adaptive
        return sum(r.share for r in self.releases) + (adaptive.share if adaptive else 0)

    def target_of(self, name: str) -> Target:
        """What this run may cost the units of one site: its own in the roster, or [privacy]'s."""
        target = Target(self.privacy.epsilon, self.privacy.delta)
        for site in self.sites:
            if site.name == name:
                target = Target(site.epsilon or target.epsilon, site.delta or target.delta)
        return target

    @property
    def own_targets(self) -> str:
        """The sites at which a run may cost something else than [privacy] says, in words; empty if
        there are none."""
        usual = Target(self.privacy.epsilon, self.privacy.delta)
        return "; ".join(
            f"{site.name} ε ≤ {target.epsilon:g}, δ = {target.delta:g}"
            for site in self.sites
            if (target := self.target_of(site.name)) != usual
        )

    @property
    def largest_target(self) -> Target:
        """What holds at every site: the largest epsilon and the largest delta of any."""
        epsilons, deltas = zip(*(self.target_of(site.name) for site in self.sites), strict=True)
        return Target(max(epsilons), max(deltas))

    @property
    def largest_delta(self) -> float:
        """The largest delta that a run has at any site."""
        return self.largest_target.delta

    @property
    def size_of_delta(self) -> DeltaSize:
        """How that compares with the number of units that a site is expected to have."""
        if self.privacy.mode == "none":
            return "small"
        return size_of_delta(self.largest_delta, self.privacy.expected_units)

    @property
    def delta_warnings(self) -> list[str]:
        """Of a δ that weakens what the guarantee means."""
        p = self.privacy
        if self.size_of_delta == "small":
            return []
        return [
            f"privacy.delta = {self.largest_delta:g} times expected_units = "
            f"{p.expected_units:g} is {self.largest_delta * p.expected_units:.3g}, more than "
            f"0.1: that many whole {'records' if p.unit == 'record' else 'entities'} of a site "
            f"could be published within the guarantee. Set delta to "
            f"{delta_for(p.expected_units):g}."
        ]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical form: JSON, keys sorted, defaults written out, None left out."""
        data = self.model_dump(mode="json", exclude_none=True)
        return hashlib.sha256(
            json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        ).hexdigest()

    @property
    def rounds(self) -> int:
        return sum(phase.rounds for phase in self.phases)

    def round_plan(self, server_round: int) -> RoundPlan:
        """What a 1-based round does. ValueError outside the plan."""
        return round_plan(self.phases, self.aggregation, server_round)

    def kinds_of_round(self) -> Iterator[RoundPlan]:
        """A plan of each kind that the contract has."""
        return kinds_of_round(self.phases, self.aggregation)

    @property
    def trainings(self) -> tuple[TensorGroups, ...]:
        """All that is trained together in some round of the plan."""
        return tuple(dict.fromkeys(plan.trains for plan in self.kinds_of_round()))

    @property
    def sendings(self) -> tuple[TensorGroups, ...]:
        """All that leaves a site together in some round of the plan."""
        return tuple(dict.fromkeys(plan.sends for plan in self.kinds_of_round()))

    @property
    def personal(self) -> bool:
        """Whether a site's model is another than the one that is released."""
        return self.aggregation.method == "fedsa" or any(phase.personal for phase in self.phases)

    @property
    def keeps(self) -> bool:
        """Whether a round leaves something at its site for the next
        (client/training/local_state.py)."""
        return self.personal or any(phase.drift_correction for phase in self.phases)

    def at(self, name: str) -> Contract:
        """The contract as a site's own model has it: LoRA of the site's rank, scaled alike. It is
        for building that model; its hash is no contract's."""
        rank = next((site.rank for site in self.sites if site.name == name), None)
        spec = self.adapter
        if rank is None or not isinstance(spec, Lora):
            return self
        by = rank / spec.rank
        alpha = spec.alpha * (by**0.5 if spec.kind == "rslora" else by)
        return self.model_copy(
            update={"adapter": spec.model_copy(update={"rank": rank, "alpha": alpha})}
        )

    def weights(self) -> dict[str, float]:
        return {site.name: site.weight for site in self.sites}

    def with_masks(self, bound: float | None = None) -> Contract:
        """A contract whose roster has keys with secure aggregation: at its own threshold or else at
        the usual one, and with a quorum of at least that.

        Args:
            bound: Of an update's entries; if it is None the contract's own, or else `update_bound`.

        Raises:
            ContractError: if the result is no valid contract.
        """
        secure = self.secure_aggregation
        threshold = (secure and secure.threshold) or key_agreement.default_threshold(
            len(self.sites)
        )
        bound = bound or (secure.bound if secure else self.update_bound)
        return self.changed(
            quorum=max(self.quorum, threshold),
            secure_aggregation={"threshold": threshold, "bound": bound},
        )

    @property
    def update_bound(self) -> float:
        """A bound of an update's entries that fits the phases' rates: a power of two, at least the
        usual one and twice what a round's clipped gradients can add up to, so that noise up to as
        much has room."""
        steps = [
            max(phase.head_lr or 0.0, phase.adapter_lr or 0.0) * phase.local_steps
            for phase in self.phases
            if phase.adam is None  # whose steps do not grow with the clip norm
        ]
        largest = 2 * max(steps, default=0.0) * self.privacy.largest_clip_norm
        return max(USUAL_BOUND, 2.0 ** math.ceil(math.log2(max(largest, 1.0))))

    def changed(self, **sections: Any) -> Contract:
        """A validated copy with top-level sections replaced (dicts are merged into a section).

        ContractError when the result is no valid contract.
        """
        data = self.model_dump(mode="json")
        for key, value in sections.items():
            merge = isinstance(value, dict) and isinstance(data.get(key), dict)
            data[key] = {**data[key], **value} if merge else value
        try:
            return Contract.model_validate(data)
        except ValidationError as error:
            raise contract_error(error, f"{self.name} as changed", Contract) from None


def load(path: Path) -> Contract:
    """Read and validate a contract; ContractError lists every problem with its line."""
    return parse(types.read_text(path, "Contract"), str(path))


def parse(text: str, source: str = "contract") -> Contract:
    """Validate contract text, TOML or (when `source` ends in .json) the canonical JSON of a run."""
    return types.parse(text, source, Contract)
