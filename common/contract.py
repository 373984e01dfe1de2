"""The contract: the one TOML file a federation runs on. Public, frozen, hashed.

Nothing in a contract is computed from private records: bin edges, labels, sampling rates and
divisors are public constants that the sites agree on before any of them looks at its data.
Unknown keys fail, and every error names file, line, key, value and what is allowed.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from silotune.common.errors import UsageError
from silotune.common.problems import MISFITS, contract_error, key_lines

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Rate = Annotated[float, Field(gt=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _pairs(values: Any) -> Any:
    """A TOML table as ordered pairs: the order numbers the choices, so it must not be lost."""
    return tuple(values.items()) if isinstance(values, dict) else values


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Label(Frozen):
    """One public class: its name and the raw values in the label column that mean it."""

    name: Name
    values: tuple[str, ...] = Field(min_length=1)


class Task(Frozen):
    kind: Literal["classification"] = "classification"
    label_column: str
    labels: tuple[Label, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [label.name for label in self.labels]
        values = [value for label in self.labels for value in label.values]
        for what, found in (("name", names), ("value", values)):
            twice = sorted({x for x in found if found.count(x) > 1})
            if twice:
                raise ValueError(f"label {what} {twice[0]!r} stands twice")
        return self


class NumberColumn(Frozen):
    """A number told in words by public bin edges.

    A value v gets words[i] where i is the number of edges that are <= v; so len(words) must be
    len(edges) + 1. Values below `lowest` count as missing (a cholesterol of 0, say).
    """

    kind: Literal["number"] = "number"
    name: str
    phrase: str
    edges: tuple[Number, ...] = Field(min_length=1)
    words: tuple[str, ...]
    lowest: Number | None = None

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if len(self.words) != len(self.edges) + 1:
            raise ValueError(
                f"column {self.name!r} has {len(self.edges)} edges and therefore needs "
                f"{len(self.edges) + 1} words, got {len(self.words)}"
            )
        if any(b <= a for a, b in pairwise(self.edges)):
            raise ValueError(f"the edges of column {self.name!r} must increase")
        return self

    @property
    def choices(self) -> tuple[str, ...]:
        return self.words


class CategoryColumn(Frozen):
    """A category: raw value -> the words that stand for it, in an order that the hash covers."""

    kind: Literal["category"] = "category"
    name: str
    phrase: str
    values: Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs)] = Field(min_length=2)

    @property
    def raw_values(self) -> tuple[str, ...]:
        return tuple(raw for raw, _ in self.values)

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(words for _, words in self.values)


Column = Annotated[NumberColumn | CategoryColumn, Field(discriminator="kind")]


class TableInput(Frozen):
    """Rows of a table. `missing` is the word for an absent value; "" leaves the column out."""

    kind: Literal["table"] = "table"
    columns: tuple[Column, ...] = Field(min_length=1)
    missing: str = "unknown"

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [column.name for column in self.columns]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"column {name!r} stands twice")
        return self


class TextInput(Frozen):
    """Free text in one column."""

    kind: Literal["text"] = "text"
    column: str


class Standardise(Frozen):
    """A public linear map after pooling: centre and whiten by synthetic or listed public text.

    For a table the text is `records` rows drawn uniformly from the schema's own choices; for
    free text it is `sentences`. Neither has anything to do with a record, so it is free of charge.
    """

    seed: int = 0
    records: Count = 400
    shrinkage: Rate = 0.2
    whiten: bool = True
    norm: Positive = 2.0
    sentences: tuple[str, ...] = ()


class EncoderModel(Frozen):
    """A BERT-type encoder, mean-pooled, with a linear head."""

    kind: Literal["encoder"] = "encoder"
    name: Name
    sha256: Sha256
    max_tokens: Annotated[int, Field(ge=8, le=512, strict=True)]
    normalise: bool = True
    standardise: Standardise | None = None


class OneHotModel(Frozen):
    """Columns one-hot by the contract's public bins, with a linear head: the bank's baseline.

    Each row is scaled to the L2 norm `norm`, so that the clip norm fits any number of columns.
    """

    kind: Literal["one-hot"] = "one-hot"
    norm: Positive = 2.0


Model = Annotated[EncoderModel | OneHotModel, Field(discriminator="kind")]


class Lora(Frozen):
    """LoRA on the top `layers` layers, A orthonormal and frozen (FFA-LoRA, arXiv 2403.12313)."""

    rank: Count = 8
    alpha: Positive = 32.0
    layers: Count = 2
    targets: tuple[str, ...] = Field(min_length=1)
    seed: int = 0


class Privacy(Frozen):
    """The guarantee every site gives, whatever the server and the other sites do.

    (epsilon, delta)-DP of all the run's replies of one site together; adjacency: add or remove one
    `unit`. A site trains with per-unit gradients clipped to `clip_norm`, summed, plus Gaussian
    noise, divided by the public constant `expected_records` times the sampling rate. mode "none"
    trains without clipping or noise, for comparison; a site refuses it unless its owner allows it.
    """

    mode: Literal["dp", "none"] = "dp"
    unit: Literal["record"] = "record"
    epsilon: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False, strict=True)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=0.01, strict=True)] = 1e-4
    clip_norm: Positive = 1.0
    expected_records: Positive


class Phase(Frozen):
    """Consecutive rounds that train the same tensors.

    Each round a site does `local_steps` steps; each takes every record with probability
    `sampling_rate`. `budget` is this phase's share of the privacy budget (client/accounting.py).
    A phase ends at the mean of its later iterates (`aggregation.average_from`); the next starts
    there, at rest.
    """

    trains: Literal["head", "head+adapter"]
    rounds: Count
    sampling_rate: Rate
    local_steps: Count = 1
    budget: Rate = 1.0
    head_rate: Positive
    adapter_rate: Positive | None = None

    @model_validator(mode="after")
    def _rates(self) -> Self:
        if (self.trains == "head+adapter") != (self.adapter_rate is not None):
            raise ValueError("adapter_rate goes with trains = \"head+adapter\", and only with it")
        return self


class Aggregation(Frozen):
    """Mean of the sites' updates with public weights, then the server's heavy ball.

    A phase's result is the mean of its iterates from the fraction `average_from` on. Both act on
    noised sums only, so they cost no privacy (post-processing).
    """

    method: Literal["ffa"] = "ffa"
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.9
    average_from: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.5


class Site(Frozen):
    name: Name
    weight: Positive = 1.0


class Contract(Frozen):
    format: Literal[1]
    name: Name
    task: Task
    input: Annotated[TableInput | TextInput, Field(discriminator="kind")]
    model: Model
    adapter: Lora | None = None
    privacy: Privacy
    phases: tuple[Phase, ...] = Field(min_length=1)
    aggregation: Aggregation = Aggregation()
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
        with_adapter = [phase.trains == "head+adapter" for phase in self.phases]
        one_hot = isinstance(self.model, OneHotModel)
        if one_hot and self.adapter is not None:
            wrong.append(("adapter", "the one-hot model has no layers for an [adapter]"))
        elif any(with_adapter) != (self.adapter is not None):
            wrong.append(
                ("adapter" if self.adapter else "phases",
                 "an [adapter] and a phase that trains \"head+adapter\" go together")
            )
        if with_adapter != sorted(with_adapter):
            wrong.append(
                ("phases",
                 "phases that train only the head must come first: they use the frozen features")
            )
        if abs(sum(phase.budget for phase in self.phases) - 1) > 1e-9:
            wrong.append(("phases", "the phases' budget shares must add up to 1"))
        if one_hot and isinstance(self.input, TextInput):
            wrong.append(("input", "the one-hot model needs input.kind = \"table\""))
        if (
            isinstance(self.input, TextInput)
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

    @property
    def columns(self) -> tuple[str, ...]:
        """The input columns of the records."""
        if isinstance(self.input, TextInput):
            return (self.input.column,)
        return tuple(column.name for column in self.input.columns)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical form: JSON, keys sorted, defaults written out."""
        data = self.model_dump(mode="json")
        return hashlib.sha256(
            json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        ).hexdigest()

    @property
    def rounds(self) -> int:
        return sum(phase.rounds for phase in self.phases)

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.task.labels)

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
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"Contract {path} cannot be read: {error.strerror}.", code="E102"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"Contract {path} is not UTF-8 text.", code="E102") from None
    return parse(text, path.name)


def parse(text: str, source: str = "contract") -> Contract:
    """Validate contract text, TOML or (when `source` ends in .json) the canonical JSON of a run."""
    kind = "JSON" if source.endswith(".json") else "TOML"
    try:
        data = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error).splitlines()[0] if str(error) else "nested too deeply"
        raise UsageError(f"{source} is not valid {kind}: {why}.", code="E102") from None
    try:
        return Contract.model_validate(data)
    except ValidationError as error:
        raise contract_error(error, source, Contract, key_lines(text)) from None
