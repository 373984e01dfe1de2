"""What a contract says of the records: the task's public labels and the public input schema."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from silotune.common.fields import Frozen, Name, Number


def _pairs(values: Any) -> Any:
    """A TOML table as ordered pairs: the order numbers the choices, so it must not be lost."""
    return tuple(values.items()) if isinstance(values, dict) else values


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
