"""The contract: the one TOML file a federation runs on. Public, frozen, hashed.

Nothing in a contract is computed from private records: bin edges, labels, sampling rates and
divisors are public constants that the sites agree on before any of them looks at its data.
Unknown keys fail, and every error names file, line, key, value and what is allowed.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from silotune.common import agreement, fields
from silotune.common.architecture import (
    Adapter,
    EncoderModel,
    LanguageModel,
    Lora,
    Model,
    OneHotModel,
)
from silotune.common.fields import (
    Count,
    Delta,
    Epsilon,
    Frozen,
    Name,
    Positive,
    Sha256,
)
from silotune.common.inputs import Input, PairInput, TableInput, TextInput, columns_of
from silotune.common.plan import (
    BY_ONE,
    Aggregation,
    Metric,
    Phase,
    Privacy,
    Released,
    SecureAggregation,
    Target,
)
from silotune.common.problems import MISFITS, contract_error
from silotune.common.task import Language, Ranking, Regression, Task, Tokens

MOST_UNEQUAL = 10  # weights under secure aggregation


class Site(Frozen):
    """public_key: the Ed25519 key (32 bytes, hexadecimal) by which the site signs its receipts, and
    the keys of its masks.

    epsilon, delta: what a run may cost this site's units where that differs from [privacy]. Its
    noise follows (silo-specific privacy), so a site that allows less should have less weight.
    """

    name: Name
    weight: Positive = 1.0
    public_key: Sha256 | None = None
    epsilon: Epsilon | None = None
    delta: Delta | None = None


class Contract(Frozen):
    format: Literal[1]
    name: Name
    task: Task
    input: Input
    model: Model
    adapter: Adapter | None = None
    privacy: Privacy
    phases: tuple[Phase, ...] = Field(min_length=1)
    releases: tuple[Released, ...] = ()
    aggregation: Aggregation = Aggregation()
    secure_aggregation: SecureAggregation | None = None
    quorum: Count
    deadline_seconds: Positive = 600.0
    sites: tuple[Site, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """What must fit together; every misfit is reported, under the key to look at."""
        wrong: list[tuple[str, str]] = []
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            wrong.append(("sites", "a name stands twice in the roster"))
        if self.quorum > len(names):
            wrong.append(
                ("quorum", f"quorum is {self.quorum}, but the roster has {len(names)} sites")
            )
        wrong += self._wrong_with_masks()
        metrics = [released.metric for released in self.releases]
        if len(set(metrics)) != len(metrics):
            wrong.append(("releases", "a metric stands twice"))
        if self.released_share > 0.5:
            wrong.append(("releases", "the shares add up to more than half of the budget"))
        with_adapter = [phase.adapts for phase in self.phases]
        one_hot = isinstance(self.model, OneHotModel)
        if one_hot and self.adapter is not None:
            wrong.append(("adapter", "the one-hot model has no layers for an [adapter]"))
        elif any(with_adapter) != (self.adapter is not None):
            wrong.append(
                ("adapter" if self.adapter else "phases",
                 "an [adapter] and a phase that trains it go together")
            )
        if with_adapter != sorted(with_adapter):
            wrong.append(
                ("phases",
                 "phases that train only the head must come first: they use the frozen features")
            )
        wrong += self._wrong_with_task()
        wrong += self._wrong_with_aggregation()
        if abs(sum(phase.budget for phase in self.phases) - 1) > 1e-9:
            wrong.append(("phases", "the phases' budget shares must add up to 1"))
        if one_hot and not isinstance(self.input, TableInput):
            wrong.append(("input", "the one-hot model needs input.kind = \"table\""))
        if (
            not isinstance(self.input, TableInput)
            and isinstance(self.model, EncoderModel)
            and self.model.standardise is not None
            and not self.model.standardise.sentences
        ):
            wrong.append(("model", "model.standardise needs public sentences for free text"))
        if self.task.label_column in self.columns:
            wrong.append(
                ("task", f"the label column '{self.task.label_column}' is also an input")
            )
        if wrong:
            raise PydanticCustomError(MISFITS, "{wrong}", {"wrong": wrong})
        return self

    def _wrong_with_task(self) -> list[tuple[str, str]]:
        """What the task does not go with."""
        task, wrong = self.task, []
        language = isinstance(task, Language)
        if language != isinstance(self.model, LanguageModel):
            wrong.append(("model", "a task of kind \"language\" and a model of kind "
                          "\"language-model\" go together"))
        for at, phase in enumerate(self.phases):
            if language != (phase.trains == "adapter"):
                wrong.append((
                    "phases", f"phase {at + 1} trains \"{phase.trains}\": a language model's "
                    "phases train \"adapter\", for it has no head, and no others do",
                ))
        if isinstance(task, Ranking) != isinstance(self.input, PairInput) and (
            isinstance(task, Ranking) or (self.input.kind == "pair" and self.input.by == "bi")
        ):
            wrong.append(("input", "a task of kind \"ranking\" needs input.kind = \"pair\", and "
                          "pairs read apart (by = \"bi\") are for ranking"))
        if isinstance(task, Tokens | Language) and not isinstance(self.input, TextInput):
            wrong.append(("input", f"a task of kind \"{task.kind}\" needs input.kind = \"text\""))
        if (
            isinstance(task, Tokens) and isinstance(self.model, EncoderModel)
            and self.model.standardise and self.model.standardise.whiten
        ):
            wrong.append(("model", "model.standardise.whiten is for pooled texts, not for tokens"))
        if isinstance(task, Regression) and any(r.metric == "accuracy" for r in self.releases):
            wrong.append(("releases", "a regression has no accuracy to release"))
        others = self.aggregation.of_other_tasks(task.metrics)
        return wrong + [("aggregation", why) for why in others]

    def _wrong_with_aggregation(self) -> list[tuple[str, str]]:
        """Methods that cannot go together, or not with what else the contract says."""
        settings, wrong = self.aggregation, []
        method, robust, sites = settings.method, settings.robust, len(self.sites)
        if method != "ffa" and not isinstance(self.adapter, Lora):
            wrong.append(f'method = "{method}" is about LoRA\'s two factors, and there is no LoRA')
        if method in ("fedsvd", *BY_ONE) and settings.adaptive:
            wrong.append(f'method = "{method}" turns the factors\' coordinates each round, and '
                         "adaptive keeps a rate for each coordinate")
        if method in BY_ONE and settings.momentum:
            wrong.append(f'method = "{method}" sets the weights anew each round: momentum = 0')
        alone = robust.rule if robust else method if method in BY_ONE else None
        if alone and self.secure_aggregation is not None:
            wrong.append(f'"{alone}" needs each site\'s update by itself, and secure_aggregation '
                         "hides it: take out one of the two")
        if robust and method in BY_ONE:
            wrong.append(f'robust rules are for means of updates, and method = "{method}" is none')
        if robust and self.metrics:
            wrong.append("robust rules are for updates: a released metric, or adaptive clipping, "
                         "would still be a plain mean that one site can carry away")
        if robust and len(set(self.weights().values())) > 1:
            wrong.append("robust rules count every site once: leave out the sites' weights")
        if method == "rolora" and any(p.adapts and p.rounds < 2 for p in self.phases):
            wrong.append('method = "rolora" needs two rounds in a phase, or A is never trained')
        if robust and robust.rule != "norm":
            least = 2 * robust.byzantine + (3 if "krum" in robust.rule else 1)
            if self.quorum < least:
                wrong.append(f'rule = "{robust.rule}" against {robust.byzantine} sites needs '
                             f"{least} updates at least, and quorum is {self.quorum} of {sites}")
        return [("aggregation", why) for why in wrong]

    def _wrong_with_masks(self) -> list[tuple[str, str]]:
        secure, sites = self.secure_aggregation, len(self.sites)
        if secure is None:
            return []
        wrong = []
        keys = [site.public_key for site in self.sites]
        why = agreement.problem_with(sites, self.threshold, secure.colluders)
        if why:
            wrong.append(("secure_aggregation", why))
        if None in keys or len(set(keys)) != sites:
            wrong.append(("sites", "secure_aggregation needs a public_key of each site's own"))
        if self.aggregation.largest_norm is not None:
            wrong.append(("aggregation", "nobody can see a masked update's norm: use "
                          "secure_aggregation.bound instead of aggregation.largest_norm"))
        weights = self.weights().values()
        if max(weights) > MOST_UNEQUAL * min(weights):
            wrong.append((
                "sites", f"with secure_aggregation a weight may be at most {MOST_UNEQUAL} times "
                "another, or the sum is hardly more than the heaviest site's update",
            ))
        if self.quorum < self.threshold:
            wrong.append((
                "quorum", f"quorum is {self.quorum}, but {self.threshold} sites must answer for a "
                "masked sum to open (secure_aggregation.threshold)",
            ))
        return wrong

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
        trained = " and ".join(self.trainings)
        if self.privacy.mode == "none":
            return f"updates of {trained}, AS TRAINED: they can give records away"
        metrics = ", ".join(self.metrics)
        masked = (
            f", masked so that only the sum of at least {self.quorum} sites can be read"
            if self.secure_aggregation else ""
        )
        return (
            f"updates of {trained}, clipped per {self.privacy.unit} and noised"
            + (f", with {metrics}, bounded, noised and paid for" if metrics else "")
            + f"{masked}; the ε spent; a receipt of the ledger; nothing else"
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
        return (secure and secure.threshold) or agreement.default_threshold(sites)

    @property
    def masks(self) -> str:
        """What secure aggregation hides, in words."""
        if self.secure_aggregation is None:
            return "none: the server sees each site's update by itself"
        colluders = self.secure_aggregation.colluders
        if self.privacy.mode == "none":
            return (
                "without differential privacy they hide nothing from a server that chooses who "
                "survives: sums of equal updates can be subtracted"
            )
        helped = f", also with the help of {colluders} of them" if colluders else ""
        return (
            f"the server sees sums of at least {self.quorum} of {len(self.sites)} sites{helped}; "
            f"{self.threshold} open one"
        )

    def terms(self, run: str, first: int, attempt: int) -> agreement.Terms:
        """What an agreement on keys is for that serves the rounds from `first` on."""
        assert self.secure_aggregation is not None
        return agreement.Terms(
            contract=self.hash, roster={s.name: s.public_key or "" for s in self.sites}, run=run,
            attempt=attempt, first=first,
            rounds=min(agreement.MOST_ROUNDS, self.rounds - first + 1), threshold=self.threshold,
            colluders=self.secure_aggregation.colluders, fewest=self.quorum,
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

    def phase_of(self, round_number: int) -> Phase:
        """The phase of a 1-based round; ValueError outside the plan."""
        if round_number >= 1:
            last = 0
            for phase in self.phases:
                last += phase.rounds
                if round_number <= last:
                    return phase
        raise ValueError(f"round {round_number} is not in the plan of {self.rounds} rounds")

    def place_in_phase(self, round_number: int) -> int:
        """The 1-based place of a round within its phase."""
        for phase in self.phases:
            if round_number <= phase.rounds:
                return round_number
            round_number -= phase.rounds
        raise ValueError(f"the plan has {self.rounds} rounds")

    def trains_at(self, phase: Phase, place: int) -> str:
        """What the round at a 1-based place of a phase trains: "head", "adapter" (LoRA's B, or all
        of another adapter) and "A" (LoRA's A), joined by "+"."""
        method = self.aggregation.method
        if not phase.adapts or method in ("ffa", "fedsvd"):
            return phase.trains
        if method == "rolora":
            return phase.trains if place % 2 else phase.trains.replace("adapter", "A")
        return f"{phase.trains}+A"

    def trains_in(self, round_number: int) -> str:
        """The same of a 1-based round; ValueError outside the plan."""
        return self.trains_at(self.phase_of(round_number), self.place_in_phase(round_number))

    @property
    def trainings(self) -> tuple[str, ...]:
        """All that is trained together in some round of the plan."""
        return tuple(dict.fromkeys(
            self.trains_at(phase, place)
            for phase in self.phases for place in range(1, min(phase.rounds, 2) + 1)
        ))

    def weights(self) -> dict[str, float]:
        return {site.name: site.weight for site in self.sites}

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
    return parse(fields.read_text(path, "Contract"), path.name)


def parse(text: str, source: str = "contract") -> Contract:
    """Validate contract text, TOML or (when `source` ends in .json) the canonical JSON of a run."""
    return fields.parse(text, source, Contract)
