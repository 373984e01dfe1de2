"""Every list of names in a contract and a policy is checked member by member: one that is there
more than once, or that nothing is called, is refused by name."""

from __future__ import annotations

import copy
import json
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from silotune.client.site import policy as policies
from silotune.client.site.policy import Policy
from silotune.common.config import types as fields
from silotune.common.contract import contract
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.errors import ContractError, DataError
from silotune.common.models import adapters
from silotune.common.models.factory import build
from tests import tiny

BERT = [
    f"{layer}.{name}"
    for layer in (0, 1)
    for name in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]
TARGETS = [
    "query",
    "key",
    "value",
    "dense",
    "self.query",
    "attention.output.dense",
    "1.attention.self.value",
]

SITE = f"""
name = "north"
[data]
file = "rows.csv"
key = ["person", "visit"]
[prepare.deidentify]
kinds = ["person", "date"]
[budgets.record]
epsilon = 8.0
delta = 1e-5
[permits]
tasks = ["classification", "tokens"]
contracts = ["{1:064d}", "{2:064d}"]
models = ["{3:064d}", "{4:064d}"]
metrics = ["loss", "accuracy"]
"""
# Lists that are no lists of names: numbers, words of bins, sentences by whose number they count.
NO_NAMES = {
    "words",
    "edges",
    "class_weights",
    "phases",
    "sentences",
    # checked by rules of their own, which the tests below try: names within tables, pairs
    "sites",
    "releases",
    "labels",
    "columns",
    "values",
    "entities",
}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models_in(field.annotation)
    for part in get_args(annotation):
        yield from models_in(part)


def lists_of(root: type[BaseModel]) -> Iterator[tuple[str, str, Any]]:
    for model in {model.__name__: model for model in models_in(root)}.values():
        for name, field in model.model_fields.items():
            kinds = [field.annotation]
            if get_origin(field.annotation) in (Union, types.UnionType):
                kinds = list(get_args(field.annotation))
            if any(get_origin(kind) is tuple for kind in kinds):
                yield model.__name__, name, field


@pytest.mark.parametrize("root", [Contract, Policy])
def test_no_list_of_names_is_without_a_check(root: type[BaseModel]) -> None:
    found = list(lists_of(root))
    assert len(found) > 4
    for model, name, field in found:
        assert name in NO_NAMES or fields.Distinct in field.metadata, f"{model}.{name}"


# Adapter targets


@given(targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True))
def test_targets_choose_the_layers_that_end_in_them(targets: list[str]) -> None:
    chosen = adapters.targeted(targets, BERT)
    for name in BERT:
        assert (name in chosen) == any(f".{name}".endswith(f".{t}") for t in targets)


@given(
    right=st.lists(st.sampled_from(TARGETS), unique=True),
    wrong=st.lists(
        st.text("abcdefquery._", min_size=1).filter(
            lambda text: not any(f".{name}".endswith(f".{text}") for name in BERT)
        ),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    order=st.randoms(),
)
@settings(max_examples=50)
def test_a_target_that_no_layer_is_called_is_refused_by_name(
    right: list[str], wrong: list[str], order: Any
) -> None:
    """However many others there are that match. The named case: qeury beside value."""
    targets = [*right, *wrong]
    order.shuffle(targets)
    with pytest.raises(DataError) as error:
        adapters.targeted(targets, BERT)
    assert error.value.code == "E310"
    named = str(error.value).split(", which no adapted layer")[0]
    assert all(repr(name) in named for name in wrong)
    assert not any(f"'{name}'" in named for name in right)
    assert "Known: dense, key, query, value." in str(error.value)


@pytest.mark.parametrize("kind", ["lora", "rslora", "ia3", "core"])
def test_a_misspelt_target_beside_a_right_one_stops_every_kind_of_adapter(kind: str) -> None:
    adapter = {"kind": kind, "layers": 2, "targets": ["value", "qeury"]}
    adapter |= {"rank": 2, "alpha": 8.0} if kind != "ia3" else {}
    wrong = tiny.contract_of("classification", "bert", adapter=adapter)
    with pytest.raises(DataError, match=r"'qeury', which no .* Did you mean 'query'\?") as error:
        build(wrong, tiny.folder_of("bert"), Performance(device="cpu"))
    assert error.value.code == "E310"
    right = wrong.changed(adapter={"targets": ["value", "query"]})
    model = build(right, tiny.folder_of("bert"), Performance(device="cpu"))
    adapted = {name for name in model.named_tensors() if not name.startswith("head.")}
    for layer in (1, 2):
        for target in ("query", "value"):
            assert any(f".{layer}.attention.self.{target}." in name for name in adapted)


# Members that are there more than once


def contract_with_lists() -> dict[str, Any]:
    found = tiny.contract_of("classification", "bert", unit="entity").model_dump(mode="json")
    found["privacy"]["entity"]["key"] = ["person", "visit"]
    found["sites"] = [{"name": "north"}, {"name": "south"}]
    found["releases"] = [
        {"metric": "loss", "share": 0.1, "bound": 1.0},
        {"metric": "accuracy", "share": 0.1},
    ]
    return found


def ranking() -> dict[str, Any]:
    found = tiny.contract_of("cross", "bert").model_dump(mode="json")
    found["task"] |= {"relevant": ["yes", "1"], "others": ["no", "0"]}
    return found


def table() -> dict[str, Any]:
    return tiny.contract_of("classification", "one-hot").model_dump(mode="json")


CONTRACTS = {
    "text": contract_with_lists,
    "ranking": ranking,
    "table": table,
    "tokens": lambda: tiny.contract_of("tokens", "bert").model_dump(mode="json"),
}
PLACES: list[tuple[str, tuple[str | int, ...], str | None]] = [
    ("text", ("adapter", "targets"), None),
    ("text", ("privacy", "entity", "key"), None),
    ("text", ("task", "labels"), "name"),
    ("text", ("task", "labels", 0, "values"), None),
    ("text", ("sites",), "name"),
    ("text", ("releases",), "metric"),
    ("ranking", ("task", "relevant"), None),
    ("ranking", ("task", "others"), None),
    ("table", ("input", "columns"), "name"),
    ("tokens", ("task", "entities"), None),
    ("table", ("input", "columns", 1, "values"), "0"),
]


def at(data: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        data = data[part]
    return data


@given(place=st.sampled_from(PLACES), chosen=st.integers(0, 99), where=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_member_that_is_there_more_than_once_is_refused_by_name(
    place: tuple[str, tuple[str | int, ...], str | None], chosen: int, where: int
) -> None:
    kind, path, key = place
    data = CONTRACTS[kind]()
    Contract.model_validate(data)
    members = at(data, path)
    member = members[chosen % len(members)]
    members.insert(where % (len(members) + 1), copy.deepcopy(member))
    name = member if key is None else member[int(key) if key.isdigit() else key]
    with pytest.raises(ContractError) as error:
        contract.parse(json.dumps(data), "made-up.json")
    assert any(f"'{name}'" in problem for problem in error.value.problems)


POLICY_LISTS = ["key", "kinds", "tasks", "contracts", "models", "metrics"]


@given(name=st.sampled_from(POLICY_LISTS), chosen=st.integers(0, 1))
@settings(deadline=None)
def test_a_policys_member_that_is_there_more_than_once_is_refused_by_name(
    name: str, chosen: int
) -> None:
    policies.parse(SITE, Path("site.toml"))
    line = next(line for line in SITE.splitlines() if line.startswith(f"{name} = "))
    members = tomllib.loads(line)[name]
    listed = ", ".join(f'"{member}"' for member in [*members, members[chosen]])
    with pytest.raises(ContractError) as error:
        policies.parse(SITE.replace(line, f"{name} = [{listed}]"), Path("site.toml"))
    (problem,) = error.value.problems
    assert problem.startswith(f"{name} names '{members[chosen]}' more than once (site.toml:")


@pytest.mark.parametrize(
    ("name", "member", "hint"),
    [
        ("tasks", "clasification", "classification"),
        ("metrics", "acuracy", "accuracy"),
        ("kinds", "emial", "email"),
    ],
)
def test_a_policys_unknown_member_is_refused_by_name(name: str, member: str, hint: str) -> None:
    line = next(line for line in SITE.splitlines() if line.startswith(f"{name} = "))
    changed = SITE.replace(line, line.replace("]", f', "{member}"]'))
    with pytest.raises(ContractError, match=f"Did you mean '{hint}'") as error:
        policies.parse(changed, Path("site.toml"))
    (problem,) = error.value.problems
    assert f'got "{member}"' in problem


# Values that no cell can have


@given(
    value=st.sampled_from(["yes ", " yes", "\tno", "no\n", " "]),
    kind=st.sampled_from(["label", "relevant", "others", "category"]),
)
@settings(deadline=None)
def test_a_value_that_no_cell_can_have_is_refused_by_name(value: str, kind: str) -> None:
    """Cells are trimmed: such a value would match nothing, in silence."""
    data = ranking() if kind in ("relevant", "others") else table()
    if kind == "label":
        data["task"]["labels"][0]["values"].append(value)
    elif kind == "category":
        data["input"]["columns"][1]["values"].append([value, "word"])
    else:
        data["task"][kind].append(value)
    with pytest.raises(ContractError) as error:
        contract.parse(json.dumps(data), "made-up.json")
    assert "no cell would be that value" in str(error.value)


@pytest.mark.parametrize("value", ["", "a|b"])
def test_a_multi_label_value_that_no_cell_can_have_is_refused(value: str) -> None:
    data = tiny.contract_of("multi-label", "bert").model_dump(mode="json")
    data["task"]["labels"][0]["values"].append(value)
    with pytest.raises(ContractError, match="can stand in no cell"):
        contract.parse(json.dumps(data), "made-up.json")


def test_a_key_column_in_two_spellings_is_one_column() -> None:
    """Key columns are compared without regard to case and spaces about them."""
    changed = SITE.replace('key = ["person", "visit"]', 'key = ["person", "Person "]')
    with pytest.raises(ContractError, match="key names the column 'Person ' more than once"):
        policies.parse(changed, Path("site.toml"))
