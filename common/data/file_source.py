"""Where records come from: CSV, JSON Lines, Parquet, Excel and CoNLL files, read into compact rows.

Each cell is text (common/data/text_table.py). What CSV has between its delimiters is taken as it
stands.

Row numbers: of CSV, JSON Lines and CoNLL the line on which a row starts, the first line being 1; of
Excel the sheet's own row; of Parquet and queries (common/data/sql_source.py) the number of the row,
from 1.

A list of words, in JSON Lines and Parquet, is a cell of these words between spaces. A CoNLL file is
a line for each word (the word, anything, its tag, between tabs or spaces) and a blank line between
sentences: a row is a sentence. It names no columns, so they are taken for the contract's column of
text and its label column; until then they are called 'words' and 'tags'.

Errors name file, column and row numbers. A record's value appears only in `DataError.local`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import string
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from silotune.common.data import workbook
from silotune.common.data.text_decoding import DELIMITERS, Reading, decoded, wrong_encoding
from silotune.common.data.text_table import BLOCK_ROWS, Builder, Row, Rows
from silotune.common.errors import DataError, ErrorCode
from silotune.common.formats.cell_values import C1_CONTROL, CONTROL, NotTextError, cell, header_of
from silotune.common.formats.encodings import WINDOWS_ENCODINGS

SHOWN_ROWS = 10
SAMPLE = 1 << 16  # characters in which the header, and if need be the first rows, are looked for
SAMPLE_ROWS = 20
_ASCII_WORD = re.compile(f"[^{string.whitespace}]+")
CONLL_HEADER = ["words", "tags"]
DOCUMENT = "-DOCSTART-"  # the line between documents of a CoNLL file


class Problems:
    """What is wrong with which rows; values are kept apart from what may be logged."""

    def __init__(self) -> None:
        self.counts: dict[tuple[ErrorCode | None, str], int] = {}
        self.shown: dict[tuple[ErrorCode | None, str], list[tuple[int, str]]] = {}

    def add(self, code: ErrorCode | None, what: str, line: int, value: str) -> None:
        kind = (code, what)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= SHOWN_ROWS:
            self.shown.setdefault(kind, []).append((line, value))

    @property
    def sentences(self) -> tuple[str, ...]:
        """Each kind of problem with its first rows and their count: 'what: rows 2, 3 and 4 more'.
        No values; counts of records."""
        return tuple(
            f"{kind[1]}: {rows_in_words([row for row, _ in places], self.counts[kind])}"
            for kind, places in self.shown.items()
        )

    @property
    def local(self) -> str:
        """The first values of each kind, for their owner's screen."""
        return "; ".join(
            f"row {row} has {value!r}" for places in self.shown.values() for row, value in places
        )

    def raise_if_any(
        self, what: str, remedy: str = "Correct those rows, or agree on another contract."
    ) -> None:
        """DataError with every kind of problem and its first rows."""
        if not self.counts:
            return
        raise DataError(
            f"{what}: {'; '.join(self.sentences)}. {remedy}",
            code=next(iter(self.shown))[0],
            local=self.local,
        )


def rows_in_words(first: Sequence[int], count: int) -> str:
    """'rows 2, 7 and 25 more', of `count` rows the first ones."""
    more = f" and {count - len(first)} more" if count > len(first) else ""
    return f"row{'s' * (count > 1)} {', '.join(map(str, first))}{more}"


class Contents(NamedTuple):
    """What a source holds. notes: sentences about its rows, with their counts: for the records'
    owner alone. named: whether the source names its columns itself. encoding: in which its text
    was decoded; "utf-8" where it came as Unicode."""

    header: list[str]
    rows: Rows
    notes: tuple[str, ...] = ()
    named: bool = True
    encoding: str = "utf-8"


def contents(header: Sequence[str], rows: Rows) -> Contents:
    """A source's header and rows, control characters in the rows noted."""
    found, notes = rows.lines_with(CONTROL), tuple[str, ...]()
    if found:
        what = rows_in_words(found[:SHOWN_ROWS], len(found))
        notes = (f"control characters stand in {what}; they are kept as they are",)
    return Contents(header_of(header), rows, notes)


def read(path: Path, reading: Reading = Reading()) -> Contents:  # noqa: B008 - frozen
    """The header and the rows of a file, by its suffix.

    Raises:
        DataError: there is none, its suffix is not among SUFFIXES, it cannot be read, or it has no
            header.
    """
    builder, kind = Builder(), _kind_of(path)
    with _as_data_errors(path):
        rows = kind.rows(path, reading)
        header = _header(path, next(rows, None), reading, kind)
        for line, cells in rows:
            builder.add(line, cells)
        found = contents(header, builder.rows())
        if kind.name in TEXT and reading.encoding in WINDOWS_ENCODINGS:
            wrong = found.rows.lines_with(C1_CONTROL)
            if wrong:
                where = rows_in_words(wrong[:SHOWN_ROWS], len(wrong))
                raise wrong_encoding(path, reading, where)
    encoding = reading.encoding if kind.name in TEXT else "utf-8"
    return found._replace(named=kind.name != "CoNLL", encoding=encoding)


def header(path: Path, reading: Reading = Reading()) -> Contents:  # noqa: B008 - frozen
    """The names of a file's columns, without its rows. Its first rows are looked at only where the
    header of a CSV file can be divided by more than one delimiter.

    Raises:
        DataError: as `read`.
    """
    kind = _kind_of(path)
    with _as_data_errors(path):
        rows = kind.rows(path, reading)
        try:
            names = _header(path, next(rows, None), reading, kind)
        finally:
            rows.close()
    return Contents(names, Rows(), (), kind.name != "CoNLL")


def _header(path: Path, row: Row | None, reading: Reading, kind: _Kind) -> list[str]:
    """The names in a source's first row."""
    if row is None:
        raise DataError(
            f"Data file {path.name} is empty: it has no header.", code=ErrorCode.TOO_FEW_ROWS
        )
    names = header_of(row[1])
    text = "\n".join(names)
    if kind.name in TEXT and reading.encoding in WINDOWS_ENCODINGS and re.search(C1_CONTROL, text):
        raise wrong_encoding(path, reading, "its header")
    if re.search(CONTROL, text):
        raise DataError(
            f"The header of {path.name} holds control characters: the file is in another encoding, "
            "damaged or something else than its suffix says."
        )
    return names


@contextmanager
def _as_data_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system and of decompression as one sentence about the file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(
            f"Data file {path.name} cannot be decompressed: it is cut short, damaged or not "
            "written by gzip."
        ) from None
    except OSError as error:
        raise DataError(
            f"Data file {path.name} cannot be read: {error.strerror or 'unknown cause'}."
        ) from None


def _csv(path: Path, reading: Reading) -> Iterator[Row]:
    """Blank lines are passed over."""
    line = 1
    with decoded(path, reading, "CSV") as file:
        delimiter = reading.delimiter or _delimiter(path, reading, file.read(SAMPLE))
    with decoded(path, reading, "CSV") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error:  # its own text may quote the file
            raise DataError(
                f"Data file {path.name} cannot be read as CSV with '{DELIMITERS[delimiter]}' "
                f"between cells: the row that starts on line {line} has a quote that does not "
                "close or that text follows, or a field of more than "
                f"{csv.field_size_limit() >> 10} KiB."
            ) from None


def _delimiter(path: Path, reading: Reading, sample: str) -> str:
    """The one that divides the header. Where several do, the one by which most of the first rows
    have as many cells as the header.

    Raises:
        DataError: that is so of more than one.
    """
    usual = "\t" if ".tsv" in map(str.lower, path.suffixes) else ","
    fitting: dict[str, int] = {}
    for delimiter in DELIMITERS:
        rows = _first_rows(sample, delimiter)
        if rows and len(rows[0]) > 1:
            fitting[delimiter] = sum(len(cells) == len(rows[0]) for cells in rows)
    best = [one for one, fits in fitting.items() if fits == max(fitting.values())]
    if len(best) > 1 and not (usual == "\t" and usual in best):
        names = " and ".join(f"'{DELIMITERS[one]}'" for one in best)
        raise DataError(
            f"The header of {path.name} can be divided by {names}: set "
            f"{reading.setting('delimiter', DELIMITERS[best[-1]])}, or whichever is right."
        )
    return best[0] if best and usual not in best else usual


def _first_rows(sample: str, delimiter: str) -> list[list[str]]:
    """The rows of a beginning of a file; fewer where they cannot be read by this delimiter."""
    rows: list[list[str]] = []
    whole = len(sample) < SAMPLE
    try:
        reader = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, strict=True)
        for cells in islice(filter(None, reader), SAMPLE_ROWS + 1):
            rows.append(cells)
    except csv.Error:
        return rows
    # The last row of a sample may be cut.
    return rows if whole or len(rows) in (1, SAMPLE_ROWS + 1) else rows[:-1]


class _Pairs(tuple[tuple[str, Any], ...]):
    """A JSON object as it stands, also with a key twice."""

    __slots__ = ()


def _json_lines(path: Path, reading: Reading) -> Iterator[Row]:
    """One object a line, all with the keys of the first, in any order; blank lines passed over."""
    problems = Problems()
    header: list[str] = []
    with decoded(path, reading, "JSON Lines") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                found = json.loads(text, object_pairs_hook=_Pairs)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, _Pairs):
                problems.add(
                    ErrorCode.NOT_A_TABLE, "a line is no JSON object", line, text[:80].strip()
                )
                continue
            row = dict(found)
            if len(row) < len(found):
                problems.add(
                    ErrorCode.NOT_A_TABLE, "a key stands twice in a line", line, ", ".join(row)
                )
                continue
            if row and not header:
                try:
                    header = [cell(name) for name in row]
                except NotTextError as error:
                    problems.add(ErrorCode.NOT_A_TABLE, f"a key holds {error}", line, "")
                    continue
                yield line, header
            if not header or row.keys() != set(header):
                problems.add(
                    ErrorCode.NOT_A_TABLE,
                    "a line has other keys than the first one",
                    line,
                    ", ".join(sorted(row.keys() ^ set(header))),
                )
                continue
            try:
                cells = [cell(row[name]) for name in header]
            except NotTextError as error:
                problems.add(ErrorCode.NOT_A_TABLE, str(error), line, "")
                continue
            yield line, cells
    problems.raise_if_any(f"Data file {path.name} cannot be read", "Correct those lines.")


def _conll(path: Path, reading: Reading) -> Iterator[Row]:
    """A word a line, a blank line between sentences; the first and last field are word and tag."""
    problems, fields = Problems(), 0
    start, words, tags = 0, list[str](), list[str]()
    yield 0, CONLL_HEADER
    with decoded(path, reading, "CoNLL") as file:
        for line, text in enumerate(file, start=1):
            # By ASCII's white space alone: another character may be part of a letter whose bytes
            # were read in a wrong encoding, and those bytes must stay whole
            # (client/records/written_forms.py).
            parts = [part.strip(string.whitespace) for part in text.split("\t")]
            if len(parts) < 2:
                parts = _ASCII_WORD.findall(text)
            if not any(parts) or parts[0] == DOCUMENT:
                if words:
                    yield start, [" ".join(words), " ".join(tags)]
                words, tags = [], []
                continue
            fields = fields or len(parts)
            if len(parts) != fields or fields < 2:
                problems.add(
                    ErrorCode.NOT_A_TABLE,
                    "a line has not a word and its tag, or not as many fields as the first",
                    line,
                    text[:80].strip(),
                )
            elif len(parts[0].split()) != 1 or len(parts[-1].split()) != 1:
                problems.add(
                    ErrorCode.NOT_A_TABLE,
                    "a word or tag is empty or has a space in it",
                    line,
                    text[:80].strip(),
                )
            if not words:
                start = line
            words.append(parts[0])
            tags.append(parts[-1])
        if words:
            yield start, [" ".join(words), " ".join(tags)]
    problems.raise_if_any(
        f"Data file {path.name} cannot be read as CoNLL",
        "Correct those lines. (A table of other columns is read from .csv or .tsv.)",
    )


def _parquet(path: Path, _: Reading) -> Iterator[Row]:
    """Columns of text, numbers, times, yes or no and lists of words; its text is always UTF-8."""
    from pyarrow import parquet

    problems, line = Problems(), 1
    try:
        with parquet.ParquetFile(path) as file:
            nested = [
                f"'{field.name}' ({_kind(field.type)})"
                for field in file.schema_arrow
                if not _is_readable(field.type)
            ]
            if nested:
                raise DataError(
                    f"Data file {path.name} has columns that are neither one value a row nor a "
                    f"list of words: {', '.join(nested)}. Leave them out, or write them as text.",
                    code=ErrorCode.NOT_A_TABLE,
                )
            yield 0, list(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BLOCK_ROWS):
                columns = [_as_text(column, line, problems) for column in batch.columns]
                for cells in zip(*columns, strict=True):
                    yield line, list(cells)
                    line += 1
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the system's; pyarrow has none for damage
        raise DataError(
            f"Data file {path.name} cannot be read as Parquet: it is cut short, damaged, or "
            f"something else. Rows read before: {line - 1:,}."
        ) from None
    problems.raise_if_any(f"Data file {path.name} cannot be read", "Correct those rows.")


def _is_list(kind: Any) -> bool:
    types = pa.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _is_readable(kind: Any) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if _is_list(kind):
        inner = kind.value_type
        if types.is_dictionary(inner):
            inner = inner.value_type
        return bool(
            types.is_string(inner)
            or types.is_large_string(inner)
            or types.is_string_view(inner)
            or types.is_null(inner)
        )
    return not (
        types.is_nested(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or isinstance(kind, pa.BaseExtensionType)
    )


def _kind(kind: Any) -> str:
    """'list', not list<item: struct<…>>."""
    return str(kind).split("<", maxsplit=1)[0].split("[", maxsplit=1)[0]


def _as_text(column: Any, line: int, problems: Problems) -> list[str]:
    """A column's cells, the first in row `line`; what is there often is written once."""
    if _is_list(column.type):
        return [
            _list_as_text(value, line + at, problems) for at, value in enumerate(column.to_pylist())
        ]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    found = column.dictionary_encode()
    values = found.dictionary.to_pylist()
    if pa.types.is_float16(column.type) or pa.types.is_float32(column.type):
        values = [float(str(np.float32(value))) for value in values]  # 0.1, not 0.10000000149
    words = [*map(cell, values), ""]  # the last one for null
    return [words[i] for i in found.indices.fill_null(len(values)).to_numpy().tolist()]


def _list_as_text(value: object, line: int, problems: Problems) -> str:
    try:
        return cell(value)
    except NotTextError as error:
        problems.add(ErrorCode.NOT_A_TABLE, str(error), line, "")
        return ""


class _Kind(NamedTuple):
    """rows: yields the header as a row, then the rows. name: of the format."""

    name: str
    rows: Callable[[Path, Reading], Any]


TEXT = ("CSV", "JSON Lines", "CoNLL")  # with an encoding; may be compressed by gzip
KINDS = {
    ".csv": _Kind("CSV", _csv),
    ".tsv": _Kind("CSV", _csv),
    ".jsonl": _Kind("JSON Lines", _json_lines),
    ".ndjson": _Kind("JSON Lines", _json_lines),
    ".parquet": _Kind("Parquet", _parquet),
    ".xlsx": _Kind("Excel", workbook.rows),
    ".conll": _Kind("CoNLL", _conll),
    ".iob": _Kind("CoNLL", _conll),
    ".iob2": _Kind("CoNLL", _conll),
    ".bio": _Kind("CoNLL", _conll),
    ".txt": _Kind("CoNLL", _conll),
}
SUFFIXES = tuple(KINDS)
# What to do about a file of another kind.
ADVICE = {
    "Save the sheet as .xlsx or .csv.": (".xls", ".xlsm", ".xlsb", ".ods", ".numbers"),
    "Write one object a line, as .jsonl.": (".json",),
    "Unpack it first.": (
        ".zip",
        ".tar",
        ".tgz",
        ".gz",
        ".bz2",
        ".xz",
        ".zst",
        ".7z",
        ".rar",
    ),
}


def _kind_of(path: Path) -> _Kind:
    """By the suffix; DataError if there is no such file, or no such kind."""
    try:
        is_file = path.is_file()
    except PermissionError:
        raise DataError(f"Data file {path} is in a folder that this user may not enter.") from None
    if not is_file:
        what = "is no file" if path.exists() else "does not exist"
        raise DataError(f"Data file {path} {what}.{_neighbours(path)}")
    suffix = path.suffix.lower()
    if suffix == ".gz":
        kind = KINDS.get(Path(path.stem).suffix.lower())
        if kind is not None and kind.name in TEXT:
            return kind
    if suffix not in KINDS:
        advice = next(
            (words for words, ends in ADVICE.items() if suffix in ends), "Save it in one of these."
        )
        what = f"{suffix} files are not" if suffix else "a file without a suffix is not"
        raise DataError(
            f"Data file {path.name}: {what} read. {advice} Read are {', '.join(SUFFIXES)}, and "
            "text files compressed by gzip, such as .csv.gz."
        )
    return KINDS[suffix]


def _neighbours(path: Path) -> str:
    """' CSV files in that folder: …' and the same for other formats, of those there are."""
    found = ""
    for kind in dict.fromkeys(kind.name for kind in KINDS.values()):
        ends = [suffix for suffix, other in KINDS.items() if other.name == kind]
        ends += [f"{end}.gz" for end in ends if kind in TEXT]
        names = sorted(p.name for end in ends for p in path.parent.glob(f"*{end}"))[:5]
        found += f" {kind} files in that folder: {', '.join(names)}." if names else ""
    return found
