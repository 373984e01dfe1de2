"""What a contract says of the records' inputs: the public schema by which they are read."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from silotune.common.config.types import Frozen, Number


def _pairs(values: Any) -> Any:
    """A TOML table as ordered pairs: the order numbers the choices, so it must not be lost."""
    return tuple(values.items()) if isinstance(values, dict) else values


TABLE_OR_PAIRS = {  # in TOML and in JSON, in a JSON Schema
    "anyOf": [
        {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 2},
        {
            "type": "array",
            "items": {
                "type": "array",
                "prefixItems": [{"type": "string"}, {"type": "string"}],
                "minItems": 2,
                "maxItems": 2,
            },
            "minItems": 2,
        },
    ]
}


class NumberColumn(Frozen):
    """A number that public bin edges turn into words.

    A value v gets words[i] where i is the number of edges that are <= v; so len(words) must be
    len(edges) + 1. Values below `lowest` count as missing (a cholesterol of 0, say).
    """

    kind: Literal["number"] = Field(
        default="number", description="A numeric column, which public bin edges turn into words."
    )
    name: str = Field(description="Name of the column in the records' header.")
    phrase: str = Field(description="Words that name the column in the text that the model reads.")
    edges: tuple[Number, ...] = Field(
        min_length=1,
        description="Public bin edges in increasing order; a value belongs to the bin above the "
        "last edge that it reaches.",
    )
    words: tuple[str, ...] = Field(description="Words for each bin, one more than there are edges.")
    lowest: Number | None = Field(
        default=None,
        description="Smallest valid value; smaller ones count as missing. All are valid if absent.",
    )

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

    kind: Literal["category"] = Field(
        default="category", description="A categorical column, whose raw values map to words."
    )
    name: str = Field(description="Name of the column in the records' header.")
    phrase: str = Field(description="Words that name the column in the text that the model reads.")
    values: Annotated[
        tuple[tuple[str, str], ...], BeforeValidator(_pairs), WithJsonSchema(TABLE_OR_PAIRS)
    ] = Field(
        min_length=2,
        description="Each raw value and the words that stand for it, in an order that the hash "
        "covers.",
    )

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

    kind: Literal["table"] = Field(
        default="table", description="The input is a table, each row of which becomes a text."
    )
    columns: tuple[Column, ...] = Field(
        min_length=1, description="The input columns and how their values become words."
    )
    missing: str = Field(
        default="unknown",
        description='Word for an absent value; "" leaves the column out of the text.',
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [column.name for column in self.columns]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"column {name!r} stands twice")
        return self


class TextInput(Frozen):
    """Free text in one column: a message, a sentence's words between spaces, a question."""

    kind: Literal["text"] = Field(
        default="text", description="The input is free text in a single column."
    )
    column: str = Field(description="Name of the column that holds the text.")


class PairInput(Frozen):
    """Two texts a record: a question and an answer, a user and an item.

    With by = "bi" the head's weights make a dot product of the two feature vectors, and what stands
    on one side can be indexed once for all queries.
    """

    kind: Literal["pair"] = Field(
        default="pair",
        description="The input is a pair of texts, such as a question and an answer.",
    )
    first: str = Field(description="Name of the column that holds the first text.")
    second: str = Field(description="Name of the column that holds the second text.")
    by: Literal["cross", "bi"] = Field(
        default="cross",
        description='"cross" encodes both texts as one sequence; "bi" encodes each separately and '
        "multiplies the two feature vectors entry by entry.",
    )

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
