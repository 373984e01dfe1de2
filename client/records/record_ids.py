"""Which records are these? Keyed fingerprints, so that a record's spending follows it.

A fingerprint says what a record is, not where it lies: file name, order of rows and columns,
encoding, quoting and the ways to write a value do not change it. Two files overlap where they
share fingerprints, and the overlap inherits every charge that either took part in.
What is one value is in canonical_values.py.

A row can have further fingerprints, of the other forms in which its cells may have been written
(written_forms.py). One in common makes two rows one record.

Basis: the columns a fingerprint is made of. With `key` columns (a patient's number) it is those
alone: a corrected or relabelled row stays the same record. Without, it is every column of the file
but those that only number the rows (whole numbers, each once: another export renumbers them); then
a changed cell makes a new record, which is why the owner should name a key. Fingerprints of
different bases cannot be compared: all their records count as the same ones (fail closed).

The fingerprint is BLAKE2b with the site's own key, 128 bits: without the key it cannot be tried on
guessed records. Records are compared by its first 64 bits: of 2^21 records with 2^5 codes each
some two are one by chance with probability below 2^-12, which charges more, never less.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from silotune.client.records.canonical_values import canonical, value, written
from silotune.client.records.written_forms import forms_of, other_ways
from silotune.common.data.records import Table
from silotune.common.errors import DataError, ErrorCode, did_you_mean

SIZE = 16
Fingerprints = NDArray[np.bytes_]  # [R] of 16 bytes, sorted, each once
Codes = NDArray[np.uint64]


class Decodings(NamedTuple):
    """For each of R records how many codes it has [R], and the codes, record after record [C]."""

    counts: NDArray[np.uint32]
    codes: Codes

    @property
    def owners(self) -> NDArray[np.int64]:
        """[C] the record of each code."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


NO_DECODINGS = Decodings(np.zeros(0, np.uint32), np.zeros(0, np.uint64))


@dataclass(frozen=True)
class RecordSet:
    """The records of one file: the basis and the sorted distinct fingerprints.

    `rows` counts the file's rows; it is larger than len(fingerprints) where records stand twice.
    columns: the JSON list that `basis` is the digest of; "" where it is not known. holding: tells
    for each record whether one of its cells is among these (`cell_codes`); None where only the
    fingerprints are known. lines: the number of each record's first row in the file; empty where
    only the fingerprints are known.
    """

    basis: str
    fingerprints: Fingerprints
    rows: int
    columns: str = ""
    decodings: Decodings = NO_DECODINGS
    holding: Callable[[Codes], NDArray[np.bool_]] | None = field(
        default=None, compare=False, repr=False
    )
    lines: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, np.int64), compare=False, repr=False
    )

    @cached_property
    def id(self) -> str:
        """A name of this set of records (hexadecimal); equal sets have equal names."""
        content = hashlib.sha256(self.basis.encode() + b"\0" + self.fingerprints.tobytes())
        if len(self.decodings.codes):
            content.update(b"\0" + self.decodings.counts.tobytes() + self.decodings.codes.tobytes())
        return content.hexdigest()

    @classmethod
    def of_bytes(
        cls,
        basis: str,
        fingerprints: bytes,
        rows: int,
        columns: str = "",
        counts: bytes = b"",
        codes: bytes = b"",
    ) -> RecordSet:
        decodings = Decodings(np.frombuffer(counts, np.uint32), np.frombuffer(codes, np.uint64))
        return cls(basis, _array(fingerprints), rows, columns, decodings)

    @property
    def repeated(self) -> int:
        return self.rows - len(self.fingerprints)

    @property
    def codes(self) -> Codes:
        """[R] the fingerprints as records are compared by."""
        return codes_of(self.fingerprints)

    @property
    def names(self) -> frozenset[str]:
        """The canonical names of the columns; empty where they are not known."""
        return (
            frozenset(name for name, _ in json.loads(self.columns)[1])
            if self.columns
            else (frozenset())
        )

    @property
    def keyed(self) -> bool:
        """Whether the owner named the columns."""
        return bool(self.columns) and bool(json.loads(self.columns)[0])


@dataclass(frozen=True)
class RowPrints:
    """The fingerprint and the decodings of each row, in the order of the rows."""

    basis: str
    columns: str
    fingerprints: Fingerprints
    decodings: Decodings


def of_table(table: Table, key: Sequence[str], secret: bytes) -> RecordSet:
    """The record_set of a file's rows. secret: 32 bytes, the site's own. DataError: no such
    column."""
    found = of_rows(table, basis_columns(table, key), secret, keyed=bool(key))
    prints, first, record = np.unique(found.fingerprints, return_index=True, return_inverse=True)
    owners, codes = record[found.decodings.owners], found.decodings.codes
    order = np.lexsort((codes, owners))
    owners, codes = owners[order], codes[order]
    new = np.ones(len(codes), dtype=bool)
    new[1:] = (owners[1:] != owners[:-1]) | (codes[1:] != codes[:-1])
    counts = np.bincount(owners[new], minlength=len(prints)).astype(np.uint32)
    decodings = Decodings(counts if len(codes) else found.decodings.counts[:0], codes[new])
    places = _places(table, [name for name, _ in json.loads(found.columns)[1]])

    def holding(codes: Codes) -> NDArray[np.bool_]:
        has = np.zeros(len(prints), dtype=bool)
        has[
            record[_rows_with(table, sorted(chain(*places)), frozenset(codes.tolist()), secret)]
        ] = True
        return has

    lines = np.array([line for line, _ in table.rows], dtype=np.int64)[first]
    return RecordSet(found.basis, prints, len(table.rows), found.columns, decodings, holding, lines)


def cell_codes(cell: str, encoding: str, secret: bytes) -> frozenset[int]:
    """A cell by itself, whatever its column is called, and what it may be elsewhere: 64 bits each.

    Args:
        encoding: in which it was decoded; "utf-8" where it came as Unicode.
        secret: 32 bytes, the site's key for fingerprints.
    """
    forms = {
        value(cell),
        *(value(form) for (form,) in forms_of((cell,), (0,), encoding, keyed=False)),
    }
    digests = (
        hashlib.blake2b(form.encode(), key=secret, digest_size=8, person=b"cell") for form in forms
    )
    return frozenset(int.from_bytes(found.digest(), "little") for found in digests)


def _rows_with(
    table: Table, places: Sequence[int], codes: Collection[int], secret: bytes
) -> list[int]:
    """The indices of the rows that have a cell of these codes at one of the places."""

    @lru_cache(maxsize=1 << 16)
    def is_among(cell: str) -> bool:
        return not cell_codes(cell, table.encoding, secret).isdisjoint(codes)

    return [
        at
        for at, (_, cells) in enumerate(table.rows)
        if any(is_among(cells[i] if i < len(cells) else "") for i in places)
    ]


def _places(table: Table, columns: Sequence[str]) -> list[list[int]]:
    """Where each of these columns stands: a name that stands twice has two places."""
    names = [canonical(name) for name in table.header]
    return [[i for i, name in enumerate(names) if name == column] for column in columns]


def basis_columns(table: Table, key: Sequence[str], apart: Collection[str] = ()) -> list[str]:
    """The canonical names of the columns that fingerprints are made of, sorted. apart: columns that
    distinguish rows also where they might only number them. DataError: no such column."""
    names = [canonical(name) for name in table.header]
    wanted = set(_key_columns(table, key))
    if not wanted:
        # By name: of two columns of one name it could be this one today and that one tomorrow.
        numbering = {names[i] for i in _numbering(table)} - set(map(canonical, apart))
        wanted = set(names) - numbering or set(names)
    return sorted(wanted)


def of_rows(table: Table, chosen: Sequence[str], secret: bytes, *, keyed: bool) -> RowPrints:
    """Each row by the chosen columns (`basis_columns`). keyed: whether the owner named them."""
    # A name that stands twice takes part with each of its columns, in a fixed order.
    places = _places(table, chosen)
    columns = json.dumps(
        [keyed, [[column, len(found)] for column, found in zip(chosen, places, strict=True)]]
    )

    def fingerprint(cells: Sequence[str]) -> bytes:
        content = f"[{', '.join([_content(cells, found) for found in places])}]".encode()
        return hashlib.blake2b(content, key=secret, digest_size=SIZE).digest()

    prints, counts, codes = bytearray(), array("I"), array("Q")
    used = {place for found in places for place in found}
    for _, cells in table.rows:
        own = fingerprint(cells)
        prints += own
        others: set[bytes] = set()
        if not "".join(cells).isascii() or any(map(other_ways, cells)):
            forms = forms_of(cells, used, table.encoding, keyed=keyed)
            others.update(map(fingerprint, forms))
            others.discard(own)
        counts.append(len(others))
        codes.extend(sorted(int.from_bytes(other[:8], "little") for other in others))
    return RowPrints(
        basis_of(columns),
        columns,
        _array(bytes(prints)),
        Decodings(np.array(counts, np.uint32), np.array(codes, np.uint64)),
    )


def basis_of(columns: str) -> str:
    """The digest that names a basis; columns: `RecordSet.columns`."""
    return hashlib.blake2b(columns.encode(), digest_size=SIZE).hexdigest()


def codes_of(fingerprints: Fingerprints) -> Codes:
    """The first 64 bits of each."""
    return np.frombuffer(fingerprints.tobytes(), np.dtype("<u8"))[::2].astype(np.uint64)


def keys(table: Table, key: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Each row's cells in the key columns, without their ways of writing: rows with equal ones have
    equal fingerprints by this key. Na, Nil and None are names of people, too: they are missing
    values in fingerprints only, where a person more is charged, never less. DataError: no such
    column."""
    names = [canonical(name) for name in table.header]
    places = [names.index(column) for column in _key_columns(table, key)]
    for _, cells in table.rows:
        yield tuple(written(cells[at]) if at < len(cells) else "" for at in places)


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
                code=ErrorCode.SCHEMA_MISMATCH,
                local=f"it has: {', '.join(table.header[:20])}."
                + did_you_mean(given, table.header),
            )
        if names.count(column) > 1:
            raise DataError(
                f"Key column '{given}' stands twice in {table.source}.",
                code=ErrorCode.SCHEMA_MISMATCH,
            )
    return columns


def _content(cells: Sequence[str], places: Sequence[int]) -> str:
    """The JSON list of a column's values in a row."""
    if len(places) == 1 and places[0] < len(cells):
        return _alone(cells[places[0]])
    return json.dumps(sorted(_cell(cells, i) for i in places), ensure_ascii=False)


@lru_cache(maxsize=1 << 16)
def _alone(cell: str) -> str:
    return json.dumps([value(cell)], ensure_ascii=False)


def _cell(cells: Sequence[str], place: int) -> str:
    """A row with too few cells is refused when it is read by the contract's schema."""
    return value(cells[place]) if place < len(cells) else ""


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


def _array(data: bytes) -> Fingerprints:
    return np.frombuffer(data, dtype=f"S{SIZE}")
