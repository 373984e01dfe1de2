"""JSON that somebody else wrote: each text has one meaning, or it is refused.

`json.loads` takes the last of two equal keys and lets through NaN and half of a character (a lone
surrogate, as "\\ud800"). Another reader of the same text may take the first key; a text with half
of a character cannot be hashed or written.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

# A backslash stands in strings only, so escapes can be found without reading the structure.
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_COLON = re.compile(r"\s*:")


class _RepeatedKeyError(ValueError):
    """An object has a key twice."""


def loads(text: str | bytes) -> Any:
    """The value of one JSON text.

    Args:
        text: The whole text; bytes must be UTF-8.

    Raises:
        ValueError: It is not JSON, has a key twice in one object, half of a character, or a number
            that is not finite; the message is a clause that names the line.
        RecursionError: It is nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_float=_number, parse_constant=_constant
        )
    except _RepeatedKeyError:
        key, line = _repeated(text)
        raise ValueError(
            f"the key {key} stands twice in one object, again in line {line}; keep one of the two"
        ) from None
    if half := _half(text):
        raise ValueError(
            f"line {_line(text, half.start())} has half of a character, {half[0]} (a lone "
            "surrogate); write the whole character"
        )
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError
    return found


def _number(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        raise ValueError(f"{digits} is larger than any number here")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON has")


def _repeated(text: str) -> tuple[str, int]:
    """The first key, as JSON, that an object of a JSON text has again, and the line of that."""
    open_: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        if token[0] in "{[":
            open_.append(set())
        elif token[0] in "}]":
            open_.pop()
        elif _COLON.match(text, token.end()):
            key = json.loads(token[0])
            if key in open_[-1]:
                return json.dumps(key), _line(text, token.start())
            open_[-1].add(key)
    raise AssertionError("no key stands twice")


def _half(text: str) -> re.Match[str] | None:
    """The first escape of a surrogate that is not one of a pair."""
    high: re.Match[str] | None = None
    for escape in _ESCAPE.finditer(text) if "\\u" in text else ():
        code = int(escape[1], 16) if escape[1] else 0
        follows = high is not None and high.end() == escape.start()
        if 0xDC00 <= code <= 0xDFFF and follows:
            high = None
            continue
        if high is not None:
            return high
        if 0xDC00 <= code <= 0xDFFF:
            return escape
        high = escape if 0xD800 <= code <= 0xDBFF else None
    return high


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
