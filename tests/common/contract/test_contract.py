"""Every bad contract is told in plain sentences with line and mend; the hash pins all it says."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract, parse
from silotune.common.errors import ContractError, SilotuneError, UsageError
from tests import tiny

RECIPES = sorted((Path(__file__).parents[3] / "simulations" / "recipes").glob("*/contract.toml"))
FUZZ = settings(deadline=None, max_examples=200, derandomize=True, database=None)

TEXT = """\
format = 1
name = "small"
quorum = 2

[task]
label_column = "outcome"
labels = [{ name = "well", values = ["0"] }, { name = "ill", values = ["1"] }]

[input]
kind = "table"

[[input.columns]]
kind = "number"
name = "age"
phrase = "age"
edges = [50]
words = ["young", "old"]

[[input.columns]]
kind = "category"
name = "smoker"
phrase = "smoker"
values = { yes = "yes", no = "no" }

[model]
kind = "one-hot"

[privacy]
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0
expected_units = 50

[[phases]]
trains = "head"
rounds = 3
sampling_rate = 0.5
head_lr = 0.5

[[sites]]
name = "north"

[[sites]]
name = "south"
"""


def swapped(old: str, new: str, text: str = TEXT) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def line(fragment: str, text: str = TEXT) -> int:
    return text[: text.index(fragment)].count("\n") + 1


def problems(text: str) -> list[str]:
    with pytest.raises(ContractError) as caught:
        parse(text, "c.toml")
    assert caught.value.code == "E103"
    assert caught.value.exit_code == 2
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def dump() -> dict[str, Any]:
    return parse(TEXT).model_dump(mode="json")


# What is allowed


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_shipped_recipes_load(path: Path) -> None:
    found = contracts.load(path)
    assert found.name == path.parent.name
    assert found.quorum <= len(found.sites)
    assert found.privacy.mode == "dp"
    assert Contract.model_validate(found.model_dump(mode="json")).hash == found.hash


def test_recipes_exist() -> None:
    assert "heart-diagnosis" in [p.parent.name for p in RECIPES]


def test_a_round_belongs_to_one_phase() -> None:
    two = dump()
    two["phases"] = [two["phases"][0] | {"budget_share": 0.5, "rounds": n} for n in (2, 3)]
    contract = Contract.model_validate(two)
    places = [contract.round_plan(r).round_in_phase for r in range(1, 6)]
    assert contract.rounds == 5
    assert places == [1, 2, 1, 2, 3]
    assert [contract.round_plan(r).phase.rounds for r in range(1, 6)] == [2, 2, 3, 3, 3]
    for outside in (-1, 0, 6):
        with pytest.raises(ValueError, match="round"):
            contract.round_plan(outside)
    with pytest.raises(ValueError, match="5 rounds"):
        contract.round_plan(6)


# What is not: one sentence a problem, with file, line, key, value and mend

BAD = {
    "unknown key": (
        "quorum = 2",
        "quorum = 2\nquorrum = 2",
        "quorrum",
        ["Unknown key 'quorrum'", "Did you mean 'quorum'?", "Allowed:", "deadline_seconds"],
    ),
    "unknown key in a section": (
        "clip_norm = 1.0",
        "clip_nrom = 1.0",
        "clip_nrom",
        ["Unknown key 'privacy.clip_nrom'", "Did you mean 'clip_norm'?"],
    ),
    "unknown key in a column": (
        'phrase = "smoker"',
        'phrase = "smoker"\nphrasse = "s"',
        "phrasse",
        ["Unknown key 'input.columns.2.phrasse'", "Did you mean 'phrase'?"],
    ),
    "unknown key in a site": (
        'name = "south"',
        'name = "south"\nwieght = 2.0',
        "wieght",
        ["Unknown key 'sites.2.wieght'", "Did you mean 'weight'?"],
    ),
    "whole number": (
        "quorum = 2",
        'quorum = "abc"',
        "quorum",
        ["'quorum' must be a whole number", '"abc"'],
    ),
    "half a site": (
        "quorum = 2",
        "quorum = 1.5",
        "quorum",
        ["'quorum' must be a whole number", "1.5"],
    ),
    "quorum true": ("quorum = 2", "quorum = true", "quorum", ["must be a whole number", "true"]),
    "no quorum": ("quorum = 2", "quorum = 0", "quorum", ["'quorum'", "greater", "1", "got 0"]),
    "missing section": ("quorum = 2\n", "", None, ["Key 'quorum' is missing"]),
    "missing key": (
        "expected_units = 50\n",
        "",
        "[privacy]",
        ["Key 'privacy.expected_units' is missing"],
    ),
    "epsilon negative": (
        "epsilon = 8.0",
        "epsilon = -8.0",
        "epsilon",
        ["'privacy.epsilon'", "greater than 0", "-8.0"],
    ),
    "epsilon zero": ("epsilon = 8.0", "epsilon = 0.0", "epsilon", ["greater than 0", "got 0.0"]),
    "epsilon nan": ("epsilon = 8.0", "epsilon = nan", "epsilon", ["'privacy.epsilon'", "nan"]),
    "epsilon inf": ("epsilon = 8.0", "epsilon = inf", "epsilon", ["'privacy.epsilon'", "inf"]),
    "epsilon huge": ("epsilon = 8.0", "epsilon = 101", "epsilon", ["less than or equal to 100"]),
    "epsilon text": ("epsilon = 8.0", 'epsilon = "eight"', "epsilon", ["number", '"eight"']),
    "delta zero": (
        "delta = 1e-4",
        "delta = 0",
        "delta",
        ["'privacy.delta'", "greater than 0", "got 0"],
    ),
    "delta negative": ("delta = 1e-4", "delta = -1e-5", "delta", ["greater than 0", "-1e-05"]),
    "delta nan": ("delta = 1e-4", "delta = nan", "delta", ["'privacy.delta'", "nan"]),
    "delta inf": ("delta = 1e-4", "delta = inf", "delta", ["'privacy.delta'", "inf"]),
    "delta one": ("delta = 1e-4", "delta = 1.0", "delta", ["less than 0.01", "1.0"]),
    "clip inf": ("clip_norm = 1.0", "clip_norm = inf", "clip_norm", ["1000000", "inf"]),
    "mode": (
        "[privacy]",
        '[privacy]\nmode = "dpp"',
        "mode =",
        ["'privacy.mode'", "'dp' or 'none'", '"dpp"'],
    ),
    "edges and words": (
        "edges = [50]",
        "edges = [40, 50]",
        "[[input.columns]]",
        ["column 'age' has 2 edges", "needs 3 words", "got 2"],
    ),
    "edges fall": (
        'edges = [50]\nwords = ["young", "old"]',
        'edges = [50, 40]\nwords = ["a", "b", "c"]',
        "[[input.columns]]",
        ["'age'", "must increase"],
    ),
    "two labels, one value": (
        '{ name = "ill", values = ["1"] }',
        '{ name = "ill", values = ["0"] }',
        "[task]",
        ["label value '0' stands twice"],
    ),
    "two labels, one name": (
        '{ name = "ill", values = ["1"] }',
        '{ name = "well", values = ["1"] }',
        "[task]",
        ["label name 'well' stands twice"],
    ),
    "two columns, one name": (
        'name = "smoker"',
        'name = "age"',
        "[input]",
        ["column 'age' stands twice"],
    ),
    "model": (
        'kind = "one-hot"',
        'kind = "onehot"',
        "[model]",
        ["'model.kind'", "'onehot'", "'encoder'", "'one-hot'"],
    ),
    "site name": ('name = "south"', 'name = "../south"', 'name = "../south"', ['"../south"']),
    "date": ("quorum = 2", "quorum = 2024-01-01", "quorum", ["must be a whole number"]),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_for_one_problem(case: str) -> None:
    old, new, place, words = BAD[case]
    text = swapped(old, new)
    (sentence,) = problems(text)
    assert "\n" not in sentence
    assert sentence.rstrip(".").endswith((")", "?")) or "Allowed:" in sentence
    where = "c.toml" if place is None else f"c.toml:{line(place, text)})"
    assert where in sentence, sentence
    for word in words:
        assert word in sentence, sentence


PHASES = {
    "rounds": (
        "rounds = 3",
        'rounds = "abc"',
        ["'phases.1.rounds' must be a whole number", '"abc"'],
        "rounds =",
    ),
    "rate above one": (
        "sampling_rate = 0.5",
        "sampling_rate = 1.5",
        ["'phases.1.sampling_rate'", "1.5"],
        "sampling_rate",
    ),
    "rate nan": (
        "sampling_rate = 0.5",
        "sampling_rate = nan",
        ["'phases.1.sampling_rate'"],
        "sampling_rate",
    ),
    "rate too small": (
        "sampling_rate = 0.5",
        "sampling_rate = 9.9e-7",
        ["'phases.1.sampling_rate'", "0.000001"],
        "sampling_rate",
    ),
    "rate zero": (
        "sampling_rate = 0.5",
        "sampling_rate = 0",
        ["'phases.1.sampling_rate'"],
        "sampling_rate",
    ),
    "budget nan": (
        "head_lr = 0.5",
        "head_lr = 0.5\nbudget_share = nan",
        ["'phases.1.budget_share'"],
        "budget_share",
    ),
    "unknown": (
        "head_lr = 0.5",
        "head_lr = 0.5\nbudget_shear = 1.0",
        ["Unknown key 'phases.1.budget_shear'", "Did you mean 'budget_share'?"],
        "budget_shear",
    ),
    "adapter_lr": (
        "head_lr = 0.5",
        "head_lr = 0.5\nadapter_lr = 0.1",
        ["adapter_lr goes with"],
        "[[phases]]",
    ),
    "trains": (
        'trains = "head"',
        'trains = "body"',
        ["'head', 'head+adapter' or 'adapter'", '"body"'],
        "trains",
    ),
}


@pytest.mark.parametrize("case", PHASES)
def test_a_wrong_phase_names_key_and_line(case: str) -> None:
    old, new, words, place = PHASES[case]
    text = swapped(old, new)
    sentence = problems(text)[0]
    assert f"c.toml:{line(place, text)})" in sentence
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rounds = 3", 'rounds = "abc"'),
        ('name = "south"', 'name = "south"\nwieght = 2.0'),
        ('values = ["1"] }]', 'values = ["1"], value = 1 }]'),
        ("edges = [50]", 'edges = ["fifty"]'),
    ],
)
def test_a_bad_element_does_not_also_count_as_absent(old: str, new: str) -> None:
    found = problems(swapped(old, new))
    assert len(found) == 1, found


def adapter_active(phases: str) -> str:
    """TEXT on an encoder, with an adapter and other phases."""
    text = swapped(
        'kind = "one-hot"', f'kind = "encoder"\nname = "m"\nmax_tokens = 32\nsha256 = "{"0" * 64}"'
    )
    text = swapped("[privacy]", '[adapter]\ntargets = ["query"]\n\n[privacy]', text)
    start, end = text.index("[[phases]]"), text.index("[[sites]]")
    return text[:start] + phases + text[end:]


HEAD = """\
[[phases]]
trains = "head"
rounds = 1
sampling_rate = 0.5
head_lr = 1.0
budget_share = {}
"""
BOTH = HEAD.replace('"head"', '"head+adapter"').replace(
    "budget_share", "adapter_lr = 0.1\nbudget_share"
)

CROSS = {
    "quorum above roster": (swapped("quorum = 2", "quorum = 3"), ["quorum is 3", "2 sites"]),
    "a site twice": (swapped('"south"', '"north"'), ["stands twice", "roster"]),
    "budgets": (adapter_active(HEAD.format(0.4) + BOTH.format(0.4)), ["budget", "add up to 1"]),
    "head after adapter": (
        adapter_active(BOTH.format(0.5) + HEAD.format(0.5)),
        ["only the head must come first"],
    ),
    "adapter without phase": (adapter_active(HEAD.format(1)), ["[adapter]", "go together"]),
    "one-hot with adapter": (
        swapped("[privacy]", '[adapter]\ntargets = ["query"]\n[privacy]'),
        ["[adapter]"],
    ),
}


def test_the_adapter_contract_of_these_tests_is_valid() -> None:
    assert parse(adapter_active(HEAD.format(0.5) + BOTH.format(0.5))).adapter is not None


@pytest.mark.parametrize("case", CROSS)
def test_settings_that_do_not_go_together(case: str) -> None:
    text, words = CROSS[case]
    (sentence,) = problems(text)
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize("case", CROSS)
def test_settings_that_do_not_go_together_have_a_line(case: str) -> None:
    (sentence,) = problems(CROSS[case][0])
    assert re.search(r"c\.toml:\d+", sentence), sentence


def test_all_problems_at_once() -> None:
    text = TEXT
    for old, new in [
        ("quorum = 2", "quorum = 1.5"),
        ("epsilon = 8.0", "epsilon = -1"),
        ("delta = 1e-4", "delta = 0"),
        ("edges = [50]", "edges = [40, 50]"),
        ("[model]", "[mdoel]"),
        ('"well", values', '"well", value'),
    ]:
        text = swapped(old, new, text)
    found = "\n".join(problems(text))
    for key in (
        "'quorum'",
        "privacy.epsilon",
        "privacy.delta",
        "column 'age'",
        "'mdoel'",
        "'model' is missing",
        "task.labels.1.value'",
        "task.labels.1.values' is missing",
    ):
        assert key in found, key


def test_all_problems_at_once_when_settings_do_not_go_together() -> None:
    text = swapped('"south"', '"north"', swapped("quorum = 2", "quorum = 3"))
    found = problems(swapped("head_lr = 0.5", "head_lr = 0.5\nbudget_share = 0.5", text))
    assert len(found) == 3, found


@pytest.mark.parametrize(
    ("old", "new"), [('kind = "number"\n', ""), ('kind = "one-hot"', "")], ids=["column", "model"]
)
def test_a_missing_kind_is_a_missing_key(old: str, new: str) -> None:
    (sentence,) = problems(swapped(old, new))
    assert "kind' is missing" in sentence, sentence


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("edges = [50]", "edges = 50"),
        ('kind = "number"', 'kind = "nmber"'),
        ('["0"]', "[]"),
        ('kind = "one-hot"', ""),
    ],
)
def test_no_words_of_the_validator(old: str, new: str) -> None:
    found = " ".join(problems(swapped(old, new)))
    for jargon in ("tuple", "discriminator", "input tag", "validation"):
        assert jargon not in found, found


def test_a_key_of_another_model_is_not_suggested_to_itself() -> None:
    (sentence,) = problems(swapped('kind = "one-hot"', 'kind = "one-hot"\nname = "x"'))
    assert "Did you mean 'name'" not in sentence
    assert "max_tokens" not in sentence


@pytest.mark.parametrize("value", ["true", '"0.5"'])
@pytest.mark.parametrize(
    "old", ["sampling_rate = 0.5", "epsilon = 8.0", "clip_norm = 1.0", "edges = [50]"]
)
def test_a_number_is_written_as_a_number(old: str, value: str) -> None:
    key = old.split(" = ", maxsplit=1)[0]
    new = f"{key} = [{value}]" if old.endswith("]") else f"{key} = {value}"
    (sentence, *_) = problems(swapped(old, new))
    assert "number" in sentence


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("new", ["edges = [{}]", "edges = [50]\nlowest = {}"])
def test_bins_are_finite(new: str, value: str) -> None:
    assert "finite" in problems(swapped("edges = [50]", new.format(value)))[0]


def test_the_label_is_no_input() -> None:
    """With the outcome among the inputs, every metric would be perfect and mean nothing."""
    assert "age" in problems(swapped('label_column = "outcome"', 'label_column = "age"'))[0]


# Files


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml cannot be read") as caught:
        contracts.load(tmp_path / "none.toml")
    assert caught.value.code == "E102"


def test_a_folder_is_no_contract(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read") as caught:
        contracts.load(tmp_path)
    assert caught.value.code == "E102"


@pytest.mark.parametrize("data", [b'name = "caf\xe9"\n', TEXT.encode("utf-16"), b"\xff\xfe"])
def test_not_utf8(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"c\.toml is not UTF-8") as caught:
        contracts.load(path)
    assert caught.value.code == "E102"


@pytest.mark.parametrize(
    "text", ["quorum", "quorum = ", "[task", "a = 1\na = 2", "{", "\x00", "a = " + "[" * 5000]
)
def test_not_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"c\.toml is not valid TOML") as caught:
        contracts.load(path)
    assert caught.value.code == "E102"
    assert not isinstance(caught.value, ContractError)


@pytest.mark.parametrize("value", ["1" * 5000, "0x" + "f" * 5000], ids=["decimal", "hexadecimal"])
@pytest.mark.parametrize("old", ["rounds = 3", "quorum = 2"])
def test_absurd_numbers_are_a_usage_error(old: str, value: str) -> None:
    with pytest.raises(UsageError, match=r"c\.toml"):
        parse(swapped(old, f"{old.split(maxsplit=1)[0]} = {value}"), "c.toml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "format = 1\n"])
def test_an_empty_contract_lists_all_it_lacks(text: str) -> None:
    found = "\n".join(problems(text))
    for key in ("name", "task", "input", "model", "privacy", "phases", "quorum", "sites"):
        assert f"Key '{key}' is missing" in found


# Unknown keys, at every level


def dicts(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(data, dict):
        yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(value, dict | list) and key != "values":
            yield from dicts(value, (*path, key))


def at(data: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        data = data[part]
    return data


@pytest.mark.parametrize("text", [TEXT, *(p.read_text() for p in RECIPES)], ids=lambda t: t[:20])
def test_unknown_keys_fail_at_every_level(text: str) -> None:
    whole = parse(text).model_dump(mode="json")
    paths = list(dicts(whole))
    assert len(paths) > 8
    for path in paths:
        data = copy.deepcopy(whole)
        at(data, path)["zzz"] = 1
        with pytest.raises(ValidationError, match="Extra inputs") as caught:
            Contract.model_validate(data)
        assert caught.value.errors()[0]["loc"][-1] == "zzz"


# The hash


def test_hash_is_sha256_of_the_canonical_form() -> None:
    assert len(parse(TEXT).hash) == 64
    assert set(parse(TEXT).hash) <= set("0123456789abcdef")


@FUZZ
@given(st.randoms(use_true_random=False))
def test_hash_ignores_key_order_comments_and_space(rng: random.Random) -> None:
    head, *tables = TEXT.split("\n\n")
    task, table, age, smoker, model, privacy, phase, north, south = tables

    def shuffled(block: str) -> str:
        first, *rest = block.splitlines()
        rest = [first, *rest] if not first.startswith("[") else rest
        rng.shuffle(rest)
        lines = [first, *rest] if first.startswith("[") else rest
        return "\n".join(
            f"{' ' * rng.randrange(3)}{one}{rng.choice(['', '  # why', chr(9)])}\n"
            + rng.choice(["", "\n", "# a comment = 1\n"])
            for one in lines
        )

    blocks = [[task], [table, age, smoker], [model], [privacy], [phase], [north, south]]
    rng.shuffle(blocks)
    text = "\n".join(shuffled(b) for b in [head, *(b for group in blocks for b in group)])
    ends = rng.choice(["\n", "\r\n"])
    assert parse(text.replace("\n", ends)).hash == parse(TEXT).hash


def test_hash_writes_defaults_out() -> None:
    text = swapped(
        "[[phases]]", '[aggregation]\nmethod = "ffa"\nserver_momentum = 0.9\n\n[[phases]]'
    )
    assert parse(swapped("clip_norm = 1.0\n", "", text)).hash == parse(TEXT).hash
    assert parse(swapped("clip_norm = 1.0", "clip_norm = 1")).hash == parse(TEXT).hash


def leaves(
    data: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value of a contract but the contract itself: fields, and lists as wholes too."""
    if path and not isinstance(data, dict):
        yield path, data
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, key))


VARIANTS: dict[type, Callable[[Any], list[Any]]] = {
    bool: lambda v: [not v],
    int: lambda v: [v + 1, v - 1],
    float: lambda v: [v / 2, v + 0.0013, v * 2],
    str: lambda v: [
        v + "x",
        ("1" if v[:1] == "0" else "0") + v[1:],
        "none",
        *sorted({"first", "last", "bi", "cross", "mean", "sum"} - {v}),
    ],
    list: lambda v: [v[::-1], v[:-1], [*v, "more"]],
    type(None): lambda v: [0.5],
}


# Fields that allow one value only, or change only together with another (tested below).
FIXED = {"format", "kind", "unit", "method", "trains", "budget_share", "whiten"}


@pytest.mark.parametrize("path", [*RECIPES, None], ids=lambda p: p.parent.name if p else "small")
def test_any_change_changes_the_hash(path: Path | None) -> None:
    contract = contracts.load(path) if path else parse(TEXT)
    whole, seen = contract.model_dump(mode="json"), {contract.hash}
    tried = 0
    for place, value in leaves(whole):
        changed = 0
        for variant in VARIANTS[type(value)](value):
            data = copy.deepcopy(whole)
            at(data, place[:-1])[place[-1]] = variant
            if data == whole:
                continue
            try:
                found = Contract.model_validate(data)
            except ValidationError:
                continue
            assert found.hash not in seen, place
            seen.add(found.hash)
            changed += 1
        tried += changed
        if isinstance(value, list) or place[-1] in FIXED or value is None:
            continue
        assert changed, f"no valid change of {place} was tried"
    assert tried > 30


def test_changes_that_need_company_change_the_hash() -> None:
    first = parse(adapter_active(HEAD.format(0.5) + BOTH.format(0.5)))
    others = [
        parse(adapter_active(HEAD.format(0.4) + BOTH.format(0.6))),
        parse(adapter_active(BOTH.format(0.5) + BOTH.format(0.5))),
        first.changed(privacy={"mode": "none"}),
    ]
    assert len({c.hash for c in [first, *others]}) == 4


def test_the_order_of_categories_is_part_of_the_hash() -> None:
    """The order numbers the choices, and with them the one-hot features: two sites that disagree
    on it would train on permuted features under one hash."""
    there = parse(TEXT)
    here = parse(swapped('{ yes = "yes", no = "no" }', '{ no = "no", yes = "yes" }'))
    assert here.input.columns[1].choices != there.input.columns[1].choices  # type: ignore[union-attr]
    assert here.hash != there.hash


def test_a_contract_is_frozen() -> None:
    contract = parse(TEXT)
    before = contract.hash
    with pytest.raises(ValidationError):
        contract.quorum = 1
    with pytest.raises(ValidationError):
        contract.privacy.epsilon = 100.0
    with pytest.raises(TypeError):
        contract.input.columns[1].values["maybe"] = "maybe"  # type: ignore[union-attr]
    assert contract.hash == before


# A changed copy


def test_changed_merges_and_validates(table_contract: Contract) -> None:
    other = table_contract.changed(privacy={"epsilon": 1.0}, quorum=1)
    assert (other.privacy.epsilon, other.privacy.delta, other.quorum) == (1.0, 1e-4, 1)
    assert table_contract.privacy.epsilon == 8.0
    assert other.hash != table_contract.hash


@pytest.mark.parametrize(
    "sections",
    [
        {"privacy": {"epsilon": -1.0}},
        {"privacy": {"delta": float("nan")}},
        {"quorum": 9},
        {"nothing": 1},
        {"adapter": {"rank": 2}},
    ],
    ids=str,
)
def test_a_bad_change_is_a_contract_error(
    table_contract: Contract, sections: dict[str, Any]
) -> None:
    """`silotune sim run RECIPE epsilon=-1` comes here: it must be a sentence, not E500."""
    with pytest.raises(ContractError):
        table_contract.changed(**sections)


# Whatever stands in the file


def parses_or_tells(text: str) -> None:
    try:
        contract = parse(text, "c.toml")
    except SilotuneError as error:
        told = getattr(error, "problems", [str(error)])
    else:
        told = []
        assert parse(text).hash == contract.hash
    assert all("c.toml" in sentence for sentence in told)


TOKENS = [
    "=",
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    '"',
    "'",
    '"""',
    "\n",
    "\r\n",
    ".",
    ",",
    "#",
    " ",
    "\t",
    "1",
    "-1",
    "1e999",
    "nan",
    "-inf",
    "true",
    "2024-01-01",
    "07:32:00",
    "0x1f",
    "9" * 30,
    "\\u00e9",
    "\\ud800",
    "\u2028",
    "\x85",
    "é",
    "\x00",
    "name",
    "format",
    "quorum",
    "[task]",
    "[[sites]]",
    "[[phases]]",
    "kind",
    '"table"',
    '"text"',
    "columns",
    "values",
    "edges = []",
    "a.b.c = 1",
    '"" = 1',
    "input.table = 1",
    "[input.columns]",
]


@FUZZ
@given(st.lists(st.sampled_from(TOKENS) | st.text(max_size=5), max_size=30).map("".join))
def test_any_text(text: str) -> None:
    parses_or_tells(text)


places = st.tuples(
    st.integers(0, len(TEXT)), st.integers(0, 12), st.sampled_from(TOKENS) | st.text(max_size=3)
)


@FUZZ
@given(st.lists(places, min_size=1, max_size=4))
def test_any_mutation(changes: list[tuple[int, int, str]]) -> None:
    text = TEXT
    for start, cut, new in changes:
        text = text[:start] + new + text[start + cut :]
    parses_or_tells(text)


VALUES = [
    "1",
    "-1",
    "0.5",
    "nan",
    "inf",
    '"x"',
    "true",
    "[]",
    "[1]",
    '["a"]',
    "{}",
    "{ a = 1 }",
    "2024-01-01",
    "[[1]]",
    "[{}]",
    '""',
]


@pytest.mark.parametrize("value", VALUES)
def test_any_value_of_any_key(value: str) -> None:
    lines = TEXT.splitlines()
    for number, old in enumerate(lines):
        key, equals, _ = old.partition(" = ")
        if equals:
            parses_or_tells("\n".join([*lines[:number], f"{key} = {value}", *lines[number + 1 :]]))


ROBUST = {"robust": {"rule": "median"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"aggregation": {"method": "fedsvd"}, "adapter": None}, "there is no LoRA"),
        (
            {"aggregation": {"method": "rolora"}, "adapter": {"kind": "ia3", "targets": ["query"]}},
            "there is no LoRA",
        ),
        (
            {
                "aggregation": {
                    "method": "fedsvd",
                    "server_optimizer": {"kind": "adam", "lr": 0.1},
                }
            },
            "a rate for each coordinate",
        ),
        ({"aggregation": {"method": "flexlora"}}, "momentum = 0"),
        (
            {
                "aggregation": {"method": "flexlora", "server_momentum": 0.0},
                "secure_aggregation": {},
            },
            "take out one of the two",
        ),
        ({"aggregation": ROBUST, "secure_aggregation": {}}, "take out one of the two"),
        ({"aggregation": ROBUST | {"method": "flexlora", "server_momentum": 0.0}}, "is none"),
        ({"aggregation": {"robust": {"rule": "krum"}}}, "needs 5 updates"),
        ({"aggregation": {"robust": {"rule": "norm"}}}, "max_norm goes with"),
        (
            {"aggregation": ROBUST, "releases": [{"metric": "loss", "share": 0.1}]},
            "one malicious site",
        ),
        (
            {"aggregation": ROBUST, "privacy": {"expected_units": 9.0, "adaptive": {}}},
            "one malicious site",
        ),
        ({"aggregation": {"method": "rolora"}}, "A is never trained"),
    ],
)
def test_an_impossible_pair_is_refused_with_the_reason(change: dict[str, Any], words: str) -> None:
    """Three sites that train LoRA for one round."""
    plain = tiny.contract_of("classification", "bert").model_dump(mode="json")
    plain |= {
        "quorum": 3,
        "sites": [
            {"name": name, "public_key": f"{at}" * 64} for at, name in enumerate("abc", start=1)
        ],
    }
    Contract.model_validate(plain)
    with pytest.raises(ValidationError) as error:
        Contract.model_validate(plain | change)
    assert words in str(error.value)


def test_robust_rules_know_no_weights() -> None:
    plain = tiny.contract_of("classification", "bert").model_dump(mode="json")
    plain |= {"quorum": 3, "aggregation": ROBUST, "sites": [{"name": name} for name in "abc"]}
    Contract.model_validate(plain)
    plain["sites"][0]["weight"] = 2.0
    with pytest.raises(ValidationError, match="count every site once"):
        Contract.model_validate(plain)
