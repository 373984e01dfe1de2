"""An unknown key is named by the user's own path, with the keys that its table may have."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from silotune.client.site.policy import Policy
from silotune.common.config.types import json_schema
from silotune.common.contract import adapter, inputs, model, task
from silotune.common.contract.contract import Contract, parse
from silotune.common.errors import ContractError

UNIONS = {
    "task": task.Task,
    "input": inputs.Input,
    "input.columns.1": inputs.Column,
    "model": model.Model,
    "adapter": adapter.Adapter,
}
KINDS = {
    "task": ("classification", "multi-label", "tokens", "regression", "ranking", "language"),
    "input": ("table", "text", "pair"),
    "input.columns.1": ("number", "category"),
    "model": ("encoder", "one-hot", "language-model"),
    "adapter": ("lora", "rslora", "core", "ia3", "prefix", "prompt"),
}
CASES = [(place, kind) for place, kinds in KINDS.items() for kind in kinds]
WITHOUT_KIND = [(place, None) for place in ("task", "adapter")]


def models_of(union: Any) -> Iterator[type[BaseModel]]:
    if isinstance(union, type) and issubclass(union, BaseModel):
        yield union
    for part in get_args(union):
        yield from models_of(part)


def kinds_of(annotation: Any) -> set[str]:
    if isinstance(annotation, str):
        return {annotation}
    return {kind for part in get_args(annotation) for kind in kinds_of(part)}


def problems(contract: Contract, place: str, table: dict[str, Any]) -> list[str]:
    data = copy.deepcopy(contract.model_dump(mode="json"))
    if place == "input.columns.1":
        data["input"]["columns"][0] = table
    else:
        data[place] = table
    with pytest.raises(ContractError) as error:
        parse(json.dumps(data), "c.json")
    return error.value.problems


@pytest.mark.parametrize(("place", "kind"), [*CASES, *WITHOUT_KIND])
def test_a_wrong_key_is_named_without_the_kind_of_its_table(
    table_contract: Contract, place: str, kind: str | None
) -> None:
    """By its own path, with the keys of that kind alone; without a kind with those of the usual
    one."""
    table = {"zzz": 1} if kind is None else {"kind": kind, "zzz": 1}
    (found,) = [p for p in problems(table_contract, place, table) if "zzz" in p]
    assert found.startswith(f"Unknown key '{place}.zzz' (c.json). Allowed: "), found
    named = set(found.split("Allowed: ")[1].removesuffix(".").split(", "))
    usual = {"task": "classification", "adapter": "lora"}.get(place)
    (allowed,) = {
        frozenset(m.model_fields)
        for m in models_of(UNIONS[place])
        if (kind or usual) in kinds_of(m.model_fields["kind"].annotation)
    }
    assert named == allowed


def test_a_typo_under_adapter_is_answered_with_the_key_that_was_meant(
    table_contract: Contract,
) -> None:
    (found,) = [p for p in problems(table_contract, "adapter", {"rnak": 2}) if "rnak" in p]
    assert found == (
        "Unknown key 'adapter.rnak' (c.json). Did you mean 'rank'? "
        "Allowed: alpha, initial, kind, layers, rank, seed, targets."
    )


@pytest.mark.parametrize("place", KINDS)
def test_a_wrong_kind_is_answered_with_all_kinds(table_contract: Contract, place: str) -> None:
    (found,) = [p for p in problems(table_contract, place, {"kind": "zzz"}) if "zzz" in p]
    assert found.startswith(f"'{place}.kind' must be one of {', '.join(map(repr, KINDS[place]))}, ")


def alternatives(part: Any, path: str = "") -> Iterator[str]:
    """Where a JSON Schema has several tables to choose from."""
    if isinstance(part, list | dict):
        inside = enumerate(part) if isinstance(part, list) else part.items()
        for key, value in inside:
            refs = [v for v in value if "$ref" in v] if key in ("oneOf", "anyOf") else []
            if len(refs) > 1:
                yield path
            yield from alternatives(value, f"{path}/{key}")


@pytest.mark.parametrize(("settings", "count"), [(Contract, len(UNIONS)), (Policy, 0)])
def test_every_choice_between_tables_is_tested_here(settings: type[BaseModel], count: int) -> None:
    assert len(list(alternatives(json_schema(settings, "x")))) == count
