"""Rows of an Excel workbook (.xlsx): of the only sheet that has cells in it.

Values are those that Excel computed last; numbers, yes and no and dates have the form that other
formats give (common/data/text_table.py). Rows that are hidden or filtered out are rows like the
others. Control characters in text stand in the file as `_x000D_` (ST_Xstring, ECMA-376 part 1,
22.9.2.19): they are characters again in what is read. That very text, `_x005F_x000D_` in the file,
cannot be told from them where openpyxl takes `x005F_` away, which is nearly everywhere; every other
`_xHHHH_` is text.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from silotune.common.data.text_table import Row
from silotune.common.errors import DataError, ErrorCode
from silotune.common.formats.cell_values import NotTextError, cell

FORMULA = re.compile(rb"<(?:\w+:)?f[ >/]")
BLOCK = 1 << 20  # bytes
# Of what XML cannot hold, and the mark of what is none. openpyxl writes other such text as it is.
ESCAPE = re.compile("_x(00[01][0-9A-F]|005F|FFF[EF])_", re.IGNORECASE)
LARGEST = 1 << 53  # up to here a floating-point number holds every whole number
DIGITS = 12  # of a larger number that it may have
LONG = (
    "a number beyond 2^53 with more than 12 digits, as identifiers have: workbooks keep 15 to "
    "17 digits of a number, so it may be another one by now"
)
MOST_CHARACTERS = 32_767  # of a cell, in UTF-16 units: programs cut what is longer without a word
CUT = (
    "a text of 32,767 characters, the most that a cell of a workbook can hold, so its end may have "
    "been cut off"
)
ERROR = "an error of Excel's, such as #N/A, or a formula without a value, where a value is expected"


def rows(path: Path, _: object) -> Iterator[Row]:
    """The header as a row, then the rows, each with its number in the sheet; blank ones are passed
    over.

    Raises:
        DataError: it is no workbook, has several sheets with cells in them, or cells that hold an
            error, a formula that was never computed, a number so long that digits may be lost, or
            a text so long that its end may be.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats and rules that are not read
            found = _rows(path)
    except DataError:
        raise
    except OSError as error:
        if error.errno:
            raise
        raise _damaged(path) from None
    except Exception:  # openpyxl raises what it meets in a damaged file
        raise _damaged(path) from None
    yield from found


def unescaped(text: str) -> str:
    """Text with the control characters that its escapes stand for: 'a_x000D_' is 'a\\r'."""
    return ESCAPE.sub(lambda found: chr(int(found[1], 16)), text) if "_x" in text.lower() else text


def _damaged(path: Path) -> DataError:
    return DataError(
        f"Data file {path.name} cannot be read as an Excel workbook: it is cut short, damaged, "
        "protected by a password, or something else."
    )


def _rows(path: Path) -> list[Row]:
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    formulas = openpyxl.load_workbook(path, read_only=True) if _has_formulas(path) else None
    try:
        found: dict[str, list[Row]] = {}
        wrong: list[int] = []
        long: list[int] = []
        cut: list[int] = []
        for sheet in book.worksheets:
            beside = formulas[sheet.title] if formulas is not None else None
            own = _rows_of(sheet, beside, wrong, long, cut)
            if own:
                found[sheet.title] = own
    finally:
        book.close()
        if formulas is not None:
            formulas.close()
    if len(found) > 1:
        raise DataError(
            f"Data file {path.name} has {len(found)} sheets with cells in them: keep the one with "
            "the records, or save it as .csv.",
            code=ErrorCode.NOT_A_TABLE,
            local=f"sheets: {', '.join(found)}",
        )
    _refuse(path, wrong, ERROR, "Correct those cells.")
    _refuse(path, long, LONG, "Write that column as text, from the source that had all digits.")
    _refuse(path, cut, CUT, "Save the records as .csv or .parquet, from the source that has all.")
    return next(iter(found.values()), [])


def _refuse(path: Path, lines: list[int], what: str, remedy: str) -> None:
    """DataError if there are such rows."""
    if lines:
        more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise DataError(
            f"Data file {path.name} has {what}: row{'s' * (len(lines) > 1)} "
            f"{', '.join(map(str, lines[:10]))}{more}. {remedy}",
            code=ErrorCode.NOT_A_TABLE,
        )


def _rows_of(
    sheet: Any, formulas: Any, wrong: list[int], long: list[int], cut: list[int]
) -> list[Row]:
    """formulas: the same sheet with formulas in place of their values, if it has any. wrong takes
    the numbers of rows with a cell that has no value, long those of rows with a number too long,
    cut those of rows with a text that may have been cut."""
    found: list[Row] = []
    width = 0
    sheet.reset_dimensions()  # some programs write them wrongly
    if formulas is not None:
        formulas.reset_dimensions()
    beside = formulas.iter_rows() if formulas is not None else None
    for line, cells in enumerate(sheet.iter_rows(), start=1):
        own = next(beside) if beside is not None else cells
        row = [_text(one) for one in cells]
        bad = any(
            one.data_type == "e" or (other.data_type == "f" and one.value is None)
            for one, other in zip(cells, own, strict=True)
        )
        if bad:
            wrong.append(line)
        if any(_may_have_lost_digits(one.value) for one in cells):
            long.append(line)
        if any(_may_be_cut(one.value) for one in cells):
            cut.append(line)
        while row and not row[-1] and (len(row) > width or not found):
            row.pop()
        if not any(row) and not bad:
            continue
        width = width or len(row)
        found.append((line, row + [""] * (width - len(row))))
    return found


def _may_have_lost_digits(value: object) -> bool:
    if not isinstance(value, int | float) or not LARGEST < abs(value) < math.inf:
        return False
    return len(Decimal(repr(value)).normalize().as_tuple().digits) > DIGITS


def _may_be_cut(value: object) -> bool:
    """Also where the last one would have been half of a character of two units."""
    if not isinstance(value, str) or 2 * len(value) < MOST_CHARACTERS - 1:
        return False
    units = len(value.encode("utf-16-le", "surrogatepass")) // 2
    return units >= MOST_CHARACTERS - (units > len(value))


def _text(one: Any) -> str:
    value = one.value
    if isinstance(value, str):
        value = unescaped(value)
    if isinstance(value, datetime):
        from openpyxl.styles.numbers import is_datetime

        if is_datetime(one.number_format) == "date":
            value = value.date()
    try:
        return cell(value)
    except NotTextError:
        return str(value)


def _has_formulas(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not name.startswith("xl/worksheets/"):
                continue
            with archive.open(name) as file:
                before = b""
                while block := file.read(BLOCK):
                    if FORMULA.search(before + block):
                        return True
                    before = block[-16:]
    return False
