"""The owner's rules for the preparation of records: [prepare] in site.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from silotune.common.config.types import (
    Distinct,
    Flag,
    Frozen,
)

Kind = Literal[
    "person",
    "email",
    "phone",
    "address",
    "date",
    "iban",
    "card",
    "ssn",
    "record_number",
    "resident_id",
    "passport",
    "license_plate",
    "messenger_id",
    "url",
    "ip_address",
]


Action = Literal["redact", "mask", "pseudonymise", "block"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Deidentify(Frozen):
    """`[prepare.deidentify]` in site.toml.

    action: for every kind that `actions` does not name. kinds: what is looked for. language: of
    the texts; "both" looks for everything. least_score: 0 to 1; lower finds more, and more that is
    nothing. 0.5 is what was measured. model: a folder with a token-classification model of the
    site's own, which searches beside the rules (client/preparation/entity_model.py); relative to
    site.toml.
    """

    action: Action = "redact"
    actions: dict[Kind, Action] = Field(default_factory=dict)
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1), Distinct] = KINDS
    language: Literal["en", "zh", "both"] = "both"
    least_score: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.5
    model: Path | None = None

    @model_validator(mode="after")
    def _looked_for(self) -> Self:
        if unused := sorted(set(self.actions) - set(self.kinds)):
            raise ValueError(f"actions for {', '.join(unused)}, which kinds does not look for")
        return self

    def action_for(self, kind: Kind) -> Action:
        return self.actions.get(kind, self.action)


class Prepare(Frozen):
    """What `silotune site prepare` may do with rows that do not fit, beyond trimming spaces.

    duplicates: rows that are equal in every column but those that number them. missing_target: rows
    whose label is empty. outside: cells that the contract's public schema does not know.
    deidentify: what is taken out of the contract's columns of text.
    """

    trim: Flag = True
    duplicates: Literal["report", "drop"] = "report"
    missing_target: Literal["refuse", "drop"] = "refuse"
    outside: Literal["refuse", "missing"] = "refuse"
    deidentify: Deidentify | None = None
