"""The public input schema at work: a row becomes words, or a one-hot vector, or is refused.

Everything here is a pure function of the contract and one row, so it says nothing about any
other record. Shapes: N rows, F one-hot features.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from silotune.common.contract.inputs import CategoryColumn, NumberColumn, TableInput
from silotune.common.formats.cell_values import UNREAD, index_among, number_of, unread

Choice = int | None  # the index of a column's choice; None when the value is missing


class OutsideSchemaError(ValueError):
    """A value the public schema does not know. `value` is a record's: show it to its owner only."""

    def __init__(self, column: str, allowed: str, value: str) -> None:
        super().__init__(f"column '{column}' allows {allowed}")
        self.column, self.allowed, self.value = column, allowed, value


def allowed(column: NumberColumn | CategoryColumn) -> tuple[str, ...]:
    """What `choice_of` may say that the column allows."""
    if isinstance(column, NumberColumn):
        return "numbers or nothing", f"numbers or nothing{UNREAD}"
    return (f"{', '.join(column.raw_values)} or nothing",)


def choice_of(column: NumberColumn | CategoryColumn, raw: str) -> Choice:
    """The index of the column's choice that `raw` falls into; OutsideSchemaError if none."""
    if isinstance(column, NumberColumn):
        number = number_in(column, raw)
        return None if math.isnan(number) else bisect_right(column.edges, number)
    raw = raw.strip()
    if not raw:
        return None
    found = index_among(column.raw_values, raw)
    if found is None:
        raise OutsideSchemaError(column.name, allowed(column)[0], raw)
    return found


def number_in(column: NumberColumn, raw: str) -> float:
    """The number that `raw` is, NaN where it is missing; OutsideSchemaError if it is none."""
    raw = raw.strip()
    if not raw:
        return math.nan
    try:
        number = number_of(raw)
    except ValueError:
        what = allowed(column)[bool(unread(raw))]
        raise OutsideSchemaError(column.name, what, raw) from None
    return math.nan if column.lowest is not None and number < column.lowest else number


def misfit(column: NumberColumn | CategoryColumn, raw: str) -> str:
    """The message about a value that the column does not allow; '' of others."""
    try:
        choice_of(column, raw)
    except OutsideSchemaError as error:
        return f"allows {error.allowed}"
    return ""


def below(column: NumberColumn, raw: str) -> str:
    """The message about a number below the column's lowest, which counts as missing; '' of
    others."""
    try:
        number = number_of(raw)
    except ValueError:
        return ""
    if column.lowest is None or not number < column.lowest:
        return ""
    return f"is below {column.lowest:g}: counts as missing"


def to_text(table: TableInput, choices: Sequence[Choice]) -> str:
    """'age: in the fifties. chest pain: typical angina.' in the order of the columns."""
    parts = []
    for column, choice in zip(table.columns, choices, strict=True):
        word = table.missing if choice is None else column.choices[choice]
        if word:
            parts.append(f"{column.phrase}: {word}.")
    return " ".join(parts)


def to_one_hot(table: TableInput, rows: Sequence[Sequence[Choice]]) -> NDArray[np.float32]:
    """[N, F]; each column has one cell a choice and one for missing, so each row sums to the
    number of columns."""
    widths = [len(column.choices) + 1 for column in table.columns]
    starts = np.concatenate([[0], np.cumsum(widths)])
    out = np.zeros((len(rows), int(starts[-1])), dtype=np.float32)
    for i, row in enumerate(rows):
        for start, width, choice in zip(starts[:-1], widths, row, strict=True):
            out[i, start + (width - 1 if choice is None else choice)] = 1.0
    return out


def synthetic(table: TableInput, n: int, seed: int) -> list[tuple[Choice, ...]]:
    """n rows drawn uniformly and independently from the schema's choices and 'missing'.

    A public function of the contract: no record is involved.
    """
    rng = np.random.default_rng(seed)
    columns = [
        [None if k == len(c.choices) else int(k) for k in rng.integers(len(c.choices) + 1, size=n)]
        for c in table.columns
    ]
    return list(zip(*columns, strict=True))
