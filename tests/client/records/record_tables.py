"""Tables of records, and which of them are the same ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from silotune.client.records.record_identity import components
from silotune.client.records.record_ids import RecordSet, of_table
from silotune.common.data import records
from silotune.common.data.records import Table

SECRET = bytes(range(32))

HEADER = ["patient", "âge", "note"]

ROWS = [["p1", "5", "rué"], ["p2", "60.50", "plain, quoted"], ["p3", "-0.125", ""]]


def shared(records: RecordSet, others: RecordSet) -> NDArray[np.bool_]:
    """[R] for each of `records`, whether it is among the others; all of them if bases differ."""
    if records.basis != others.basis:
        return np.ones(len(records.fingerprints), dtype=bool)
    own, other = components([records, others], [])
    return np.isin(own, other)


def made(
    rows: Sequence[Sequence[str]] = ROWS,
    header: Sequence[str] = HEADER,
    key: Sequence[str] = (),
    secret: bytes = SECRET,
) -> RecordSet:
    numbered = [(i + 2, list(row)) for i, row in enumerate(rows)]
    return of_table(Table("made.csv", list(header), numbered), key, secret)


def text_of(
    header: Sequence[str] = HEADER,
    rows: Sequence[Sequence[str]] = ROWS,
    *,
    end: str = "\n",
    quoting: int = csv.QUOTE_MINIMAL,
) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([header, *rows])
    return out.getvalue()


def of_bytes(path: Path, data: bytes, key: Sequence[str] = ()) -> RecordSet:
    path.write_bytes(data)
    return of_table(records.table(path), key, SECRET)
