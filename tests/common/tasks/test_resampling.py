"""Metrics of resamples are those of the repeated rows; a bootstrap has the error that is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from silotune.common.contract.task import Task
from silotune.common.tasks.metrics import score
from silotune.common.tasks.resampling import RESAMPLES, draws, metric_of
from tests.common.tasks.test_metrics import KINDS, rows_of, task_of


def repeated(rows: Any, counts: Any) -> list[Any]:
    return [row for row, count in zip(rows, counts, strict=True) for _ in range(int(count))]


def check(task: Task, rows: tuple[Any, Any, Any], weights: Any) -> None:
    """Every metric of every resample is that of the rows as often as they are drawn."""
    outputs, targets, queries = rows
    for metric in task.metrics:
        found = metric_of(task, metric, outputs, targets, queries)(weights)
        for counts, value in zip(weights, found, strict=True):
            expected = score(task, *(repeated(part or targets, counts) for part in rows))[metric]
            if expected is None:
                assert np.isnan(value), metric
            else:
                assert value == pytest.approx(expected, abs=1e-9), metric


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ranking"])
def test_a_metric_of_a_resample_is_that_of_the_repeated_rows(kind: str) -> None:
    outputs, targets, _, _ = rows_of(kind)
    weights = np.concatenate(list(draws(len(targets), resamples=12)))
    check(task_of(kind), (outputs, targets, []), np.vstack([np.ones(len(targets)), weights]))


def test_two_classes_with_equal_scores_and_resamples_of_one_class() -> None:
    labels = [{"name": name, "values": [name]} for name in "ab"]
    rng = np.random.default_rng(3)
    outputs, targets = list(rng.integers(-1, 2, (30, 2)).astype(np.float32)), [0, 1, 1] * 10
    weights = np.concatenate(list(draws(30, resamples=12)))
    weights[0] *= np.asarray(targets)  # no row of the first class is drawn
    weights[1] *= 1 - np.asarray(targets)
    check(task_of("classification", labels=labels), (outputs, targets, []), weights)


def test_the_candidates_of_a_query_are_drawn_together() -> None:
    outputs, targets, _, _ = rows_of("ranking", n=60)
    queries = [f"q{row // 5}" for row in range(60)]
    task, weights = task_of("ranking"), np.concatenate(list(draws(60, queries, 50)))
    by_query = weights.reshape(50, 12, 5)
    assert (by_query == by_query[:, :, :1]).all()
    assert (by_query[:, :, 0].sum(axis=1) == 12).all()
    for metric in task.metrics:
        found = metric_of(task, metric, outputs, targets, queries)(weights[:6])
        for counts, value in zip(by_query[:6, :, 0].astype(int), found, strict=True):
            copies = [(q, copy) for q, count in enumerate(counts) for copy in range(count)]
            rows = [5 * q + at for q, _ in copies for at in range(5)]
            names = [f"{q}-{copy}" for q, copy in copies for _ in range(5)]
            expected = score(task, [outputs[r] for r in rows], [targets[r] for r in rows], names)
            assert value == pytest.approx(expected[metric], abs=1e-9), metric


def test_without_queries_that_say_anything_a_ranking_has_no_figure() -> None:
    found = metric_of(task_of("ranking"), "mrr", np.zeros((4, 1)), [1] * 4, ["a", "a", "b", "b"])
    assert np.isnan(found(np.ones((3, 4)))).all()


def test_the_resamples_are_always_the_same_and_as_many_as_are_said() -> None:
    first, second = (np.concatenate(list(draws(17))) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (RESAMPLES, 17)
    assert (first.sum(axis=1) == 17).all()
    assert abs(first.mean() - 1) < 1e-9
    assert first.var() == pytest.approx(1 - 1 / 17, abs=0.05)  # of a binomial


def test_parts_of_many_rows_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silotune.common.tasks.resampling.CELLS", 100)
    parts = list(draws(40, resamples=7))
    assert [len(part) for part in parts] == [2, 2, 2, 1]


def test_the_error_of_a_mean_is_the_one_that_is_known() -> None:
    outputs, targets, _, _ = rows_of("classification", n=400)
    found = metric_of(task_of("classification"), "accuracy", outputs, targets, [])
    values = np.concatenate([found(weights) for weights in draws(400)])
    p = score(task_of("classification"), outputs, targets)["accuracy"]
    assert p is not None
    assert values.std() == pytest.approx(np.sqrt(p * (1 - p) / 400), rel=0.05)
