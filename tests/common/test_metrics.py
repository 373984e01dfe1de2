"""Each metric against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from silotune.common.metrics import METRICS, Scores, score
from silotune.common.task import Classification

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
        "loss": 0.0, "accuracy": 1.0, "macro_f1": 1.0, "auc": 1.0, "auprc": 1.0,
        "calibration": 0.0, "predicted_classes": 2,
    }
    wrong = of_classes(table([[1e4, -1e4]]), classes([1]))
    assert wrong["loss"] == pytest.approx(2e4)


@FUZZ
@given(binary, st.integers(-100, 100))
def test_neither_a_shift_nor_the_order_matters(
    rows: list[tuple[float, int]], shift: int
) -> None:
    logits, labels = table([[0.0, m] for m, _ in rows]), classes([y for _, y in rows])
    order = np.random.default_rng(shift + 100).permutation(len(rows))
    first, second = of_classes(logits, labels), of_classes(logits[order] + shift, labels[order])
    assert (first["auc"] is None) == (second["auc"] is None)
    numbers = [[v for v in s.values() if v is not None] for s in (first, second)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=1e-6)
