"""What a contract says of the records' inputs: the public schema by which they are read."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from silotune.common.config.types import Frozen, Number


def _pairs(values: Any) -> Any:
    """A TOML table as ordered pairs: the order numbers the choices, so it must not be lost."""
    return tuple(values.items()) if isinstance(values, dict) else values


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

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for value in self.raw_values:
            if self.raw_values.count(value) > 1:
                raise ValueError(f"column {self.name!r} has the value {value!r} more than once")
            if not value or value != value.strip():
                raise ValueError(
                    f"column {self.name!r} has the value {value!r}, and cells are read without "
                    "spaces at their ends, empty ones as missing: no cell would be that value"
                )
        return self

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
    """Free text in one column: a message, a sentence's words between spaces, a question."""

    kind: Literal["text"] = "text"
    column: str


class PairInput(Frozen):
    """Two texts a record: a question and an answer, a user and an item.

    by: "cross" reads them as one sequence; "bi" reads each by itself and multiplies the two feature
    vectors entry by entry, so that the head's weights make a dot product of them, and what stands
    on one side can be indexed once for all queries.
    """

    kind: Literal["pair"] = "pair"
    first: str
    second: str
    by: Literal["cross", "bi"] = "cross"

    @model_validator(mode="after")
    def _two(self) -> Self:
        if self.first == self.second:
            raise ValueError(f"a pair needs two columns, {self.first!r} stands for both")
        return self


Input = Annotated[TableInput | TextInput | PairInput, Field(discriminator="kind")]


def columns_of(spec: TableInput | TextInput | PairInput) -> tuple[str, ...]:
    """The input columns of the records."""
    if isinstance(spec, TextInput):
        return (spec.column,)
    if isinstance(spec, PairInput):
        return (spec.first, spec.second)
    return tuple(column.name for column in spec.columns)
