"""Which records are these? Keyed fingerprints, so that a record's spending follows it.

A fingerprint says what a record is, not where it lies: file name, order of rows and columns,
encoding, quoting and the ways to write a value do not change it. Two files overlap where they
share fingerprints, and the overlap inherits every charge that either took part in.

What is one value (`value`): numbers by their value, not their digits; letter case; white space;
control and invisible characters; Unicode's compatibility and composed forms; typographic quotes and
dashes; the usual words for a missing value (MISSING_WORDS). What is not: dates in another format,
decimal commas, pseudonyms that are new at each export.

Decodings. Text that was decoded by a wrong encoding is another text. So a row with a character
beyond ASCII also has the fingerprints that it would have if its bytes were read in
each encoding in which a file may be declared (READ_AS); where the text came as Unicode, those of
the text before a tool took UTF-8 or Windows-1252 for Latin-1. One fingerprint in common makes two
rows one record: a wrong declaration at either time, or at both, changes nothing. Not recognised:
text in which bytes were replaced because they could not be decoded.

Basis: the columns a fingerprint is made of. With `key` columns (a patient's number) it is those
alone: a corrected or relabelled row stays the same record. Without, it is every column of the file
but those that only number the rows (whole numbers, each once: another export numbers anew); then a
changed cell makes a new record, which is why the owner should name a key. Fingerprints of
different bases cannot be compared: all their records count as the same ones (fail closed).

The fingerprint is BLAKE2b with the site's own key, 128 bits: without the key it cannot be tried on
guessed records. Records are compared by its first 64 bits: of 2^21 records with 2^5 decodings each
some two are one by chance with probability below 2^-12, which charges more, never less.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from silotune.common.encodings import ENCODINGS
from silotune.common.errors import DataError, did_you_mean
from silotune.common.records import Table

SIZE = 16
Fingerprints = NDArray[np.bytes_]  # [R] of 16 bytes, sorted, each once
Codes = NDArray[np.uint64]

# UTF-16 is left out: its bytes have NULs in every column name, so they cannot be read as another.
READ_AS = tuple(name for name in ENCODINGS if not name.startswith("utf-16"))
MISSING_WORDS = frozenset({
    "", "nan", "na", "n/a", "#n/a", "#n/a n/a", "#na", "<na>", "null", "none", "nil", "nat",
    "-1.#ind", "1.#ind", "-1.#qnan", "1.#qnan", "\\n",
})
# Unicode's categories Cc and Cf but for white space: control characters, a zero-width space.
_UNSEEN = re.compile("[" + "".join(
    re.escape(chr(code)) for code in (*range(0x20000), *range(0xE0000, 0xE0080))  # all there are
    if unicodedata.category(chr(code)) in ("Cc", "Cf") and not chr(code).isspace()
) + "]")
_PUNCTUATION = str.maketrans({
    **dict.fromkeys("‘’‚‛‹›`´ʹʼ′‵＇", "'"), **dict.fromkeys("“”„‟«»″‶＂", '"'),
    **dict.fromkeys("‐‑‒–—―−﹘﹣－", "-"),
})
_MARKS = re.compile("[" + "".join(re.escape(chr(mark)) for mark in _PUNCTUATION) + "]")


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
class Lineage:
    """The records of one file: the basis and the sorted distinct fingerprints.

    `rows` counts the file's rows; it is larger than len(fingerprints) where records stand twice.
    columns: the JSON list that `basis` is the digest of; "" where it is not known.
    """

    basis: str
    fingerprints: Fingerprints
    rows: int
    columns: str = ""
    decodings: Decodings = NO_DECODINGS

    @cached_property
    def id(self) -> str:
        """A name of this set of records (hexadecimal); equal sets have equal names."""
        content = hashlib.sha256(self.basis.encode() + b"\0" + self.fingerprints.tobytes())
        if len(self.decodings.codes):
            content.update(b"\0" + self.decodings.counts.tobytes() + self.decodings.codes.tobytes())
        return content.hexdigest()

    @classmethod
    def of_bytes(
        cls, basis: str, fingerprints: bytes, rows: int, columns: str = "",
        counts: bytes = b"", codes: bytes = b"",
    ) -> Lineage:
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
        return frozenset(name for name, _ in json.loads(self.columns)[1]) if self.columns else (
            frozenset()
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


def of_table(table: Table, key: Sequence[str], secret: bytes) -> Lineage:
    """The lineage of a file's rows. secret: 32 bytes, the site's own. DataError: no such column."""
    found = of_rows(table, basis_columns(table, key), secret, keyed=bool(key))
    prints, record = np.unique(found.fingerprints, return_inverse=True)
    owners, codes = record[found.decodings.owners], found.decodings.codes
    order = np.lexsort((codes, owners))
    owners, codes = owners[order], codes[order]
    new = np.ones(len(codes), dtype=bool)
    new[1:] = (owners[1:] != owners[:-1]) | (codes[1:] != codes[:-1])
    counts = np.bincount(owners[new], minlength=len(prints)).astype(np.uint32)
    decodings = Decodings(counts if len(codes) else found.decodings.counts[:0], codes[new])
    return Lineage(found.basis, prints, len(table.rows), found.columns, decodings)


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
    names = [canonical(name) for name in table.header]
    # A name that stands twice takes part with each of its columns, in a fixed order.
    places = [[i for i, name in enumerate(names) if name == column] for column in chosen]
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
        if not "".join(cells).isascii():
            found = set(_other_decodings(cells, used, table.encoding))
            others = {fingerprint(other) for other in found}
            others.discard(own)
        counts.append(len(others))
        codes.extend(sorted(int.from_bytes(other[:8], "little") for other in others))
    return RowPrints(
        basis_of(columns), columns, _array(bytes(prints)),
        Decodings(np.array(counts, np.uint32), np.array(codes, np.uint64)),
    )


def basis_of(columns: str) -> str:
    """The digest that names a basis; columns: `Lineage.columns`."""
    return hashlib.blake2b(columns.encode(), digest_size=SIZE).hexdigest()


def codes_of(fingerprints: Fingerprints) -> Codes:
    """The first 64 bits of each."""
    return np.frombuffer(fingerprints.tobytes(), np.dtype("<u8"))[::2].astype(np.uint64)


def _other_decodings(
    cells: Sequence[str], used: Collection[int], encoding: str
) -> Iterator[tuple[str, ...]]:
    """The row as it is if the bytes of the `used` cells, which were read in `encoding`, are read in
    another one."""
    foreign = [i for i in used if i < len(cells) and not cells[i].isascii()]
    if encoding.startswith("utf"):
        ways = [("latin-1", ("utf-8", "cp1252")), ("cp1252", ("utf-8",))]
    else:
        ways = [(encoding, READ_AS)]
    for written_as, read_as in ways if foreign else ():
        try:
            raw = [cells[i].encode(written_as) for i in foreign]
        except UnicodeEncodeError:
            continue
        for other in read_as:
            found = list(cells)
            try:
                for i, part in zip(foreign, raw, strict=True):
                    found[i] = part.decode(other)
            except UnicodeDecodeError:
                continue
            yield tuple(found)


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


def canonical(name: str) -> str:
    """A name or text without its ways of writing (see above)."""
    if not name.isprintable():
        name = _UNSEEN.sub("", name)
    if name.isascii():
        return " ".join(name.lower().replace("`", "'").split())
    text = _normalised(name.translate(_PUNCTUATION) if _MARKS.search(name) else name).casefold()
    return " ".join(_normalised(text).split())


def _normalised(text: str) -> str:
    return text if unicodedata.is_normalized("NFKC", text) else unicodedata.normalize("NFKC", text)


@lru_cache(maxsize=1 << 16)
def value(cell: str) -> str:
    """A cell's value: as `written`, and nothing for a word that stands for a missing value."""
    text = written(cell)
    return "" if text in MISSING_WORDS else text


def written(cell: str) -> str:
    """A cell without its ways of writing: 5, '5.0 ' and 5e0 are one value, so are É and É."""
    text = canonical(cell)
    if text.lstrip("+-") == "nan":
        return ""
    if " " in text:
        return text
    try:
        number = Decimal(text).normalize(Context(prec=max(28, len(text))))
    except ArithmeticError:  # no number, or one with an exponent beyond all measure
        return text
    return str(abs(number) if number.is_zero() else number)
