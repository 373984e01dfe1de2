"""How a single value is written as a cell of text, and read from one.

Each value of a format that has types is written in one way: nothing for what is absent (NULL, NaN),
1 for 1.0, otherwise the shortest digits that give the number again, true and false, 2026-01-31,
2026-01-31 10:00:00. What CSV and JSON have as text stays as it is; where a cell is compared with a
contract's values, `index_among` takes 1.0 and 1, True and true as the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

FIXED_BELOW = 10**15  # larger ones are written as their source's type has them: 1e+16


NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


# Numbers as people write them that are not read, for one country's separator is another's comma.
SEPARATED = re.compile(r"[+-]?[0-9]+(?:[_,.'’ \u00a0\u2009\u202f][0-9]+)+")


UNREAD = "; digit separators and decimal commas, as in 1_000 and 0,5, are not read"


# Not one with leading zeros or an exponent: those may be codes.
DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]*)\.[0-9]+")


# Control characters other than tab and the ends of lines, and those of them beyond ASCII: for both
# Python's regular expressions and RE2.
CONTROL = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x9F]"


C1_CONTROL = r"[\x80-\x9F]"


# Spaces, byte order marks and characters without width at the ends of a column's name.
EDGES = re.compile("^[\\s\ufeff\u200b-\u200d\u2060]+|[\\s\ufeff\u200b-\u200d\u2060]+$")


class NotTextError(ValueError):
    """An object, bytes or a list of other things than words where a cell is expected."""


def cell(value: object) -> str:
    """A value as a cell's text (see above). NotTextError if it is not one value."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _checked(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (float, Decimal, timedelta)):
        return _number(value)
    if isinstance(value, (int, date, datetime, time, UUID)):
        return str(value)
    if isinstance(value, list):
        return _words(value)
    raise NotTextError("an object or bytes where one value is expected")


def _words(values: list[object]) -> str:
    """A list of words, or of their tags, between spaces, as a task of tokens has them in a cell."""
    for word in values:
        if not isinstance(word, str):
            raise NotTextError("a list of other things than words")
        if len(word.split()) != 1 or word != word.strip():
            raise NotTextError("a list with a word that is empty or has a space in it")
    return _checked(" ".join(map(str, values)))


def unread(text: str) -> str:
    """The message about a number that is written as `number_of` does not read it; '' of others."""
    return UNREAD if SEPARATED.fullmatch(text.strip()) else ""


def number_of(text: str) -> float:
    """The number that a cell holds, or NaN for a cell that says so ('nan').

    Digits, a sign, a decimal point and an exponent are what a number is made of: '1_030', '1,030',
    'inf' and digits of other scripts are refused, as is a number beyond the range of float.

    Raises:
        ValueError: the cell is no number.
    """
    text = text.strip()
    if text.lower() == "nan":
        return math.nan
    number = float(text) if NUMBER.fullmatch(text) else math.inf
    if math.isinf(number):
        raise ValueError("not a number")
    return number


def index_among(values: Sequence[str], text: str) -> int | None:
    """The index of the value that a cell means, or None.

    It is the value itself; else the only one that is the same apart from how formats write numbers
    and yes or no: 1.0 and 1, 2.50 and 2.5, True and true.
    """
    text = text.strip()
    if text in values:
        return values.index(text)
    plain = _plain(text)
    found = [at for at, value in enumerate(values) if _plain(value) == plain]
    return found[0] if len(found) == 1 else None


def _plain(text: str) -> str:
    if text.lower() in ("true", "false"):
        return text.lower()
    if DECIMAL.fullmatch(text):
        text = text.rstrip("0").rstrip(".")
        return "0" if text == "-0" else text
    return text


def header_of(names: Sequence[str]) -> list[str]:
    """The names of columns without spaces and invisible characters around them."""
    return [EDGES.sub("", name) for name in names]


def _checked(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise NotTextError("half a character (a lone surrogate)") from None
    return text


def _number(value: float | Decimal | timedelta) -> str:
    """All digits, no zeros after the last: 1.50 is 1.5, as another source would have it."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if math.isnan(value):
        return ""
    if not -FIXED_BELOW < value < FIXED_BELOW:
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if value.is_zero() else text
