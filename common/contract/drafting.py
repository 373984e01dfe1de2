"""A contract drafted from a table's header and its owner's answers.

Only the table's header is used. What a contract says of values (labels, bin edges,
bounds, how many records) are the owner's answers: public knowledge of the field, never counted from
records, since whoever gets the contract would learn it without any noise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import resources
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from jinja2 import Environment, StrictUndefined
from pydantic import Field, ValidationError, model_validator

from silotune.common.config.diagnostics import contract_error
from silotune.common.config.types import Count, Delta, Epsilon, Frozen, Name, Number
from silotune.common.contract import contract as contracts
from silotune.common.contract.head_facts import facts_of
from silotune.common.contract.privacy import delta_for
from silotune.common.errors import DataError, ErrorCode, UsageError, did_you_mean
from silotune.common.planning import adapter_rule, head_rule
from silotune.common.planning.adapter_rule import AdapterPlan
from silotune.common.planning.public_sentences import NORM, SENTENCES

ENCODER = ("all-MiniLM-L6-v2", "2c480fd3485a7edef6de859618fa2bfc41ae2b8a5d9aa18307d10e5a1430535d")
Planner = Callable[[contracts.Contract], AdapterPlan | None]
LANGUAGE = (
    "SmolLM2-135M-Instruct",
    "5e681ceb930bb166ff23668c394168699c408f1f540a01e3662b1aecfd14a701",
)


class Column(Frozen):
    """A column and its public bin edges, or the values it may have."""

    name: str
    edges: tuple[Number, ...] = ()
    values: tuple[str, ...] = ()

    @classmethod
    def parse(cls, answer: str) -> Column:
        """From 'age: 40, 50, 60' (numbers are edges) or 'sex: male, female'. UsageError."""
        name, colon, rest = answer.partition(":")
        parts = [part.strip() for part in rest.split(",") if part.strip()]
        if not colon or not parts:
            raise UsageError(
                f"'{answer}' says nothing of a column. Write 'age: 40, 50, 60' for a number with "
                "its bin edges, or 'sex: male, female' for the values it may have."
            )
        try:
            edges = tuple(float(part) for part in parts)
        except ValueError:
            if len(parts) < 2:
                raise UsageError(f"Column '{name}' needs two values at least.") from None
            return cls(name=name.strip(), values=tuple(parts))
        if any(b <= a for a, b in pairwise(edges)):
            raise UsageError(f"The edges of column '{name}' must increase: {rest.strip()}.")
        return cls(name=name.strip(), edges=edges)

    @property
    def words(self) -> list[str]:
        """A number's bins in words."""
        between = [f"{a:g} to {b:g}" for a, b in pairwise(self.edges)]
        return [f"below {self.edges[0]:g}", *between, f"{self.edges[-1]:g} or more"]


class Answers(Frozen):
    """What a draft is made of. labels: the values of the label column, or 'name=value'; of a
    ranking those that say a pair belongs together, and `others` those that do not. pair: its two
    columns of text, query: the column that says whose candidates are ranked together. delta: by
    default the largest power of ten that is at most min(1e-4, 1 / (10 records))."""

    name: Name
    task: Literal["classification", "multi-label", "tokens", "regression", "ranking", "language"]
    label: str
    labels: tuple[str, ...] = ()
    bounds: tuple[Number, Number] | None = None
    log: bool = False
    text: str | None = None
    others: tuple[str, ...] = ()
    pair: tuple[str, str] | None = None
    query: str | None = None
    columns: tuple[Column, ...] = ()
    entity: tuple[str, ...] = ()
    max_records_per_entity: Count = 10
    sites: tuple[Name, ...] = Field(min_length=1)
    records: Annotated[int, Field(ge=1, le=100_000_000)]
    epsilon: Epsilon = 8.0
    delta: Delta | None = None

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if (self.text is not None) + bool(self.columns) + (self.pair is not None) != 1:
            raise ValueError(
                "name the column of text, the two of a pair, or those of a table: one of these"
            )
        of_ranking = (bool(self.others), self.pair is not None, self.query is not None)
        if any(of_ranking) != (self.task == "ranking") or len(set(of_ranking)) > 1:
            raise ValueError("others, pair and query go with a ranking, which needs all three")
        if self.task not in ("regression", "language") and not self.labels:
            raise ValueError(f'a task of kind "{self.task}" needs its labels')
        if (self.task == "regression") != (self.bounds is not None):
            raise ValueError("bounds go with a regression, and only with it")
        if self.task in ("tokens", "language") and self.text is None:
            raise ValueError(f'a task of kind "{self.task}" needs a column of text')
        return self

    @property
    def used(self) -> list[str]:
        """The columns that the contract names."""
        texts = self.pair or ((self.text,) if self.text else ())
        tables = (column.name for column in self.columns)
        query = (self.query,) if self.query else ()
        return [*texts, *tables, *query, self.label, *self.entity]

    @property
    def named_labels(self) -> list[tuple[str, str]]:
        """(name, raw value) of each label."""
        found = []
        for label in self.labels:
            name, equals, value = label.partition("=")
            found.append((name.strip(), (value if equals else name).strip()))
        return found


def draft(answers: Answers, planner: Planner | None = None) -> str:
    """The contract as TOML, with comments that say what to look at. It is a valid one.

    Args:
        answers: What the owner says.
        planner: Given a draft, the plan of its adapter's phase, for which it needs the base model;
            without one, or where it gives None, that phase has default rates.

    Returns:
        The text.
    """
    text = _rendered(answers, None)
    contract = contracts.parse(text, "the draft")
    if planner is None or contract.adapter is None or answers.task == "language":
        return text  # the rule was not tried on language models
    text = _rendered(answers, planner(contract))
    contracts.parse(text, "the draft")
    return text


def _rendered(answers: Answers, adapter: AdapterPlan | None) -> str:
    """The draft with a plan of its adapter, or with default rates."""
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - TOML
    )
    environment.filters["toml"] = _toml
    source = (resources.files("silotune.common.contract") / "contract.toml.j2").read_text("utf-8")
    room = adapter is None or adapter.has_room
    render = partial(
        environment.from_string(source).render,
        a=answers,
        encoder=ENCODER,
        language=LANGUAGE,
        delta=answers.delta or delta_for(answers.records),
        phrase=lambda name: re.sub(r"[_\W]+", " ", name).strip().lower() or name,
        quorum=max(1, -(-2 * len(answers.sites) // 3)),
        adapter=adapter,
        adapts=room and not answers.columns,
        least_ratio=adapter_rule.LEAST_RATIO,
        head_share=adapter_rule.HEAD_SHARE,
        joint_rounds=adapter_rule.ROUNDS,
        joint_sampling_rate=adapter_rule.SAMPLING_RATE,
        sentences=SENTENCES,
        norm=NORM,
    )
    text = render(plan=None, clip_norm=1.0)
    contract = contracts.parse(text, "the draft")
    facts = facts_of(contract, contract.phases[0])
    if facts is None:
        return text
    plan = head_rule.plan_head(facts)
    noise = head_rule.output_noise(facts, plan.rounds, plan.head_lr, plan.clip_norm)
    return render(plan=plan, clip_norm=plan.clip_norm, noise=noise, rule=head_rule.VERSION)


def contract_of(
    header: Iterable[str],
    *,
    columns: Mapping[str, Sequence[object]] | None,
    **given: Any,
) -> contracts.Contract:
    """The contract of `Contract.draft`, whose arguments these are."""
    of_columns = [
        Column.parse(f"{column}: {', '.join(map(str, _listed(column, values)))}")
        for column, values in (columns or {}).items()
    ]
    lists = {key: _listed(key, given.pop(key)) for key in ("labels", "others", "sites", "entity")}
    try:
        answers = Answers.model_validate(
            given
            | {key: [str(value) for value in values] for key, values in lists.items()}
            | {"columns": of_columns}
        )
    except ValidationError as error:
        raise contract_error(error, "Contract.draft", Answers) from None
    names = [str(name) for name in header]
    absent = [name for name in answers.used if name not in names]
    if absent:
        absence = DataError(
            " ".join(f"Column '{name}' is not in the header." for name in absent),
            code=ErrorCode.SCHEMA_MISMATCH,
            local=f"it has: {', '.join(names[:40])}."
            + "".join(did_you_mean(name, names) for name in absent),
        )
        absence.add_note(absence.local)  # a traceback shows it
        raise absence
    return contracts.parse(draft(answers), "Contract.draft")


def _listed(key: str, values: Sequence[object]) -> list[object]:
    """UsageError for one text where a list belongs, whose letters would be taken as its members."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UsageError(f"'{key}' must be a list, got {values!r}. Write [{values!r}].")
    return list(values)


def _toml(value: Any) -> str:
    """A string, number or list as TOML writes it, which for these is as JSON does."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
