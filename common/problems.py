"""What is wrong with a configuration, in sentences: file, line, key, value and what is allowed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from silotune.common.errors import ContractError, did_you_mean

Lines = dict[tuple[str | int, ...], int]


def contract_error(
    error: ValidationError, source: str, root: type[BaseModel], lines: Lines | None = None
) -> ContractError:
    """All problems of one validation; `lines` (key_lines) adds the line of each key."""
    return ContractError([_sentence(e, source, lines or {}, root) for e in error.errors()])


def _sentence(
    error: Any, source: str, lines: Lines, root: type[BaseModel]
) -> str:
    # Discriminated unions put the chosen tag into the path; it is no key of the file.
    tags = {("input", "table"), ("input", "text"), ("model", "encoder"), ("model", "one-hot")}
    loc = tuple(
        part
        for before, part in zip((None, *error["loc"]), error["loc"], strict=False)
        if (before, part) not in tags
        and not (isinstance(before, int) and part in ("number", "category"))
    )
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    where = f"{source}:{line}" if line else source
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in loc)
    if error["type"] == "extra_forbidden":
        known = _keys_at(root, loc[:-1])
        return (
            f"Unknown key '{key}' ({where}).{did_you_mean(str(loc[-1]), known)}"
            + (f" Allowed: {', '.join(sorted(known))}." if known else "")
        )
    if error["type"] == "missing":
        return f"Key '{key}' is missing ({where})."
    if error["type"] == "value_error":
        return f"{error['msg'].removeprefix('Value error, ')} ({where})."
    if error["type"] in ("int_type", "int_parsing", "int_from_float"):
        return f"'{key}' must be a whole number, got {error['input']!r} ({where})."
    message = error["msg"][0].lower() + error["msg"][1:]
    value = error["input"]
    got = f", got {value!r}" if isinstance(value, str | int | float | bool) else ""
    return f"'{key}': {message}{got} ({where})."


def _keys_at(root: type[BaseModel], loc: tuple[str | int, ...]) -> set[str]:
    """The keys allowed at a path (the union of the alternatives)."""
    models = [root]
    for part in loc:
        if isinstance(part, str):
            models = [
                found
                for model in models
                if part in model.model_fields
                for found in _models_in(model.model_fields[part].annotation)
            ]
    return {key for model in models for key in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]


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
