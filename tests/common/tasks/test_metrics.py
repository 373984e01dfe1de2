"""Each metric against its definition."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter

from silotune.common.contract.task import LOWER_IS_BETTER, Classification, Task
from silotune.common.tasks.metrics import (
    METRICS,
    Scores,
    calibration_error,
    constant,
    score,
)
from tests import tiny

FUZZ = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def of_classes(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Scores:
    """The scores of a classification with as many labels as there are logits."""
    names = [{"name": f"l{k}", "values": [str(k)]} for k in range(logits.shape[1])]
    task = Classification.model_validate({"label_column": "y", "labels": names})
    return score(task, list(logits), labels.tolist())


def table(rows: list[list[float]]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32)


def classes(labels: list[int]) -> NDArray[np.int64]:
    return np.array(labels, dtype=np.int64)


binary = st.lists(
    st.tuples(st.integers(-4, 4).map(lambda k: k / 2), st.integers(0, 1)), min_size=1, max_size=20
)


@FUZZ
@given(binary)
def test_two_classes(rows: list[tuple[float, int]]) -> None:
    """Loss, accuracy, F1 and AUC in plain Python; AUC as the share of pairs in the right order."""
    found = of_classes(table([[0.0, m] for m, _ in rows]), classes([label for _, label in rows]))
    guesses = [int(m > 0) for m, _ in rows]
    pairs = [(a, b) for a, label in rows for b, other in rows if label == 1 and other == 0]

    def f1(cls: int) -> float:
        hits = sum(g == label == cls for g, (_, label) in zip(guesses, rows, strict=True))
        both = guesses.count(cls) + sum(label == cls for _, label in rows)
        return 2 * hits / both if both else 0.0

    def nll(margin: float, label: int) -> float:
        return math.log1p(math.exp(-margin if label else margin))

    assert found["loss"] == pytest.approx(sum(nll(m, y) for m, y in rows) / len(rows), rel=1e-6)
    assert found["accuracy"] == pytest.approx(
        sum(g == y for g, (_, y) in zip(guesses, rows, strict=True)) / len(rows)
    )
    assert found["macro_f1"] == pytest.approx((f1(0) + f1(1)) / 2)
    assert found["predicted_classes"] == len(set(guesses))
    if pairs:
        share = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
        assert found["auc"] == pytest.approx(share)
    else:
        assert found["auc"] is None


def test_three_classes() -> None:
    found = of_classes(table([[3, 0, 0], [0, 3, 0], [0, 3, 0], [3, 0, 0]]), classes([0, 1, 2, 2]))
    assert found["auc"] is None
    assert found["accuracy"] == 0.5
    # F1 is 2/3 for the first two classes and 0 for the one never predicted.
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert found["predicted_classes"] == 2


def test_a_class_neither_there_nor_predicted_still_counts_in_macro_f1() -> None:
    found = of_classes(table([[1, 0, 0], [0, 1, 0]]), classes([0, 1]))
    assert found["macro_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("label", [0, 1])
def test_auc_needs_both_classes(label: int) -> None:
    found = of_classes(table([[0, 1], [1, 0], [0, 2]]), classes([label] * 3))
    assert found["auc"] is None
    assert found["accuracy"] == pytest.approx([1 / 3, 2 / 3][label])


def test_one_answer_for_all_is_told() -> None:
    found = of_classes(table([[1, 0]] * 20), classes([0] * 19 + [1]))
    assert (found["accuracy"], found["predicted_classes"], found["auc"]) == (0.95, 1, 0.5)
    assert found["macro_f1"] < 0.5


def test_zeros_mean_every_class_alike() -> None:
    found = of_classes(np.zeros((4, 2), np.float32), classes([0, 1, 0, 1]))
    assert found["loss"] == pytest.approx(math.log(2))
    assert (found["auc"], found["predicted_classes"]) == (0.5, 1)


def test_huge_logits_stay_finite() -> None:
    found = of_classes(table([[1e30, -1e30], [-3e38, 3e38]]), classes([0, 1]))
    assert found == {
        "loss": 0.0,
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "auc": 1.0,
        "auprc": 1.0,
        "calibration": 0.0,
        "predicted_classes": 2,
    }
    wrong = of_classes(table([[1e4, -1e4]]), classes([1]))
    assert wrong["loss"] == pytest.approx(2e4)


@FUZZ
@given(binary, st.integers(-100, 100))
def test_neither_a_shift_nor_the_order_matters(rows: list[tuple[float, int]], shift: int) -> None:
    logits, labels = table([[0.0, m] for m, _ in rows]), classes([y for _, y in rows])
    order = np.random.default_rng(shift + 100).permutation(len(rows))
    first, second = of_classes(logits, labels), of_classes(logits[order] + shift, labels[order])
    assert (first["auc"] is None) == (second["auc"] is None)
    numbers = [[v for v in s.values() if v is not None] for s in (first, second)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=1e-6)


# --- other tasks -------------------------------------------------------------------------------

KINDS = ["classification", "multi-label", "tokens", "regression", "ranking", "language"]


def task_of(kind: str, **more: Any) -> Any:
    return TypeAdapter(Task).validate_python(tiny.task_of(kind) | more)


def logits_of(tags: Any, certain: float = 40.0) -> NDArray[np.float32]:
    """[W, 5], of a model that says these tags."""
    return certain * np.eye(5, dtype=np.float32)[np.asarray(tags, dtype=np.int64)]


def rows_of(
    kind: str, seed: int = 0, n: int = 40
) -> tuple[list[Any], list[Any], list[str], list[Any]]:
    """Random outputs, targets and queries, and the outputs of a model that knows the targets."""
    rng = np.random.default_rng(seed)
    queries = [f"q{k}" for k in rng.integers(2, size=n)] if kind == "ranking" else []
    if kind == "tokens":
        targets: list[Any] = [rng.integers(5, size=k % 7 + 1).tolist() for k in range(n)]
        tags = [rng.integers(5, size=len(own)) for own in targets]
        return [logits_of(own, 2.0) for own in tags], targets, [], [logits_of(o) for o in targets]
    if kind == "language":
        counts = rng.integers(1, 9, size=n)
        outputs = [np.array([2.0 * c, c, rng.integers(c + 1)]) for c in counts]
        return outputs, ["answer"] * n, [], [np.array([0.0, c, c]) for c in counts]
    size = {"classification": 3, "multi-label": 3}.get(kind, 1)
    logits = list(rng.normal(0, 2, (n, size)).astype(np.float32))
    if kind == "classification":
        targets = rng.integers(3, size=n).tolist()
        return logits, targets, [], list(20 * np.eye(3, dtype=np.float32)[targets])
    if kind == "multi-label":
        targets = rng.integers(2, size=(n, 3)).tolist()
        return logits, targets, [], list(40 * np.array(targets, np.float32) - 20)
    if kind == "regression":
        targets = rng.random(n).tolist()
        return logits, targets, [], list(np.array(targets, np.float32)[:, None])
    targets = rng.integers(2, size=n).tolist()
    return logits, targets, queries, list(40 * np.array(targets, np.float32)[:, None] - 20)


@pytest.mark.parametrize("kind", KINDS)
def test_each_metric_has_a_name_to_show(kind: str) -> None:
    outputs, targets, queries, _ = rows_of(kind)
    found, task = score(task_of(kind), outputs, targets, queries), task_of(kind)
    assert set(task.metrics) <= set(found)
    assert set(found) - {"predicted_classes"} <= set(METRICS)
    assert {type(value) for value in found.values()} <= {float, int, type(None)}
    json.dumps(found, allow_nan=False)


def test_no_name_is_of_no_metric() -> None:
    assert set(METRICS) == {name for kind in KINDS for name in task_of(kind).metrics}
    assert set(METRICS) > LOWER_IS_BETTER


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_does_not_matter(kind: str) -> None:
    outputs, targets, queries, _ = rows_of(kind)
    order = np.random.default_rng(1).permutation(len(targets))
    first, second = (
        score(
            task_of(kind),
            [outputs[k] for k in rows],
            [targets[k] for k in rows],
            [queries[k] for k in rows] if queries else (),
        )
        for rows in (range(len(targets)), order)
    )
    assert first == pytest.approx(second)


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_best_and_always_the_same_is_worse(kind: str) -> None:
    _, targets, queries, truth = rows_of(kind)
    task = task_of(kind)
    best = score(task, truth, targets, queries)
    perfect = {"regression": {"r2": 1.0}, "language": {"perplexity": 1.0}}.get(kind, {})
    for name in task.metrics:
        if best[name] is not None:
            expected = perfect.get(name, 0.0 if name in LOWER_IS_BETTER else 1.0)
            assert best[name] == pytest.approx(expected, abs=1e-5), name
    outputs = constant(task, targets)
    if kind == "language":
        assert outputs is None
        return
    assert outputs is not None
    same = score(task, outputs, targets, queries)
    for name in task.metrics:
        if same[name] is None or name == "calibration":
            continue  # always the same can be as well calibrated
        sign = -1 if name in LOWER_IS_BETTER else 1
        assert sign * same[name] < sign * best[name], name
    wanted = {"ranking": ("auc", 0.5), "regression": ("r2", 0.0), "tokens": ("f1", 0.0)}
    if kind in wanted:
        name, value = wanted[kind]
        assert same[name] == pytest.approx(value, abs=1e-6)


def test_the_best_same_answer_of_two_classes() -> None:
    labels = [{"name": name, "values": [name]} for name in "ab"]
    task, targets = task_of("classification", labels=labels), [0] * 3 + [1] * 7
    outputs = constant(task, targets)
    assert outputs is not None
    found = score(task, outputs, targets)
    assert (found["auc"], found["accuracy"], found["predicted_classes"]) == (0.5, 0.7, 1)
    # No other share for all has a lower loss: it is the entropy.
    assert found["loss"] == pytest.approx(-0.3 * math.log(0.3) - 0.7 * math.log(0.7))
    assert found["calibration"] == pytest.approx(0, abs=1e-6)
    # A class that no row has: its loss must stay finite.
    only = constant(task, [1, 1])
    assert only is not None
    assert score(task, only, [1, 1])["loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["multi-label", "regression", "ranking"])
def test_of_the_same_answers_none_has_a_lower_loss(kind: str) -> None:
    _, targets, queries, _ = rows_of(kind)
    task, outputs = task_of(kind), constant(task_of(kind), targets)
    assert outputs is not None
    least = score(task, outputs, targets, queries)["loss"]
    for by in (-0.1, 0.1):
        other = score(task, [row + np.float32(by) for row in outputs], targets, queries)["loss"]
        assert least < other  # type: ignore[operator]


def test_calibration_by_hand() -> None:
    """Bins of 1/15: 0.7 and 0.72 lie in the eleventh, 0.95 in the last."""
    confidence, right = np.array([0.70, 0.72, 0.95, 1.0]), np.array([True, False, True, True])
    first, last = abs(0.5 - 0.71) * 0.5, abs(1 - 0.975) * 0.5
    assert calibration_error(confidence, right) == pytest.approx(first + last)
    assert calibration_error(np.array([1.0, 1.0]), np.array([False, False])) == 1.0
    rng = np.random.default_rng(0)
    told = rng.random(20_000)
    assert calibration_error(told, rng.random(20_000) < told) < 0.03
    assert calibration_error(told, rng.random(20_000) < told**3) > 0.2


def test_of_several_labels() -> None:
    """Labels a, b, c: told 2 of 3 rightly (1 of them present), 2 of 3, all of none."""
    task = task_of("multi-label")
    outputs = table([[1, 1, -1], [-1, 2, -1], [-1, -1, -1]])
    found = score(task, list(outputs), [[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    assert found["accuracy"] == pytest.approx(7 / 9)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["predicted_classes"] == 2
    truth = [(1, 1), (1, 0), (-1, 0), (-1, 0), (2, 1), (-1, 1), *[(-1, 0)] * 3]
    nll = [math.log1p(math.exp(-z if y else z)) for z, y in truth]
    assert found["loss"] == pytest.approx(sum(nll) / 9)


@pytest.mark.parametrize("log", [None, True])
def test_of_numbers(log: bool | None) -> None:
    """R² and the loss on the scale that is learnt, the errors in the numbers' own unit."""
    task = task_of("regression", log=log)
    true, told = [0.0, 9.0, 100.0], [1.0, 9.0, 81.0]
    places = [[task.target(str(v)) for v in values] for values in (told, true)]
    found = score(task, [np.array([p]) for p in places[0]], places[1])
    assert found["mae"] == pytest.approx((1 + 0 + 19) / 3)
    assert found["rmse"] == pytest.approx(math.sqrt((1 + 0 + 361) / 3))
    a, b = np.array(places)
    assert found["loss"] == pytest.approx(((a - b) ** 2).mean() / 2)
    assert found["r2"] == pytest.approx(1 - ((a - b) ** 2).sum() / ((b - b.mean()) ** 2).sum())
    # Beyond the bounds a number counts as the bound.
    far = score(task, [np.array([7.0])] * 2, [1.0, 0.5])
    assert far["mae"] == pytest.approx((100 - task.number(0.5)) / 2)
    assert score(task, [np.array([0.1])] * 2, [0.5, 0.5])["r2"] is None


ranked = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(0, 1), st.sampled_from("xyz")),
    min_size=1,
    max_size=60,
)


@FUZZ
@given(ranked)
def test_a_ranking_by_brute_force(rows: list[tuple[int, int, str]]) -> None:
    """Of equal scores the relevant ones count as the last; of each query's candidates the first ten
    count for NDCG and recall."""
    found = score(
        task_of("ranking"),
        [np.array([z], np.float32) for z, _, _ in rows],
        [y for _, y, _ in rows],
        [q for _, _, q in rows],
    )
    mrr, ndcg, recall = [], [], []
    for query in "xyz":
        own = sorted(((-z, y) for z, y, q in rows if q == query))
        relevance = [y for _, y in own]
        if not 0 < sum(relevance) < len(relevance):
            continue
        mrr.append(1 / (relevance.index(1) + 1))

        def gain(of: list[int]) -> float:
            return sum(y / math.log2(place + 2) for place, y in enumerate(of[:10]))

        ndcg.append(gain(relevance) / gain(sorted(relevance, reverse=True)))
        recall.append(sum(relevance[:10]) / min(sum(relevance), 10))
    for name, values in (("mrr", mrr), ("ndcg", ndcg), ("recall_at_10", recall)):
        assert found[name] == (pytest.approx(sum(values) / len(values)) if values else None)
    pairs = [(a, b) for a, y, _ in rows for b, other, _ in rows if y == 1 and other == 0]
    assert found["auc"] == (
        pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)) if pairs else None
    )


TAGS = ["O", "B-site", "I-site", "B-sign", "I-sign"]


def entities(tags: list[str]) -> list[int]:
    return [TAGS.index(tag) for tag in tags]


@pytest.mark.parametrize(
    ("told", "precision", "recall"),
    [
        ("O B-site I-site O B-sign", 1, 1),
        ("O B-site O O B-sign", 1 / 2, 1 / 2),  # ends too early
        ("B-site I-site I-site O B-sign", 1 / 2, 1 / 2),  # begins too early
        ("O B-sign I-sign O B-sign", 1 / 2, 1 / 2),  # another type
        ("O B-site I-sign O B-sign", 1 / 2, 1 / 2),  # its type changes on the way
        ("O I-site I-site O I-sign", 0, 0),  # no entity begins with I
        ("O B-site B-site O B-sign", 1 / 3, 1 / 2),  # two instead of one
        ("O B-site I-site", 1, 1 / 2),  # reads no further: what is behind counts as O
        ("O", 0, 0),
        ("", 0, 0),
        ("B-sign B-sign B-sign B-sign B-sign", 1 / 5, 1 / 2),
    ],
)
def test_entities_are_found_whole_or_not(told: str, precision: float, recall: float) -> None:
    truth = ["O", "B-site", "I-site", "O", "B-sign"]
    found = score(
        task_of("tokens"),
        [logits_of(entities(told.split())), np.zeros((2, 5), np.float32)],
        [entities(truth), [0, 0]],
    )
    f1 = 2 * precision * recall / (precision + recall) if precision else 0
    assert found["precision"] == pytest.approx(precision)
    assert found["recall"] == pytest.approx(recall)
    assert found["f1"] == pytest.approx(f1)
    filled = [*told.split(), *["O"] * 5][:5]
    right = sum(a == b for a, b in zip(filled, truth, strict=True)) + 2
    assert found["accuracy"] == pytest.approx(right / 7)
    wrong = 40 * np.mean([a != b for a, b in zip(told.split(), truth, strict=False)] or [0])
    assert found["loss"] == pytest.approx((wrong + math.log(5)) / 2)  # of the words that are read


def test_an_entity_ends_with_its_sentence() -> None:
    task = task_of("tokens")
    split = score(task, [logits_of([1]), logits_of([2])], [[1], [2]])
    whole = score(task, [logits_of([1, 2])], [[1, 2]])
    assert (whole["f1"], whole["recall"]) == (1.0, 1.0)
    assert split["precision"] == 1.0  # one entity, of one word; I-site alone is none


@pytest.mark.parametrize("sentences", [[[0, 0]], [[]], [[], [0]]])
def test_sentences_without_entities_or_words(sentences: list[list[int]]) -> None:
    found = score(task_of("tokens"), [logits_of(s) for s in sentences], sentences)
    assert (found["f1"], found["precision"], found["recall"]) == (0.0, 0.0, 0.0)
    assert found["accuracy"] == (1.0 if any(sentences) else None)
    json.dumps(found, allow_nan=False)


def test_of_answers() -> None:
    outputs = [np.array([3.0, 3.0, 3.0]), np.array([5.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.0])]
    found = score(task_of("language"), outputs, ["a", "b", "c"])
    assert found["loss"] == pytest.approx((1 + 5 + 0) / 3)
    assert found["perplexity"] == pytest.approx(math.exp(8 / 4))
    assert found["accuracy"] == pytest.approx(3 / 4)
    assert found["exact_match"] == pytest.approx(2 / 3)
