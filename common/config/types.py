"""What every configuration file is made of: frozen models, bounded values, and how one is read.

Unknown keys fail. Every problem of a file is told at once, with file, line, key, value and what is
allowed (common/config/diagnostics.py).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
)

from silotune.common.config.diagnostics import contract_error, key_lines
from silotune.common.errors import ErrorCode, UsageError
from silotune.common.formats import strict_json

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Rate = Annotated[float, Field(gt=0, le=1, strict=True)]
SamplingRate = Annotated[float, Field(ge=1e-6, le=1, strict=True)]  # below, RDP is not computed
Bound = Annotated[float, Field(ge=1e-6, le=1e6, strict=True)]  # of what one record can add
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Epsilon = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False, strict=True)]
Delta = Annotated[float, Field(gt=0, lt=0.01, strict=True)]


def _distinct(values: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
    """ValueError that names a member which stands there more than once."""
    for at, value in enumerate(values):
        if value in values[:at]:
            raise ValueError(f"{info.field_name} names {value!r} more than once")
    return values


def _as_cells(values: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    """ValueError that names a value which no cell has: cells are read without outer spaces."""
    for value in values:
        if value != value.strip():
            raise ValueError(
                f"{info.field_name} has {value!r}, and cells are read without spaces at their "
                "ends: no cell would be that value"
            )
    return values


Distinct = AfterValidator(_distinct)  # of a list of names
Cells = AfterValidator(_as_cells)  # of a list of values that cells have


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Model = TypeVar("Model", bound=BaseModel)
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def as_toml(value: Any) -> str:
    """A text, number, flag or list as it stands in TOML."""
    import tomlkit

    text: str = tomlkit.item(value).as_string()
    return text


def kind_or(default: str) -> Callable[[Any], str | None]:
    """Which of several models a table is: its `kind`, or the one that there was before others."""

    def kind(value: Any) -> str | None:
        found = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
        return default if found is None else str(found)

    return kind


def json_schema(model: type[BaseModel], title: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a configuration file, for editors and other programs.

    Of tables whose `kind` may be left out several can fit (`kind_or`): it is anyOf, not oneOf.
    """
    found = {"$schema": DIALECT, **model.model_json_schema(), "title": title}
    return {key: _any_fits(value) for key, value in found.items()}


def _any_fits(part: Any) -> Any:
    if isinstance(part, list):
        return [_any_fits(value) for value in part]
    if not isinstance(part, dict):
        return part
    made = {key: _any_fits(value) for key, value in part.items()}
    if "oneOf" in made and "discriminator" not in made:
        alternatives = made.pop("oneOf")
        made["anyOf"] = [v for at, v in enumerate(alternatives) if v not in alternatives[:at]]
    return made


def read_text(path: Path, what: str) -> str:
    """A configuration file's text; UsageError E102 if there is none. `what` names it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{what} {path} cannot be read: {error.strerror}.", code=ErrorCode.CONFIG_UNREADABLE
        ) from None
    except UnicodeDecodeError:
        raise UsageError(
            f"{what} {path} is not UTF-8 text.", code=ErrorCode.CONFIG_UNREADABLE
        ) from None


def of_options(model: type[Model], options: Mapping[str, str], values: Mapping[str, Any]) -> Model:
    """A model of values from the command line; ContractError lists every problem.

    options: The option that each of the values was given by, which the sentences name.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        keys = {key for e in error.errors() for key in (e["loc"][:1] or options)}
        wrong = [option for key, option in options.items() if key in keys]
        raise contract_error(error, ", ".join(wrong), model) from None


def parse(text: str, source: str, model: type[Model]) -> Model:
    """Validate TOML, or JSON when `source` ends in .json; ContractError lists every problem."""
    kind = "JSON" if source.endswith(".json") else "TOML"
    try:
        data = strict_json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error).splitlines()[0] if str(error) else "nested too deeply"
        raise UsageError(
            f"{source} is not valid {kind}: {why}.", code=ErrorCode.CONFIG_UNREADABLE
        ) from None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise contract_error(error, source, model, key_lines(text)) from None
