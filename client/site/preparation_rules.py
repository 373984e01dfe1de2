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

    The least score of 0.5 is what was measured. The model is read by
    client/preparation/entity_model.py; its path is relative to site.toml.
    """

    action: Action = Field(
        default="redact",
        description="What is done with a finding of any kind that actions does not name.",
    )
    actions: dict[Kind, Action] = Field(
        default_factory=dict, description="Action for single kinds, instead of the one in action."
    )
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1), Distinct] = Field(
        default=KINDS,
        description="Kinds of identifying detail that are searched for; all if absent.",
    )
    language: Literal["en", "zh", "both"] = Field(
        default="both",
        description='Language of the texts, by which rules are chosen; "both" applies all of them.',
    )
    least_score: Annotated[float, Field(gt=0, le=1, strict=True)] = Field(
        default=0.5,
        description="Smallest score of a finding, above 0 and at most 1; lower values find more, "
        "false positives included.",
    )
    model: Path | None = Field(
        default=None,
        description="Folder of the site's own token-classification model, which searches beside "
        "the rules; none if absent.",
    )

    @model_validator(mode="after")
    def _looked_for(self) -> Self:
        if unused := sorted(set(self.actions) - set(self.kinds)):
            raise ValueError(f"actions for {', '.join(unused)}, which kinds does not look for")
        return self

    def action_for(self, kind: Kind) -> Action:
        return self.actions.get(kind, self.action)


class Prepare(Frozen):
    """What `silotune site prepare` may do with rows that do not fit, beyond trimming spaces."""

    trim: Flag = Field(
        default=True, description="Whether spaces at both ends of each cell are removed."
    )
    duplicates: Literal["report", "drop"] = Field(
        default="report",
        description="Whether rows that are equal in every column but row numbers are only counted "
        "or dropped.",
    )
    missing_target: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="Whether rows with an empty target stop the preparation or are dropped.",
    )
    outside: Literal["refuse", "missing"] = Field(
        default="refuse",
        description="Whether values outside the contract's public schema stop the preparation or "
        "become missing.",
    )
    deidentify: Deidentify | None = Field(
        default=None,
        description="De-identification of the contract's columns of text; none if absent.",
    )
