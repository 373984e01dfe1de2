"""Every setting of a file and every option of a command says in a sentence what it is, and the
schemas that `silotune contract schema` prints fit the files."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest
from pydantic import BaseModel

from silotune.client.site.policy import Policy
from silotune.common.cli.main import NOUNS, silotune
from silotune.common.contract.contract import Contract
from silotune.server.operations.server_folder import ServerSettings
from silotune.simulations.recipes.recipe_config import RecipeConfig
from silotune.simulations.study.config import Study
from tests.test_readme import ROOT

LEAST = 6  # words
FILES = (Contract, Policy, ServerSettings, RecipeConfig, Study)  # the model of each file
RECIPES = sorted((ROOT / "simulations" / "recipes").glob("*/contract.toml"))
Ran = tuple[int, str, str]
Schema = dict[str, Any]


def too_short(name: str, text: str | None) -> bool:
    words = (text or "").split()
    return len(words) < LEAST or (text or "").strip(" .").lower() == name.replace("_", " ").lower()


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from models_in(part)


def models_of(*roots: type[BaseModel]) -> list[type[BaseModel]]:
    """These and all that their fields are made of."""
    found = list(roots)
    for model in found:
        for field in model.model_fields.values():
            found += [m for m in models_in(field.annotation) if m not in found]
    return found


def commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        with click.Context(command) as context:
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                yield from commands(found, (*path, name))


def undescribed_fields(*roots: type[BaseModel]) -> list[str]:
    return [
        f"{model.__qualname__}.{name}"
        for model in models_of(*roots)
        for name, field in model.model_fields.items()
        if too_short(name, field.description)
    ]


def undescribed_options(root: click.Command) -> list[str]:
    return [
        " ".join((*path, option.opts[0]))
        for path, command in commands(root)
        for option in command.params
        if isinstance(option, click.Option) and too_short(str(option.name), option.help)
    ]


def undescribed_arguments(root: click.Command) -> list[str]:
    return [
        " ".join((*path, str(argument.name)))
        for path, command in commands(root)
        for argument in command.params
        if isinstance(argument, click.Argument) and too_short(str(argument.name), argument.help)
    ]


def test_every_setting_has_a_description() -> None:
    names = {model.__qualname__ for model in models_of(*FILES)}
    assert {"Site", "Phase", "Lora", "Deidentify", "Budgets.Budget", "Poison"} <= names
    assert len(names) > 40
    assert not undescribed_fields(*FILES)


def test_every_option_has_a_description() -> None:
    found = [path for path, _ in commands(silotune)]
    assert {path[0] for path in found if path} >= set(NOUNS)
    assert len(found) > 30
    assert not undescribed_options(silotune)


def test_every_argument_has_a_description(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not undescribed_arguments(silotune)
    monkeypatch.setattr(silotune.commands["explain"].params[0], "help", "A code.")
    assert undescribed_arguments(silotune) == ["explain code"]


def test_a_missing_description_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from silotune.common.contract.training import Adam

    monkeypatch.setattr(Adam.model_fields["floor"], "description", None)
    assert undescribed_fields(*FILES) == ["Adam.floor"]
    with click.Context(silotune) as context:
        plan = silotune.get_command(context, "privacy")
    assert isinstance(plan, click.Group)
    steps = next(option for option in plan.commands["plan"].params if option.name == "steps")
    monkeypatch.setattr(steps, "help", "Steps.")
    assert undescribed_options(silotune) == ["privacy plan --steps"]


# silotune contract schema


@pytest.fixture
def schema(run: Callable[..., Ran]) -> Callable[..., Schema]:
    def read(*words: str) -> Schema:
        code, out, err = run("contract", "schema", *words)
        assert (code, err) == (0, "")
        found: Schema = json.loads(out)
        return found

    return read


def fits(value: Any, part: Schema, root: Schema) -> bool:  # noqa: PLR0911
    """Whether a value is one of a schema: by the keywords that Pydantic writes about the shape of a
    file. Bounds of numbers and lengths are left out."""
    if "$ref" in part and not fits(value, root["$defs"][part["$ref"].rpartition("/")[2]], root):
        return False
    if "anyOf" in part and not any(fits(value, one, root) for one in part["anyOf"]):
        return False
    if "oneOf" in part and sum(fits(value, one, root) for one in part["oneOf"]) != 1:
        return False
    if value not in part.get("enum", [value]) or value != part.get("const", value):
        return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "number": int | float,
        "integer": int,
        "boolean": bool,
        "null": type(None),
    }
    if "type" in part and not isinstance(value, kinds[part["type"]]):
        return False
    if isinstance(value, dict):
        known, other = part.get("properties", {}), part.get("additionalProperties", True)
        return set(part.get("required", ())) <= set(value) and all(
            fits(cell, known[key], root)
            if key in known
            else other is True or (isinstance(other, dict) and fits(cell, other, root))
            for key, cell in value.items()
        )
    if isinstance(value, list):
        return all(fits(item, part.get("items", {}), root) for item in value)
    return True


def properties(part: Any) -> Iterator[tuple[str, Schema]]:
    if isinstance(part, dict):
        if part.get("type") == "object":
            yield from part.get("properties", {}).items()
        for value in part.values():
            yield from properties(value)


@pytest.mark.parametrize(
    ("file", "least"),
    [("contract", 31), ("site", 31), ("study", 15), ("recipe", 15), ("server", 5)],
)
def test_a_schema_describes_every_key(schema: Callable[..., Schema], file: str, least: int) -> None:
    found = schema(file)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert file in found["title"].lower()
    described = dict(properties(found))
    assert len(described) >= least
    assert not [name for name, part in properties(found) if too_short(name, part["description"])]


def test_the_contracts_schema_is_printed_by_default(schema: Callable[..., Schema]) -> None:
    assert schema() == schema("contract")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_the_recipes_contracts_fit_the_schema(schema: Callable[..., Schema], path: Any) -> None:
    text = path.read_text(encoding="utf-8")
    found, contract = schema(), tomllib.loads(text)
    assert fits(contract, found, found)
    assert fits(json.loads(Contract.model_validate(contract).model_dump_json()), found, found)
    for wrong in (
        contract | {"quorumm": 3},
        {key: value for key, value in contract.items() if key != "task"},
        contract | {"format": 2},
        contract | {"privacy": contract["privacy"] | {"mode": "maybe"}},
        contract | {"task": contract["task"] | {"kind": "none"}},
        contract
        | {
            "input": {key: v for key, v in contract["input"].items() if key != "kind"}
            | {"kind": "none"}
        },
    ):
        assert not fits(wrong, found, found)


def test_every_key_of_the_first_site_toml_is_in_the_schema(schema: Callable[..., Schema]) -> None:
    """Also those that are commented out."""
    found, table, keys = schema("site"), "", set[tuple[str, str]]()
    source = ROOT / "client" / "site" / "site.toml.j2"
    for line in source.read_text(encoding="utf-8").splitlines():
        if begins := re.match(r"(?:# )?\[([a-z_.]+)\]$", line):
            table = begins[1]
        elif key := re.match(r"(?:# )?([a-z_]+) = ", line):
            keys.add((table, key[1]))
    assert {
        ("", "name"),
        ("data", "url"),
        ("prepare.deidentify", "actions"),
        ("server", "ca"),
    } <= keys
    for table, key in keys:
        assert key in keys_at(found, table), (table, key)


def keys_at(root: Schema, table: str) -> Schema:
    """The keys of the table at a path."""
    part = root
    for name in filter(None, table.split(".")):
        part = part["properties"][name]
        part = next((one for one in part.get("anyOf", ()) if "$ref" in one), part)
        part = root["$defs"][part["$ref"].rpartition("/")[2]]
    keys: Schema = part["properties"]
    return keys
