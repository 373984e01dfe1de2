"""Labelled rows: a table is read, checked against the public schema and turned into choices.

Sites read their records with it, the operator its public test rows.

Errors name file, column and row numbers. A record's value appears only in `DataError.local`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from silotune.common import schema
from silotune.common.contract import Contract, TableInput
from silotune.common.errors import DataError, did_you_mean

SHOWN_ROWS = 10

# N texts, or N rows of choices (common/schema.py).
Inputs = Sequence[str] | Sequence[tuple[schema.Choice, ...]]


@dataclass(frozen=True)
class Records:
    """labels: [N] class indices."""

    inputs: Inputs
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def read(path: Path, contract: Contract) -> Records:
    """Read a CSV file by the contract's schema; DataError with every problem found."""
    table = _table(path)
    source = path.name
    spec = contract.input
    columns = (
        [column.name for column in spec.columns]
        if isinstance(spec, TableInput)
        else [spec.column]
    )
    absent = [c for c in [*columns, contract.task.label_column] if c not in table.columns]
    if absent:
        has = ", ".join(map(str, table.columns[:20]))
        raise DataError(
            " ".join(
                f"Column '{c}' is not in {source}.{did_you_mean(c, table.columns)}" for c in absent
            )
            + f" It has: {has}. The contract '{contract.name}' names its columns in [input] and "
            "[task]. Stopped before training; ε spent: 0.",
            code="E302",
        )
    if not len(table):
        raise DataError(
            f"Data file {source} has no rows; a site without records cannot take part. "
            "Take it out of the contract's sites, or fill the file.",
            code="E304",
        )
    problems = _Problems()
    classes = {v: i for i, label in enumerate(contract.task.labels) for v in label.values}
    labels = np.zeros(len(table), dtype=np.int64)
    for i, raw in enumerate(table[contract.task.label_column]):
        if raw.strip() in classes:
            labels[i] = classes[raw.strip()]
        else:
            problems.add(
                "E303",
                f"column '{contract.task.label_column}' is not one of the contract's labels "
                f"({', '.join(classes)})",
                i, raw,
            )
    inputs: Inputs
    if isinstance(spec, TableInput):
        rows: list[tuple[schema.Choice, ...]] = []
        for i, row in enumerate(table[columns].itertuples(index=False, name=None)):
            try:
                rows.append(schema.choices_of(spec, dict(zip(columns, row, strict=True))))
            except schema.OutsideSchemaError as error:
                problems.add("E302", str(error), i, error.value)
        inputs = rows
    else:
        inputs = list(table[spec.column])
    problems.raise_if_any(f"{source} does not fit the contract '{contract.name}'")
    return Records(inputs, labels)


class _Problems:
    """What is wrong with which rows; values are kept apart from what may be logged."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[int, str]]] = {}

    def add(self, code: str, what: str, index: int, value: str) -> None:
        # The header is line 1 of the file.
        self.found.setdefault((code, what), []).append((index + 2, value))

    def raise_if_any(self, what: str) -> None:
        """DataError with every kind of problem and its first rows."""
        if not self.found:
            return
        parts, local = [], []
        for (_, text), places in self.found.items():
            shown = places[:SHOWN_ROWS]
            more = f" and {len(places) - len(shown)} more" if len(places) > len(shown) else ""
            rows = ", ".join(str(row) for row, _ in shown)
            parts.append(f"{text}: row{'s' if len(places) > 1 else ''} {rows}{more}")
            local += [f"row {row} has {value!r}" for row, value in shown]
        raise DataError(
            f"{what}: {'; '.join(parts)}. Correct those rows, or agree on another contract. "
            "ε spent: 0.",
            code=next(iter(self.found))[0],
            local="; ".join(local),
        )


def _table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*.csv"))[:5]
        hint = f" CSV files in that folder: {', '.join(others)}." if others else ""
        raise DataError(f"Data file {path} does not exist.{hint}")
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except pd.errors.EmptyDataError:
        raise DataError(
            f"Data file {path.name} is empty: it has no header.", code="E304"
        ) from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        # The parser's own text may quote a line of the file.
        raise DataError(
            f"Data file {path.name} cannot be read as UTF-8 CSV ({type(error).__name__})."
        ) from None
