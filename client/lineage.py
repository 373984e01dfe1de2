"""Which records are these? Keyed fingerprints, so that a record's spending follows it.

A fingerprint says what a record is, not where it lies: file name, order of rows and columns,
encoding, quoting and the ways to write a number do not change it. Two files overlap where they
share fingerprints, and the overlap inherits every charge that either took part in.

Basis: the columns a fingerprint is made of. With `key` columns (a patient's number) it is those
alone: a corrected or relabelled row stays the same record. Without, it is every column of the file
but those that only number the rows (whole numbers, each once: another export numbers anew); then a
changed cell makes a new record, which is why the owner should name a key. Fingerprints of
different bases cannot be compared: all their records count as the same ones (fail closed).

The fingerprint is BLAKE2b with the site's own key, 128 bits: without the key it cannot be tried on
guessed records, and of 10^6 records two share one by chance with probability below 2^-88.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from silotune.common.errors import DataError, did_you_mean
from silotune.common.records import Table

SIZE = 16
Fingerprints = NDArray[np.bytes_]  # [R] of 16 bytes, sorted, each once


@dataclass(frozen=True)
class Lineage:
    """The records of one file: the basis and the sorted distinct fingerprints.

    `rows` counts the file's rows; it is larger than len(fingerprints) where records stand twice.
    """

    basis: str
    fingerprints: Fingerprints
    rows: int

    @cached_property
    def id(self) -> str:
        """A name of this set of records (hexadecimal); equal sets have equal names."""
        content = self.basis.encode() + b"\0" + self.fingerprints.tobytes()
        return hashlib.sha256(content).hexdigest()

    @classmethod
    def of_bytes(cls, basis: str, fingerprints: bytes, rows: int) -> Lineage:
        return cls(basis, _array(fingerprints), rows)

    @property
    def repeated(self) -> int:
        return self.rows - len(self.fingerprints)


def of_table(table: Table, key: Sequence[str], secret: bytes) -> Lineage:
    """The lineage of a file's rows. secret: 32 bytes, the site's own. DataError: no such column."""
    basis, prints = of_rows(table, key, secret)
    return Lineage(basis, np.unique(prints), len(table.rows))


def of_rows(
    table: Table, key: Sequence[str], secret: bytes, apart: Collection[str] = ()
) -> tuple[str, Fingerprints]:
    """The basis and each row's fingerprint, in the order of the rows; else as `of_table`. apart:
    columns that tell rows apart also where they might only number them."""
    names = [canonical(name) for name in table.header]
    wanted = set(_key_columns(table, key))
    if not wanted:
        # By name: of two columns of one name it could be this one today and that one tomorrow.
        numbering = {names[i] for i in _numbering(table)} - set(map(canonical, apart))
        wanted = set(names) - numbering or set(names)
    chosen = sorted(wanted)
    # A name that stands twice takes part with each of its columns, in a fixed order.
    places = [[i for i, name in enumerate(names) if name == column] for column in chosen]
    columns = [[column, len(found)] for column, found in zip(chosen, places, strict=True)]
    basis = hashlib.blake2b(json.dumps([bool(key), columns]).encode(), digest_size=SIZE).hexdigest()
    prints = bytearray()
    for _, cells in table.rows:
        content = f"[{', '.join([_content(cells, found) for found in places])}]".encode()
        prints += hashlib.blake2b(content, key=secret, digest_size=SIZE).digest()
    return basis, _array(bytes(prints))


def keys(table: Table, key: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Each row's cells in the key columns, without their ways of writing: rows with equal ones have
    equal fingerprints by this key. DataError: no such column."""
    names = [canonical(name) for name in table.header]
    places = [names.index(column) for column in _key_columns(table, key)]
    for _, cells in table.rows:
        yield tuple(_cell(cells, place) for place in places)


def same_columns(a: Sequence[str], b: Sequence[str]) -> bool:
    return sorted(map(canonical, a)) == sorted(map(canonical, b))


def _key_columns(table: Table, key: Sequence[str]) -> list[str]:
    """The canonical names of the key columns, each of which must stand in the header once."""
    names = [canonical(name) for name in table.header]
    columns = [canonical(column) for column in key]
    for given, column in zip(key, columns, strict=True):
        if column not in names:
            raise DataError(
                f"Key column '{given}' is not in {table.source} (site.toml, data.key).",
                code="E302",
                local=f"it has: {', '.join(table.header[:20])}."
                + did_you_mean(given, table.header),
            )
        if names.count(column) > 1:
            raise DataError(f"Key column '{given}' stands twice in {table.source}.", code="E302")
    return columns


def _content(cells: Sequence[str], places: Sequence[int]) -> str:
    """The JSON list of a column's values in a row."""
    if len(places) == 1 and places[0] < len(cells):
        return _alone(cells[places[0]])
    return json.dumps(sorted(_cell(cells, i) for i in places), ensure_ascii=False)


@lru_cache(maxsize=1 << 16)
def _alone(cell: str) -> str:
    return json.dumps([_value(cell)], ensure_ascii=False)


def _cell(cells: Sequence[str], place: int) -> str:
    """A row with too few cells is refused when it is read by the contract's schema."""
    return _value(cells[place]) if place < len(cells) else ""


def _numbering(table: Table) -> set[int]:
    """The columns that give each row a whole number of its own."""
    if len(table.rows) < 2:
        return set()
    found: dict[int, set[str]] = {column: set() for column in range(len(table.header))}
    for _, cells in table.rows:
        for column, values in list(found.items()):
            value = _cell(cells, column)
            if value in values or not _is_whole(value):
                del found[column]
            values.add(value)
        if not found:
            break
    return set(found)


def _is_whole(value: str) -> bool:
    if value.isascii() and value.isdigit():
        return True
    try:
        number = Decimal(value)
    except ArithmeticError:
        return False
    return number.is_finite() and number == number.to_integral_value()


def shared(records: Lineage, others: Lineage) -> NDArray[np.bool_]:
    """[R] for each of `records`, whether it is among the others; all of them if bases differ."""
    if records.basis != others.basis:
        return np.ones(len(records.fingerprints), dtype=bool)
    return np.isin(records.fingerprints, others.fingerprints, assume_unique=True)


def _array(data: bytes) -> Fingerprints:
    return np.frombuffer(data, dtype=f"S{SIZE}")


def canonical(name: str) -> str:
    """A column's name without its ways of writing."""
    if name.isascii():  # nothing below has more to do then
        return " ".join(name.lower().split())
    text = "".join(c for c in name if unicodedata.category(c) != "Cf")  # unseen: a zero-width space
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@lru_cache(maxsize=1 << 16)
def _value(cell: str) -> str:
    """A cell without its ways of writing: 5, '5.0 ' and 5e0 are one value, so are É and É."""
    text = canonical(cell)
    if text.lstrip("+-") == "nan":
        return ""  # a missing number, as the schema reads it
    try:
        number = Decimal(text).normalize(Context(prec=max(28, len(text))))
    except ArithmeticError:  # no number, or one with an exponent beyond all measure
        return text
    return str(abs(number) if number.is_zero() else number)
