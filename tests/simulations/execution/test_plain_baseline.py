"""The plain baseline learns what there is to learn, of each task, and is scored as all others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.common.contract.contract import Contract
from silotune.common.data import records
from silotune.common.tasks.metrics import constant, score
from silotune.simulations.execution import plain_features
from silotune.simulations.execution.plain_baseline import run_plain
from silotune.simulations.execution.variants import PLAIN, Job, JobResult, plain_model, variants_of
from tests import tiny

SITES = ("east", "west")


def classes(row: dict[str, str]) -> str:
    return "b" if "burning" in row["text"].split() else "a"


def labels(row: dict[str, str]) -> str:
    words = row["text"].split()
    return "|".join(name for name, word in zip("abc", ("burning", "arm", "left"), strict=True)
                    if word in words)  # fmt: skip


def tags(row: dict[str, str]) -> str:
    found = {"arm": "B-site", "chest": "B-site", "pain": "B-sign"}
    return " ".join(found.get(word, "O") for word in row["text"].split())


def number(row: dict[str, str]) -> str:
    return str(20 + 60 * ("burning" in row["text"].split()))


def by_age(row: dict[str, str]) -> str:
    return "b" if int(row["age"]) % 40 < 20 else "a"  # no bin's edge is there


def number_by_age(row: dict[str, str]) -> str:
    return str(abs(int(row["age"]) - 50))


def labels_by_age(row: dict[str, str]) -> str:
    return "|".join([*"a" * (int(row["age"]) > 50), *"b" * (row["smoker"] == "yes")])


def fits(row: dict[str, str]) -> str:
    return "yes" if row["question"].split()[-1] in row["answer"].split() else "no"


# task, model -> what a label is made of, the metric
TASKS: dict[tuple[str, str], tuple[Callable[[dict[str, str]], str], str]] = {
    ("classification", "bert"): (classes, "accuracy"),
    ("multi-label", "bert"): (labels, "micro_f1"),
    ("tokens", "bert"): (tags, "f1"),
    ("regression", "bert"): (number, "r2"),
    ("bi", "bert"): (fits, "auc"),
    ("classification", "one-hot"): (by_age, "accuracy"),
    ("multi-label", "one-hot"): (labels_by_age, "micro_f1"),
    ("regression", "one-hot"): (number_by_age, "r2"),
}


def split_of(folder: Path, kind: str, label: Callable[[dict[str, str]], str], n: int = 400) -> Path:
    """Rows as a simulation has them: those of all sites to train, each site's for tests."""
    rows = tiny.rows_of(kind, n)
    for row in rows:
        row["label"] = label(row)
    (folder / "test").mkdir(parents=True)
    quarter = n // 8
    tiny.write(folder / "pooled.csv", rows[2 * quarter :])
    for site, own in zip(SITES, (rows[:quarter], rows[quarter : 2 * quarter]), strict=True):
        tiny.write(folder / "test" / f"{site}.csv", own)
    return folder


def contract_of(kind: str, model: str, **more: Any) -> Contract:
    sites = [{"name": site} for site in SITES]
    return tiny.contract_of(kind, model, sites=sites, quorum=2, **more)


def result_of(contract: Contract, data: Path) -> JobResult:
    phases = contract.model_dump(mode="json", exclude_none=True)["phases"]
    found = {v.name: v for v in variants_of(contract, {"no-dp": {"phases": phases}})}
    (own,) = found[PLAIN].contracts
    return run_plain(Job(PLAIN, 0, own, data / "run", None, data, False, 1))


@pytest.mark.parametrize(("kind", "model"), TASKS)
def test_it_learns_each_task_and_has_scores_of_each_site(
    tmp_path: Path, kind: str, model: str
) -> None:
    label, metric = TASKS[kind, model]
    contract = contract_of(kind, model)
    data = split_of(tmp_path / "rows", kind, label)
    result = result_of(contract, data)
    assert set(result.scores) == {"", *SITES}
    assert (result.variant, result.repeat, result.rounds) == (PLAIN, 0, ())
    test = [records.read(data / "test" / f"{site}.csv", contract) for site in SITES]
    targets = [target for found in test for target in found.labels]
    queries = [query for found in test for query in found.queries]
    same = score(contract.task, constant(contract.task, targets), targets, queries)
    found, least = result.scores[""][metric], same[metric]
    assert found is not None
    assert least is not None
    assert found > (0.6 if kind == "regression" else 0.8) > least  # ridge shrinks
    loss, of_same = result.scores[""]["loss"], same["loss"]
    assert loss is not None
    assert of_same is not None
    assert math.isfinite(loss)
    assert loss < of_same
    for name in contract.task.metrics:
        assert (result.scores[""][name] is None) == (same[name] is None)
    again = result_of(contract, data)
    assert again.scores == result.scores  # nothing is drawn


def test_there_is_none_of_language() -> None:
    contract = tiny.contract_of("language", "llama")
    assert plain_model(contract) == ""
    phases = contract.model_dump(mode="json", exclude_none=True)["phases"]
    assert PLAIN not in {v.name for v in variants_of(contract, {"no-dp": {"phases": phases}})}


def test_a_class_that_no_training_row_has_is_unlikely_and_one_class_is_always_said(
    tmp_path: Path,
) -> None:
    contract = contract_of("classification", "bert")
    data = split_of(tmp_path / "rows", "classification", lambda _: "b", 80)
    rows = tiny.rows_of("classification", 4)
    for row, own in zip(rows, "abcc", strict=True):
        row["label"] = own
    tiny.write(data / "test" / "east.csv", rows)
    scores = result_of(contract, data).scores
    assert scores["west"]["accuracy"] == 1.0
    assert scores["east"]["accuracy"] == 0.25
    loss = scores["east"]["loss"]
    assert loss is not None
    assert loss == pytest.approx(0.75 * -math.log(1e-9), rel=1e-3)


@pytest.mark.parametrize("model", ["bert", "one-hot"])
def test_weights_of_classes_are_the_contracts(tmp_path: Path, model: str) -> None:
    """Of rows that tell nothing the class that weighs most is said."""

    def rare(row: dict[str, str]) -> str:
        return "b" if int(row["id"]) % 4 == 0 else "a"

    contract = contract_of("classification", model)
    data = split_of(tmp_path / "rows", "classification", rare)
    weighing = contract.changed(task={"class_weights": [1.0, 12.0, 1.0]})
    plain, weighed = (result_of(c, data).scores[""]["accuracy"] for c in (contract, weighing))
    assert plain is not None
    assert weighed is not None
    assert weighed < 0.5 < plain


def test_numbers_are_read_as_they_stand_and_missing_ones_are_none(tmp_path: Path) -> None:
    contract = tiny.contract_of("classification", "one-hot")
    columns = [c.model_dump(mode="json") for c in contract.input.columns]  # type: ignore[union-attr]
    columns[0]["lowest"] = 1.0
    contract = contract.changed(input={"columns": columns})
    file = tmp_path / "rows.csv"
    file.write_text("smoker,age\nyes,41\n,0\nno, 1e1 \nno,\n")
    found = plain_features.of_table(file, contract.input)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, [[41, 1, 0], [np.nan, 0, 0], [10, 0, 1], [np.nan, 0, 1]])


def test_texts_without_spaces_are_read_by_characters() -> None:
    """As words each of these texts would be another one."""
    train, _ = plain_features.of_texts(["今天很好", "天气很好"], ["很好"])
    assert train.shape[1] == 10  # 今 天 很 好 气, 今天 天很 很好 天气 气很
    words, _ = plain_features.of_texts(["a good day", "good weather 好"], ["good"])
    assert words.shape[1] == 3


def test_a_word_is_told_by_itself_and_by_its_neighbours() -> None:
    first, second, _ = plain_features.of_words("Type II diabetes")
    assert set(first) == {
        "shape Xx", "initial", "begins t", "begins ty", "begins typ", "ends e", "ends pe",
        "ends ype", "0 type", "1 ii", "2 diabetes",
    }  # fmt: skip
    assert {"shape X", "inner", "-1 type", "0 ii", "1 diabetes"} < set(second)
