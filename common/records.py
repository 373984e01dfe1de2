"""Labelled rows: a table is read, checked against the public schema and turned into choices.

Sites read their records with it, the operator its public test rows.

Errors name file, column and row numbers. A record's value appears only in `DataError.local`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.common import schema
from silotune.common.contract import Contract
from silotune.common.errors import DataError, did_you_mean
from silotune.common.inputs import TextInput

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


@dataclass(frozen=True)
class Table:
    """A file as it stands: the header, and each row's cells with the line it starts on."""

    source: str
    header: list[str]
    rows: list[tuple[int, list[str]]]


def read(path: Path, contract: Contract) -> Records:
    """Read a CSV file by the contract's schema; DataError with every problem found."""
    return parse(table(path), contract)


def parse(table: Table, contract: Contract) -> Records:
    """Check a table by the contract's schema; DataError with every problem found."""
    source, header, rows = table.source, table.header, table.rows
    spec, label = contract.input, contract.task.label_column
    absent = [c for c in [*contract.columns, label] if c not in header]
    if absent:
        raise DataError(
            " ".join(f"Column '{c}' is not in {source}." for c in absent)
            + f" The contract '{contract.name}' names its columns in [input] and [task]. "
            "Stopped before training; ε spent: 0.",
            code="E302",
            # A file without a header has a record there.
            local=f"it has: {', '.join(header[:20])}."
            + "".join(did_you_mean(c, header) for c in absent),
        )
    twice = [c for c in [*contract.columns, label] if header.count(c) > 1]
    if twice:
        raise DataError(f"Column '{twice[0]}' stands twice in the header of {source}.", code="E302")
    if not rows:
        raise DataError(
            f"Data file {source} has no rows; a site without records cannot take part. "
            "Take it out of the contract's sites, or fill the file.",
            code="E304",
        )
    problems = _Problems()
    classes = {v: i for i, found in enumerate(contract.task.labels) for v in found.values}
    labels: list[int] = []
    inputs: list[Any] = []
    for line, cells in rows:
        if len(cells) != len(header):
            problems.add("E302", f"{len(header)} fields are expected", line, ",".join(cells))
            continue
        row = dict(zip(header, cells, strict=True))
        labels.append(classes.get(row[label].strip(), -1))
        if labels[-1] < 0:
            allowed = ", ".join(classes)
            what = f"column '{label}' is not one of the contract's labels ({allowed})"
            problems.add("E303", what, line, row[label])
        if isinstance(spec, TextInput):
            inputs.append(row[spec.column])
            continue
        choices: list[schema.Choice] = []
        for column in spec.columns:
            try:
                choices.append(schema.choice_of(column, row[column.name]))
            except schema.OutsideSchemaError as error:
                problems.add("E302", str(error), line, error.value)
        inputs.append(tuple(choices))
    problems.raise_if_any(f"{source} does not fit the contract '{contract.name}'")
    return Records(inputs, np.array(labels, dtype=np.int64))


class _Problems:
    """What is wrong with which rows; values are kept apart from what may be logged."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[int, str]]] = {}

    def add(self, code: str, what: str, line: int, value: str) -> None:
        self.found.setdefault((code, what), []).append((line, value))

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


def table(path: Path) -> Table:
    """Read a CSV file, blank lines passed over. DataError if there is none or it has no header."""
    try:
        is_file = path.is_file()
    except PermissionError:
        raise DataError(f"Data file {path} lies in a folder this user may not enter.") from None
    if not is_file:
        others = sorted(p.name for p in path.parent.glob("*.csv"))[:5]
        hint = f" CSV files in that folder: {', '.join(others)}." if others else ""
        what = "is no file" if path.exists() else "does not exist"
        raise DataError(f"Data file {path} {what}.{hint}")
    rows: list[tuple[int, list[str]]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader, line = csv.reader(file, strict=True), 1
            for cells in reader:
                if cells:
                    rows.append((line, cells))
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        # The parser's own text may quote a line of the file.
        raise DataError(
            f"Data file {path.name} cannot be read as UTF-8 CSV ({type(error).__name__})."
        ) from None
    if not rows:
        raise DataError(f"Data file {path.name} is empty: it has no header.", code="E304")
    return Table(path.name, rows[0][1], rows[1:])
