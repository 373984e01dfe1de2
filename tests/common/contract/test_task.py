"""What a task allows in a target's cell, what it refuses, and what it goes with in a contract."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.contract.task import Regression, Task
from silotune.common.data.records import Records, parse
from silotune.common.errors import ContractError, DataError
from silotune.common.formats.cell_values import UNREAD
from tests import tiny

FUZZ = settings(deadline=None, max_examples=200, derandomize=True, database=None)
RECIPES = Path(__file__).parents[3] / "simulations" / "recipes"
HASHES = {  # as when every contract was a classification, but for the model's
    "heart-diagnosis": "63b96075644fb66830012a240040c40f34fd9272c75acb5c27ad0f03eb7dd314",
    "service-sentiment": "e8cb69ec6878b59112387ec76804cafb92e2cb7c0b915b900ad73e2fef9f0ff6",
}


def task_of(kind: str, **more: Any) -> Any:
    return TypeAdapter(Task).validate_python(tiny.task_of(kind) | more)


# --- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "cell", "target"),
    [
        ("classification", {}, "a", 0),
        ("classification", {}, " c ", 2),
        ("multi-label", {}, "", [0, 0, 0]),
        ("multi-label", {}, " b ", [0, 1, 0]),
        ("multi-label", {}, "c|a", [1, 0, 1]),
        ("multi-label", {}, "a||a|", [1, 0, 0]),
        ("multi-label", {"separator": "; "}, "a; b", [1, 1, 0]),
        ("tokens", {}, "", []),
        ("tokens", {}, "O B-site  I-site\tB-sign I-sign", [0, 1, 2, 3, 4]),
        ("regression", {}, "25", 0.25),
        ("regression", {}, " 1e2 ", 1.0),
        ("regression", {}, "-3", 0.0),
        ("regression", {}, "1e9", 1.0),
        ("regression", {"log": True}, "100", 1.0),
        ("regression", {"log": True, "highest": 99.0}, "9", 0.5),
        ("regression", {"lowest": -1.0, "highest": 1.0}, "0", 0.5),
        ("ranking", {}, "yes", 1),
        ("ranking", {}, " no", 0),
        ("language", {}, " as it stands ", " as it stands "),
    ],
)
def test_a_cell_becomes_a_target(kind: str, more: dict[str, Any], cell: str, target: Any) -> None:
    assert task_of(kind, **more).target(cell) == target


def test_several_values_can_mean_one_label() -> None:
    labels = [{"name": "well", "values": ["0", "none"]}, {"name": "ill", "values": ["1"]}]
    for kind, expected in (("classification", [0, 0, 1]), ("multi-label", [[1, 0]] * 2 + [[0, 1]])):
        task = task_of(kind, labels=labels)
        assert [task.target(cell) for cell in ("0", "none", "1")] == expected
        assert task.outputs == 2


@pytest.mark.parametrize(
    ("kind", "cell", "words"),
    [
        ("classification", "d", "one of the contract's labels (a, b, c)"),
        ("classification", "", "one of the contract's labels (a, b, c)"),
        ("classification", "A", "one of the contract's labels (a, b, c)"),
        ("multi-label", "a|d", "the contract's labels (a, b, c) between '|'"),
        ("multi-label", "a,b", "the contract's labels (a, b, c) between '|'"),
        (
            "tokens",
            "O B-arm",
            "the tags O, B-site, I-site, B-sign, I-sign between spaces, or those of "
            "IOB1, BIOES or BILOU for the same entities",
        ),
        (
            "tokens",
            "0",
            "the tags O, B-site, I-site, B-sign, I-sign between spaces, or those of "
            "IOB1, BIOES or BILOU for the same entities",
        ),
        ("regression", "", "numbers"),
        ("regression", "nan", "numbers"),
        ("regression", "5 €", "numbers"),
        ("regression", "inf", "numbers"),
        ("regression", "1_030", f"numbers{UNREAD}"),
        ("regression", "1,5", f"numbers{UNREAD}"),
        ("ranking", "maybe", "yes, no"),
        ("ranking", "", "yes, no"),
        ("language", "", "a text that is not empty"),
        ("language", " \n", "a text that is not empty"),
    ],
)
def test_a_cell_that_is_no_target(kind: str, cell: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        task_of(kind).target(cell)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("kind", "outputs", "answers"),
    [
        ("classification", 3, "a, b, c"),
        ("multi-label", 3, "any of a, b, c"),
        ("tokens", 5, "O, B-site, I-site, B-sign, I-sign"),
        ("regression", 1, "0 to 100"),
        ("ranking", 1, "relevant or not, ranked within each query"),
        ("language", 0, "answers"),
    ],
)
def test_outputs_and_answers(kind: str, outputs: int, answers: str) -> None:
    task = task_of(kind)
    assert (task.outputs, task.answers) == (outputs, answers)
    assert task_of("regression", log=True).answers == "0 to 100 (log)"


bounds = st.tuples(st.floats(-0.9, 1e6), st.floats(1e-3, 1e6))


@FUZZ
@given(bounds, st.booleans(), st.floats(-1e7, 1e7))
def test_a_number_comes_back_from_its_place(
    bounds: tuple[float, float], log: bool, number: float
) -> None:
    low, width = bounds
    task = Regression(label_column="y", lowest=low, highest=low + width, log=log or None)
    place = task.target(repr(number))
    assert 0 <= place <= 1
    clipped = min(max(number, task.lowest), task.highest)
    assert task.number(place) == pytest.approx(clipped, rel=1e-6, abs=1e-6)
    # What a model says beyond the bounds counts as the bound.
    assert task.number(place + 2) == pytest.approx(task.highest)
    assert task.number(place - 2) == pytest.approx(task.lowest)


def test_the_logarithm_sets_small_numbers_apart() -> None:
    plain, log = (task_of("regression", highest=50_000.0, log=log) for log in (None, True))
    assert plain.target("50") == pytest.approx(0.001)
    assert log.target("50") == pytest.approx(math.log(51) / math.log(50_001))


# --- settings of a task ------------------------------------------------------------------------

TWICE = [{"name": "a", "values": ["0"]}, {"name": "a", "values": ["1"]}]
SHARED = [{"name": "a", "values": ["0"]}, {"name": "b", "values": ["0"]}]
TWO = [{"name": "a", "values": ["0"]}, {"name": "b", "values": ["1"]}]


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("classification", {"labels": TWICE}, "label name 'a' stands twice"),
        ("classification", {"labels": SHARED}, "label value '0' stands twice"),
        ("classification", {"labels": TWO[:1]}, "needs at least 2, has 1"),
        ("multi-label", {"labels": TWICE}, "label name 'a' stands twice"),
        ("multi-label", {"labels": SHARED}, "label value '0' stands twice"),
        ("multi-label", {"separator": ""}, "'task.separator'"),
        (
            "classification",
            {"class_weights": [1.0]},
            "class_weights needs one weight for each of 3 labels, has 1",
        ),
        ("classification", {"class_weights": [1.0, 0.0, 1.0]}, "'task.class_weights.2'"),
        ("classification", {"label_smoothing": 1.0}, "'task.label_smoothing'"),
        ("tokens", {"entities": []}, "needs at least 1, has 0"),
        ("tokens", {"entities": ["site", "site"]}, "entity 'site' stands twice"),
        ("tokens", {"entities": ["a site"]}, "tags stand between spaces"),
        (
            "tokens",
            {"class_weights": [0.5, 1.0]},
            "class_weights needs one weight for each of 5 tags, has 2",
        ),
        ("tokens", {"class_weights": [0.5, 1.0, -1.0, 1.0, 1.0]}, "'task.class_weights.3'"),
        ("tokens", {"class_weights": [0.5, 1.0, 1.0, 1.0, 1e39]}, "'task.class_weights.5'"),
        ("tokens", {"class_weights": []}, "'task.class_weights' needs at least 1, has 0"),
        ("regression", {"lowest": 100.0}, "lowest must be below highest"),
        ("regression", {"lowest": -1.0, "log": True}, "log = true needs lowest above -1"),
        ("regression", {"highest": math.inf}, "'task.highest' must be a finite number"),
        ("ranking", {"others": ["no", "yes"]}, "value 'yes' is both relevant and not"),
        ("ranking", {"relevant": []}, "needs at least 1, has 0"),
        ("language", {"labels": TWO}, "Unknown key 'task.labels'"),
        ("regression", {"labels": TWO}, "Unknown key 'task.labels'"),
        ("classification", {"kind": "guessing"}, "'task.kind' must be one of 'classification'"),
    ],
)
def test_settings_that_make_no_task(kind: str, more: dict[str, Any], words: str) -> None:
    data = {
        "classification": tiny.contract_of("classification", "one-hot"),
        "multi-label": tiny.contract_of("multi-label", "one-hot"),
        "regression": tiny.contract_of("regression", "one-hot"),
        "tokens": tiny.contract_of("tokens", "bert"),
        "ranking": tiny.contract_of("bi", "bert"),
        "language": tiny.contract_of("language", "llama"),
    }[kind]
    with pytest.raises(ContractError) as caught:
        data.changed(task=more)
    (sentence,) = caught.value.problems
    assert words in sentence


# --- contracts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HASHES)
def test_a_contract_keeps_its_hash(name: str) -> None:
    """A site's permission, its ledger and a run's files name a contract by its hash."""
    text = (RECIPES / name / "contract.toml").read_text(encoding="utf-8")
    assert contracts.parse(text).hash == HASHES[name]
    without = "\n".join(
        line for line in text.splitlines() if line.strip() != 'kind = "classification"'
    )
    found = contracts.parse(without)
    assert (found.task.kind, found.hash) == ("classification", HASHES[name])


def test_a_default_that_is_written_out_is_no_other_contract(table_contract: Contract) -> None:
    dump = table_contract.model_dump(mode="json")
    del dump["task"]["kind"]
    assert Contract.model_validate(dump).hash == table_contract.hash
    for task in ({"class_weights": [1.0, 1.0]}, {"label_smoothing": 0.1}):
        assert table_contract.changed(task=task).hash != table_contract.hash


def test_a_contract_of_tags_keeps_its_hash() -> None:
    contract = tiny.contract_of("tokens", "bert").changed(model={"sha256": "0" * 64})
    assert contract.hash == "ef6c3e4c83936d06d69ea597c5a793da790e2b707f7cea9c8f2727c6bf5d98f6"


HEAD = {"trains": "head", "rounds": 1, "sampling_rate": 0.5, "head_lr": 1.0}
ADAPTER = {"trains": "adapter", "rounds": 1, "sampling_rate": 0.5, "adapter_lr": 1.0}
SMALL = {"kind": "encoder", "name": "m", "sha256": "0" * 64, "max_tokens": 32}
PAIR = {"kind": "pair", "first": "question", "second": "answer"}
TEXT = {"kind": "text", "column": "text"}
MISFITS: dict[str, tuple[tuple[str, str], dict[str, Any], list[tuple[str, str]]]] = {
    "a task of language on an encoder": (
        ("language", "llama"),
        {"model": SMALL},
        [("model", "go together")],
    ),
    "another task on a language model": (
        ("classification", "llama"),
        {"model": SMALL | {"kind": "language-model"}},
        [("model", "go together")],
    ),
    "a head on a language model": (
        ("language", "llama"),
        {"phases": [HEAD], "adapter": None},
        [("phases", 'phase 1 trains "head"')],
    ),
    "no head for another task": (
        ("tokens", "bert"),
        {"phases": [ADAPTER]},
        [("phases", 'phase 1 trains "adapter"')],
    ),
    "the second phase": (
        ("language", "llama"),
        {
            "phases": [
                ADAPTER | {"budget_share": 0.5},
                HEAD | {"trains": "head+adapter", "adapter_lr": 1.0, "budget_share": 0.5},
            ]
        },
        [("phases", 'phase 2 trains "head+adapter"')],
    ),
    "a ranking of texts": (
        ("cross", "bert"),
        {"input": TEXT},
        [("input", 'needs input.kind = "pair"')],
    ),
    "pairs read apart for another task": (
        ("regression", "bert"),
        {"input": PAIR | {"by": "bi"}},
        [("input", 'pairs read apart (by = "bi") are for ranking')],
    ),
    "tokens of pairs": (
        ("tokens", "bert"),
        {"input": PAIR},
        [("input", '"tokens" needs input.kind = "text"')],
    ),
    "language of pairs": (
        ("language", "llama"),
        {"input": PAIR},
        [("input", '"language" needs input.kind = "text"')],
    ),
    "tokens whitened": (
        ("tokens", "bert"),
        {"model": {"standardise": {"sentences": ["a b"]}}},
        [("model", "not for tokens")],
    ),
    "an accuracy of numbers": (
        ("regression", "bert"),
        {"releases": [{"metric": "accuracy", "share": 0.1}]},
        [("releases", "no accuracy")],
    ),
    "another task's metric": (
        ("regression", "bert"),
        {"aggregation": {"early_stop": {"metric": "auc"}}},
        [("aggregation", 'early_stop.metric must be one of r2, mae, rmse, loss, got "auc"')],
    ),
    "all of it at once": (
        ("tokens", "bert"),
        {"phases": [ADAPTER], "input": PAIR, "model": {"standardise": {"sentences": ["a b"]}}},
        [("phases", "trains"), ("input", "needs"), ("model", "whiten")],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_go_together_is_told_under_its_key(case: str) -> None:
    """And nothing else is told."""
    kinds, sections, expected = MISFITS[case]
    dump = tiny.contract_of(*kinds).model_dump(mode="json")
    for key, part in sections.items():
        whole = key not in ("model", "aggregation") or "sha256" in part
        dump[key] = part if whole else dump[key] | part
    with pytest.raises(ValidationError) as caught:
        Contract.model_validate(dump)
    (error,) = caught.value.errors()
    wrong = error["ctx"]["wrong"]
    assert [key for key, _ in wrong] == [key for key, _ in expected]
    for (_, sentence), (_, words) in zip(wrong, expected, strict=True):
        assert words in sentence


@pytest.mark.parametrize(("kind", "model"), tiny.CASES)
def test_every_task_has_a_contract_and_a_hash_of_its_own(kind: str, model: str) -> None:
    contract = tiny.contract_of(kind, model)
    assert Contract.model_validate(contract.model_dump(mode="json")) == contract
    others = {tiny.contract_of(*case).hash for case in tiny.CASES if case != (kind, model)}
    assert contract.hash not in others


# --- rows --------------------------------------------------------------------------------------


def read(kind: str, model: str, **cells: str) -> Records:
    row = tiny.rows_of("bi" if kind == "cross" else kind, 1)[0] | cells
    return parse(tiny.table_of([row]), tiny.contract_of(kind, model))


def test_rows_of_each_kind_of_input() -> None:
    found = read("tokens", "bert", text=" pain  in ", label="B-sign O")
    assert (found.inputs, found.labels, found.queries) == ([" pain  in "], [[3, 0]], ())
    found = read("cross", "bert", query=" q7 ", question="pain", answer="arm", label="yes")
    assert (found.inputs, found.labels, found.queries) == ([("pain", "arm")], [1], ("q7",))
    found = read("language", "llama", text="pain", label="no pain")
    assert (found.inputs, found.labels) == ([("pain", "no pain")], ["no pain"])


@pytest.mark.parametrize(("text", "tags"), [("pain in", "O"), ("", "O"), ("pain", "")])
def test_as_many_tags_as_words(text: str, tags: str) -> None:
    with pytest.raises(DataError, match="needs as many tags as 'text' has words") as caught:
        read("tokens", "bert", text=text, label=tags)
    assert caught.value.code == "E303"
    assert "pain" not in str(caught.value)


@pytest.mark.parametrize(("kind", "model"), tiny.CASES)
def test_a_cell_that_is_no_target_is_told_without_it(kind: str, model: str) -> None:
    bad = " " if kind == "language" else "§ secret §"
    with pytest.raises(DataError, match="column 'label' allows") as caught:
        read(kind, model, label=bad)
    assert caught.value.code == "E303"
    assert "secret" not in str(caught.value)
    assert repr(bad) in caught.value.local


def test_a_ranking_needs_its_query_column() -> None:
    contract = tiny.contract_of("bi", "bert").changed(task={"query_column": "topic"})
    with pytest.raises(DataError, match="Column 'topic' is not in") as caught:
        parse(tiny.table_of(tiny.rows_of("bi", 2)), contract)
    assert caught.value.code == "E302"
