"""Where records come from: CSV, JSON Lines and Parquet files, read in blocks into compact rows.

Each cell is text (common/cells.py). What CSV has between its commas is taken as it stands.

Row numbers: of CSV and JSON Lines the line on which a row starts, the first line being 1; of
Parquet and queries (common/query.py) the number of the row, from 1.

Errors name file, column and row numbers. A record's value appears only in `DataError.local`.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from silotune.common.cells import BLOCK_ROWS, Builder, NotTextError, Rows, cell
from silotune.common.errors import DataError

SHOWN_ROWS = 10
SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
SAMPLE = 1 << 16  # bytes from which an encoding is guessed


class Problems:
    """What is wrong with which rows; values are kept apart from what may be logged."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = {}
        self.shown: dict[tuple[str, str], list[tuple[int, str]]] = {}

    def add(self, code: str, what: str, line: int, value: str) -> None:
        kind = (code, what)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= SHOWN_ROWS:
            self.shown.setdefault(kind, []).append((line, value))

    def raise_if_any(
        self, what: str, mend: str = "Correct those rows, or agree on another contract."
    ) -> None:
        """DataError with every kind of problem and its first rows."""
        if not self.counts:
            return
        parts = [
            f"{kind[1]}: {rows_in_words([row for row, _ in places], self.counts[kind])}"
            for kind, places in self.shown.items()
        ]
        raise DataError(
            f"{what}: {'; '.join(parts)}. {mend} ε spent: 0.",
            code=next(iter(self.shown))[0],
            local="; ".join(
                f"row {row} has {value!r}" for places in self.shown.values()
                for row, value in places
            ),
        )


def rows_in_words(first: Sequence[int], count: int) -> str:
    """'rows 2, 7 and 25 more', of `count` rows the first ones."""
    more = f" and {count - len(first)} more" if count > len(first) else ""
    return f"row{'s' * (count > 1)} {', '.join(map(str, first))}{more}"


def read(path: Path, encoding: str = "utf-8") -> tuple[list[str], Rows]:
    """The header and the rows of a file, by its suffix; what has another one is read as CSV.

    DataError if there is none, it cannot be read, or it has no header.
    """
    try:
        is_file = path.is_file()
    except PermissionError:
        raise DataError(f"Data file {path} lies in a folder this user may not enter.") from None
    if not is_file:
        what = "is no file" if path.exists() else "does not exist"
        raise DataError(f"Data file {path} {what}.{_neighbours(path)}")
    reader: Callable[[Path, str], tuple[list[str], Rows]] = {
        ".parquet": _parquet, ".jsonl": _json_lines, ".ndjson": _json_lines,
    }.get(path.suffix.lower(), _csv)
    try:
        return reader(path, encoding)
    except OSError as error:
        raise DataError(
            f"Data file {path.name} cannot be read ({type(error).__name__})."
        ) from None


def _neighbours(path: Path) -> str:
    """' CSV files in that folder: …' and the same for other formats, of those there are."""
    found = ""
    for kind, suffixes in (
        ("CSV", SUFFIXES[:1]), ("JSON Lines", SUFFIXES[1:3]), ("Parquet", SUFFIXES[3:])
    ):
        names = sorted(p.name for end in suffixes for p in path.parent.glob(f"*{end}"))[:5]
        found += f" {kind} files in that folder: {', '.join(names)}." if names else ""
    return found


def _csv(path: Path, encoding: str) -> tuple[list[str], Rows]:
    """Blank lines are passed over."""
    builder, header, line = Builder(), None, 1
    try:
        with path.open(encoding=_codec(encoding), newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if cells and header is None:
                    header = cells
                elif cells:
                    builder.add(line, cells)
                line = reader.line_num + 1
    except UnicodeError as error:
        raise _not_decoded(path, encoding, "CSV", error) from None
    except csv.Error:  # its own text may quote the file
        raise DataError(
            f"Data file {path.name} cannot be read as UTF-8 CSV: the row that starts on line "
            f"{line} has a quote that does not close or that text follows, or a field of more "
            f"than {csv.field_size_limit() >> 10} KiB."
        ) from None
    if header is None:
        raise DataError(f"Data file {path.name} is empty: it has no header.", code="E304")
    return header, builder.rows()


def _codec(encoding: str) -> str:
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def _not_decoded(path: Path, encoding: str, kind: str, error: UnicodeError) -> DataError:
    """Where the text stops being what it should be, and what it looks like."""
    name = codecs.lookup(encoding).name.upper()
    what = f"Data file {path.name} cannot be read as {name} {kind}"
    line, sample = 1, b""
    decoder = codecs.getincrementaldecoder(encoding)()
    with path.open("rb") as file:
        while block := file.read(SAMPLE):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as found:
                before = found.object[: found.start]
                line += max(before.count(b"\n"), before.count(b"\r"))
                sample = found.object[found.start - min(found.start, SAMPLE // 2) :]
                break
            except UnicodeError:  # UTF-16 without its mark
                break
            line += max(block.count(b"\n"), block.count(b"\r"))
    likely = _likely_encoding(path, sample) if encoding == "utf-8" else ""
    if not likely:
        return DataError(f"{what} ({type(error).__name__}): line {line} is not {name}. "
                         "data.encoding in site.toml says how it is written.")
    return DataError(
        f"{what} ({type(error).__name__}): line {line} is not {name}, it looks like {likely}. "
        f"If that is right, set encoding = \"{likely}\" in [data] of site.toml; `silotune site "
        "prepare` then writes it anew as UTF-8."
    )


def _likely_encoding(path: Path, sample: bytes) -> str:
    """A guess from the bytes about the place; '' if there is none."""
    with path.open("rb") as file:
        start = file.read(4)
    for mark, name in (
        (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if start.startswith(mark):
            return name
    from charset_normalizer import from_bytes

    found = from_bytes(sample).best()
    if found is None or found.encoding.startswith(("utf_16", "utf_32")):
        return ""
    # Of the many encodings of one byte a character that give the same text, the one people know.
    alike = {found.encoding, *found.could_be_from_charset}
    return "latin-1" if alike & {"latin_1", "cp1252"} else found.encoding.replace("_", "-")


class _Pairs(tuple[tuple[str, Any], ...]):
    """A JSON object as it stands, also with a key twice."""

    __slots__ = ()


def _json_lines(path: Path, encoding: str) -> tuple[list[str], Rows]:
    """One object a line, all with the keys of the first, in any order; blank lines passed over."""
    builder, problems = Builder(), Problems()
    header: list[str] = []
    try:
        with path.open(encoding=_codec(encoding), newline="\n") as file:
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    found = json.loads(text, object_pairs_hook=_Pairs)
                except (ValueError, RecursionError):
                    found = None
                if not isinstance(found, _Pairs):
                    problems.add("E311", "a line is no JSON object", line, text[:80].strip())
                    continue
                row = dict(found)
                if len(row) < len(found):
                    problems.add("E311", "a key stands twice in a line", line, ", ".join(row))
                    continue
                try:
                    header = header or [cell(name) for name in row]
                except NotTextError as error:
                    problems.add("E311", f"a key holds {error}", line, "")
                    continue
                if row.keys() != set(header):
                    problems.add("E311", "a line has other keys than the first one", line,
                                 ", ".join(sorted(row.keys() ^ set(header))))
                    continue
                try:
                    builder.add(line, [cell(row[name]) for name in header])
                except NotTextError as error:
                    problems.add("E311", str(error), line, "")
    except UnicodeError as error:
        raise _not_decoded(path, encoding, "JSON Lines", error) from None
    problems.raise_if_any(f"Data file {path.name} cannot be read", "Correct those lines.")
    if not header:
        raise DataError(f"Data file {path.name} is empty: it has no line.", code="E304")
    return header, builder.rows()


def _parquet(path: Path, _: str) -> tuple[list[str], Rows]:
    """Columns of text, numbers, times and yes or no; Parquet's text is always UTF-8."""
    from pyarrow import parquet

    builder, line = Builder(), 1
    try:
        with parquet.ParquetFile(path) as file:
            nested = [
                f"'{field.name}' ({_kind(field.type)})"
                for field in file.schema_arrow if not _is_plain(field.type)
            ]
            if nested:
                raise DataError(
                    f"Data file {path.name} has columns that are not one value a row: "
                    f"{', '.join(nested)}. Leave them out, or write them as text.", code="E311",
                )
            header = list(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BLOCK_ROWS):
                columns = [_as_text(column) for column in batch.columns]
                for cells in zip(*columns, strict=True):
                    builder.add(line, cells)
                    line += 1
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the system's; pyarrow has none for damage
        raise DataError(
            f"Data file {path.name} cannot be read as Parquet ({type(error).__name__}): it is cut "
            f"short, damaged, or something else. Rows read before: {line - 1:,}."
        ) from None
    return header, builder.rows()


def _is_plain(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not (
        pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind) or isinstance(kind, pa.BaseExtensionType)
    )


def _kind(kind: Any) -> str:
    """'list', not list<item: struct<…>>."""
    return str(kind).split("<", maxsplit=1)[0].split("[", maxsplit=1)[0]


def _as_text(column: Any) -> list[str]:
    """A column's cells; what is there often is written once."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    found = column.dictionary_encode()
    values = found.dictionary.to_pylist()
    if pa.types.is_float16(column.type) or pa.types.is_float32(column.type):
        values = [float(str(np.float32(value))) for value in values]  # 0.1, not 0.10000000149
    words = [*map(cell, values), ""]  # the last one for null
    return [words[i] for i in found.indices.fill_null(len(values)).to_numpy().tolist()]
