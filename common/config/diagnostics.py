"""What is wrong with a configuration, in sentences: file, line, key, value and what is allowed."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from silotune.common.config.key_paths import keys_of
from silotune.common.errors import ContractError, did_you_mean
from silotune.common.runtime.terminal import escaped

Lines = dict[tuple[str | int, ...], int]

# The error type of settings that are valid alone but not together.
CONSTRAINT_VIOLATIONS = "constraint_violations"
WORDS = {
    "tuple_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "string_type": "must be text",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "finite_number": "must be a finite number",
    "path_type": "must be a path",
}
LONGEST_KEY = 200
PATTERNS = {  # part of a pattern -> what it means; the first that fits
    "{64}": "must be 64 hexadecimal digits",
    "{128}": "must be 128 hexadecimal digits",
    "{16}": "must be 16 hexadecimal digits",
    "A-Za-z0-9 ._-": "must be a plain name of letters, digits, space, '.', '_' or '-'",
    "a-z0-9-": "must be a name of lower-case letters, digits and '-'",
    "ecdsa-sha2": "must be an ECDSA public key of OpenSSH (ecdsa-sha2-nistp384 …)",
    ":\\d{1,5}": "must be HOST:PORT, such as fl.example.org:8443",
    "A-Za-z0-9.:-": "must be a host name or an IP address, such as fl.example.org",
    "A-Fa-f.:": "must be an IP address, such as 192.0.2.7",
    "cuda": 'must be "auto", "cpu", "cuda" or "cuda:0" and so on',
}


def contract_error(
    error: ValidationError, source: str, root: type[BaseModel], lines: Lines | None = None
) -> ContractError:
    """All problems of one validation; `lines` (key_lines) adds the line of each key."""
    errors = error.errors()
    deep = [e["loc"] for e in errors]
    sentences: list[str] = []
    for e in errors:
        loc = e["loc"]
        if e["type"] == "too_short" and any(d[: len(loc)] == loc and d != loc for d in deep):
            continue  # only short because its bad elements, told by themselves, fell out
        if e["type"] == CONSTRAINT_VIOLATIONS:
            sentences += [
                f"{what} ({_where((*loc, key), source, lines or {})})."
                for key, what in e["ctx"]["wrong"]
            ]
        else:
            sentences.append(_sentence(e, source, lines or {}, root))
    return ContractError([escaped(sentence, lines=False) for sentence in sentences])


def _sentence(error: Any, source: str, lines: Lines, root: type[BaseModel]) -> str:
    loc, known = keys_of(root, error["loc"])
    where = _where(loc, source, lines)
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in loc)
    key = key if len(key) <= LONGEST_KEY else key[:LONGEST_KEY] + "…"
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return (
            f"Unknown key '{key}' ({where}).{did_you_mean(str(loc[-1]), known)}"
            f" Allowed: {', '.join(sorted(known))}."
        )
    if kind == "missing":
        return f"Key '{key}' is missing ({where})."
    if kind == "union_tag_not_found":
        return f"Key '{key}.kind' is missing ({where})."
    if kind == "value_error":
        return f"{error['msg'].removeprefix('Value error, ')} ({where})."
    if kind == "union_tag_invalid":
        key, got = f"{key}.kind", f", got '{context['tag']}'"
        message = f"must be one of {context['expected_tags']}"
    else:
        got = _got(error["input"])
        message = WORDS.get(kind) or error["msg"].replace("Input should be", "must be")
        if kind == "string_pattern_mismatch":
            message = next(
                (words for part, words in PATTERNS.items() if part in context["pattern"]),
                f"must match {context['pattern']}",
            )
        if kind == "too_short":
            message = f"needs at least {context['min_length']}, has {context['actual_length']}"
    hint = ""
    if kind == "literal_error":
        hint = did_you_mean(str(error["input"]), re.findall(r"'([^']+)'", context["expected"]))
    return f"'{key}' {message}{got} ({where}).{hint}"


def _where(loc: tuple[str | int, ...], source: str, lines: Lines) -> str:
    """file:line of a key, or of the nearest table around it."""
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    return f"{source}:{line}" if line else source


def _got(value: Any) -> str:
    """The bad value, shortened; a whole table or list is not repeated."""
    if not isinstance(value, str | int | float | bool):
        return ""
    if isinstance(value, str | bool):
        text = json.dumps(value, ensure_ascii=False)
    else:
        try:
            text = repr(value)
        except ValueError:  # more digits than Python converts
            return ", got a number with thousands of digits"
    return f", got {text if len(text) <= 60 else text[:57] + '…'}"


def key_lines(text: str) -> Lines:
    """The line of each key and table, for messages; inline tables point at the line they start."""
    lines: Lines = {}
    table: tuple[str | int, ...] = ()
    counts: dict[tuple[str | int, ...], int] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith("[["):
            path = tuple(p.strip().strip('"') for p in line.strip("[]").split("]")[0].split("."))
            counts[path] = counts.get(path, -1) + 1
            lines.setdefault(path, number)
            table = (*path, counts[path])
        elif line.startswith("["):
            table = tuple(p.strip().strip('"') for p in line[1:].split("]")[0].split("."))
        elif "=" in line and not line.startswith("#"):
            key = line.split("=", 1)[0].strip().strip('"')
            lines[(*table, *key.split("."))] = number
            continue
        else:
            continue
        lines.setdefault(table, number)
    return lines
