"""How the bytes of a data file become text: encoding, compression, and the errors."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, TextIO, cast

from silotune.common.errors import DataError, UsageError
from silotune.common.formats.encodings import (
    ENCODINGS,
    WINDOWS_ENCODINGS,
    encoding_of,
    usual_name,
)

DELIMITERS = {",": ",", ";": ";", "\t": "tab", "|": "|"}  # and how a user writes them
SAMPLE = 1 << 16  # bytes from which an encoding is guessed
CHAOS, ALIKE = 0.1, 0.04  # of charset-normalizer: what is no text, and which guesses are as good
GUESSES = 3
C1_BYTES = re.compile(rb"[\x80-\x9f]")
# Longer marks first: that of UTF-16 begins that of UTF-32.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What other formats begin with, and what to do about a text file that does.
OTHER_FORMATS = (
    (b"\x1f\x8b", "is compressed by gzip: add .gz to its name"),
    (b"PK\x03\x04", "is an Excel workbook or a ZIP archive: name it .xlsx, or unpack it"),
    (b"PAR1", "is a Parquet file: name it .parquet"),
    (b"\xd0\xcf\x11\xe0", "is an old Excel workbook, or one with a password: save it as .csv"),
)


def stem_of(path: Path) -> str:
    """A file's name without the suffixes of its format and compression."""
    return Path(path.name.removesuffix(".gz")).stem


def delimiter_of(name: str) -> str:
    """The delimiter that a user's word means; ValueError unless it is one of DELIMITERS."""
    found = {"tab": "\t", "\\t": "\t"}.get(name, name)
    if found not in DELIMITERS:
        allowed = " ".join(DELIMITERS.values())
        raise ValueError(f"{name!r} is not a delimiter; use one of: {allowed}")
    return found


@dataclass(frozen=True)
class Reading:
    """How a file is read, as its owner says.

    encoding: a member of common/formats/encodings.py, of CSV, JSON Lines and CoNLL files.
    delimiter: of CSV, found in the header if None. option: how the owner says a key's value, for
    messages.
    """

    encoding: str = "utf-8"
    delimiter: str | None = None
    option: str = '{key} = "{value}" in [data] of site.toml'

    @classmethod
    def of(cls, encoding: str | None, delimiter: str | None, option: str) -> Self:
        """From words of a command line; UsageError for an encoding or delimiter that is none."""
        try:
            return cls(
                encoding_of("utf-8" if encoding is None else encoding),
                None if delimiter is None else delimiter_of(delimiter),
                option,
            )
        except ValueError as error:
            raise UsageError(f"{error}.") from None

    def setting(self, key: str, value: str) -> str:
        return self.option.format(key=key, value=value)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, those of a .gz file decompressed."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rb") as file:
            yield cast(BinaryIO, file)
    else:
        with path.open("rb") as plain:
            yield plain


@contextmanager
def decoded(path: Path, reading: Reading, kind: str) -> Iterator[TextIO]:
    """The file's text, line ends as they are.

    Raises:
        DataError: the file begins with the mark of another encoding or is of another format; or,
            while it is read within, its bytes are not in the encoding.
    """
    with opened(path) as file:
        start = file.read(4)
    marked = next((name for mark, name in MARKS if start.startswith(mark)), "")
    _check_start(path, reading, start, marked)
    codec = {"utf-8": "utf-8-sig"}.get(reading.encoding, reading.encoding)
    if marked == "utf-16":
        codec = marked  # takes the mark away, and reads in its order
    try:
        with opened(path) as file, io.TextIOWrapper(file, codec, newline="") as text:
            yield text
    except UnicodeError:
        raise _not_decoded(path, reading, kind) from None


def _check_start(path: Path, reading: Reading, start: bytes, marked: str) -> None:
    for magic, what in OTHER_FORMATS:
        if start.startswith(magic):
            raise DataError(f"Data file {path.name} {what}.")
    if marked == "utf-32":
        raise DataError(f"Data file {path.name} is UTF-32, which is not read. Save it as UTF-8.")
    if marked and not reading.encoding.startswith(marked):
        raise DataError(
            f"Data file {path.name} begins with the byte order mark of {marked.upper()}, line 1 is "
            f"not {usual_name(reading.encoding).upper()}: set "
            f"{reading.setting('encoding', marked)}."
        )


def _not_decoded(path: Path, reading: Reading, kind: str) -> DataError:
    """Where the text stops being in its encoding, and which one it looks like."""
    encoding, name = reading.encoding, usual_name(reading.encoding).upper()
    what = f"Data file {path.name} cannot be read as {name} {kind}"
    line, sample = 1, b""
    decoder = codecs.getincrementaldecoder(encoding)()
    with opened(path) as file:
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
    likely = [one for one in _likely_encodings(path, sample) if one != encoding]
    if not likely:
        return DataError(
            f"{what}: line {line} is not {name}. "
            f"Set {reading.setting('encoding', 'NAME')} to the one it is in."
        )
    first, *others = map(usual_name, likely)
    shown = f"{first} (or {', '.join(others)})" if others else first
    return DataError(
        f"{what}: line {line} is not {name}, it looks like {shown}. "
        f"If that is right, set {reading.setting('encoding', first)}."
    )


def _likely_encodings(path: Path, sample: bytes) -> list[str]:
    """Guesses from the bytes about the place, the most likely first: members of ENCODINGS that give
    different texts, each of which reads like a language."""
    from charset_normalizer import from_bytes

    found: list[tuple[float, str]] = []
    for match in from_bytes(sample):
        try:
            found.append((match.chaos, encoding_of(match.encoding)))
        except ValueError:
            continue
    least = min((chaos for chaos, _ in found), default=1.0)
    if least > CHAOS:
        return []
    texts: dict[str, str] = {}
    for chaos, encoding in found:
        text = sample.decode(encoding, "replace")
        # Of those that give the same text, the one people know: they stand first in the list.
        alike = (one for one in ENCODINGS if sample.decode(one, "replace") == text)
        if chaos <= least + ALIKE:
            texts.setdefault(text, next(alike))
    likely = sorted(texts.values(), key=ENCODINGS.index)
    western = "cp1252" if _has_c1_bytes(path) else "iso8859-1"
    return list(
        dict.fromkeys(western if one in ("iso8859-1", "cp1252") else one for one in likely)
    )[:GUESSES]


def _has_c1_bytes(path: Path) -> bool:
    """Whether the file has bytes 0x80 to 0x9F: characters of cp1252, controls of latin-1."""
    with opened(path) as file:
        while block := file.read(SAMPLE):
            if C1_BYTES.search(block):
                return True
    return False


def wrong_encoding(path: Path, reading: Reading, where: str) -> DataError:
    """The message about control characters U+0080 to U+009F: their bytes are another encoding's.

    where: the rows that hold them, in words.
    """
    name = usual_name(reading.encoding)
    text = (
        f"Data file {path.name} read as {name} holds control characters (U+0080 to U+009F) in "
        f"{where}, so it is not {name}"
    )
    likely = WINDOWS_ENCODINGS[reading.encoding]
    try:
        with decoded(path, Reading(likely), "text") as file:
            while file.read(SAMPLE):
                pass
    except DataError:
        return DataError(f"{text}. Set {reading.setting('encoding', 'NAME')} to the one it is in.")
    return DataError(
        f"{text}; it looks like {likely}. If that is right, set "
        f"{reading.setting('encoding', likely)}."
    )
