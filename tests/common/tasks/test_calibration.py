"""Calibration: what is overconfident becomes as sure as it is right, and no answer changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, softmax

from silotune.common.tasks.calibration import (
    COLDEST,
    FILE,
    HOTTEST,
    Calibration,
    fit,
    slope,
)
from silotune.common.tasks.metrics import score
from tests.common.tasks.test_metrics import KINDS, rows_of, task_of

KINDS_OF_LOGITS = ["classification", "multi-label", "tokens", "ranking"]


def drawn(kind: str, n: int, sharpness: float = 1.0, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Logits times `sharpness`, and targets that are drawn by the logits themselves."""
    rng = np.random.default_rng(seed)
    if kind == "tokens":
        words, draw = [rng.normal(0, 2, (k % 5 + 1, 5)) for k in range(n)], rng.random(n * 5)
        tags = [[int((softmax(w).cumsum() > draw[i]).argmax()) for w in own] for i, own in
                enumerate(words)]  # fmt: skip
        return [sharpness * own for own in words], tags
    if kind == "regression":
        place = rng.random(n)
        return list(sharpness * place[:, None]), np.clip(
            place + rng.normal(0, 0.1, n), 0, 1
        ).tolist()
    size = 1 if kind == "ranking" else 3
    z = rng.normal(0, 2, (n, size))
    if kind == "classification":
        chosen = (softmax(z, axis=1).cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
        return list(sharpness * z), chosen.tolist()
    targets = (rng.random((n, size)) < expit(z)).astype(int)
    return list(sharpness * z), (targets[:, 0] if kind == "ranking" else targets).tolist()


@pytest.mark.parametrize("kind", KINDS_OF_LOGITS)
@pytest.mark.parametrize("sharpness", [0.4, 3.0])
def test_the_temperature_is_what_the_logits_are_too_large_by(kind: str, sharpness: float) -> None:
    outputs, targets = drawn(kind, 4000, sharpness)
    found = fit(task_of(kind), outputs, targets)
    assert found is not None
    assert (found.kind, found.rows) == ("temperature", 4000)
    assert found.temperature == pytest.approx(sharpness, rel=0.1)
    loss = score(task_of(kind), outputs, targets, ["q"] * 4000)["loss"]
    assert loss is not None
    for factor in (0.9, 1.0, 1.1):  # no other temperature has a lower loss
        other = found.model_copy(update={"temperature": factor * found.temperature})
        after = score(task_of(kind), other.apply(outputs), targets, ["q"] * 4000)["loss"]
        assert after is not None
        if factor == 1.0:
            least = after
            assert after < loss
        else:
            assert after > fit_loss(task_of(kind), found, outputs, targets)
    assert least == pytest.approx(fit_loss(task_of(kind), found, outputs, targets))


def fit_loss(task: Any, found: Calibration, outputs: Any, targets: Any) -> float:
    loss = score(task, found.apply(outputs), targets, ["q"] * len(targets))["loss"]
    assert loss is not None
    return loss


def test_of_overconfident_outputs_log_loss_and_calibration_error_fall_on_other_rows() -> None:
    task = task_of("classification")
    outputs, targets = drawn("classification", 3000, 4.0)
    found = fit(task, outputs[:200], targets[:200])
    assert found is not None
    before = score(task, outputs[200:], targets[200:])
    after = score(task, found.apply(outputs[200:]), targets[200:])
    assert after["calibration"] < 0.3 * before["calibration"]  # type: ignore[operator]
    assert after["loss"] < 0.8 * before["loss"]  # type: ignore[operator]
    for metric in ("accuracy", "macro_f1", "predicted_classes"):
        assert after[metric] == before[metric]


@pytest.mark.parametrize("kind", ["classification", "multi-label", "tokens", "ranking"])
def test_the_order_of_answers_stays(kind: str) -> None:
    outputs, targets, queries, _ = rows_of(kind)
    task = task_of(kind)
    found = Calibration(kind="temperature", temperature=2.5, rows=9)
    before = score(task, outputs, targets, queries)
    after = score(task, found.apply(outputs), targets, queries)
    for metric in set(task.metrics) - {"loss", "calibration"}:
        assert after[metric] == pytest.approx(before[metric]), metric


def test_numbers_get_a_line() -> None:
    task = task_of("regression")
    outputs, targets = drawn("regression", 2000, 3.0)
    found = fit(task, outputs[:500], targets[:500])
    assert found is not None
    assert found.kind == "affine"
    assert found.slope == pytest.approx(1 / 3, abs=0.03)
    r2 = [
        score(task, rows, targets[500:])["r2"]
        for rows in (outputs[500:], found.apply(outputs[500:]))
    ]
    assert r2[0] < 0  # type: ignore[operator]
    assert r2[1] > 0.7  # type: ignore[operator]
    same = fit(task, [np.array([0.5])] * 9, targets[:9])
    assert same is not None
    assert (same.slope, same.offset) == (0.0, pytest.approx(np.mean(targets[:9])))


def test_rows_that_are_all_right_or_all_wrong_give_a_temperature_within_bounds() -> None:
    task = task_of("classification")
    _, targets, _, truth = rows_of("classification")
    right = fit(task, truth, targets)
    assert right is not None
    assert COLDEST < right.temperature < 1
    assert slope(task, truth, targets) is None
    nothing = fit(task, [np.zeros(3)] * len(targets), targets)
    assert nothing is not None
    assert nothing.temperature == pytest.approx(1, abs=1e-4)
    wrong = fit(task, [np.roll(row, 1) for row in truth], targets)
    assert wrong is not None
    assert 1 < wrong.temperature <= HOTTEST


@pytest.mark.parametrize("gap", [3.0, 4.0, 5.0, 6.0])
def test_few_rows_without_errors_do_not_make_a_calibrated_model_overconfident(gap: float) -> None:
    """40 rows, of which a good model has nearly all right: without a prior the mean log loss of new
    rows went from .09 to .84 at a gap of 4."""
    task, rng, before, after = task_of("classification"), np.random.default_rng(5), [], []
    for _ in range(60):
        sides = rng.choice([-1.0, 1.0], 200)
        outputs = list(np.stack([-sides * gap / 2, sides * gap / 2, np.full(200, -30.0)], axis=1))
        targets = (rng.random(200) < 1 / (1 + np.exp(-gap * sides))).astype(int)
        found = fit(task, outputs[:40], targets[:40])
        assert found is not None
        before.append(score(task, outputs[40:], targets[40:])["loss"])
        after.append(score(task, found.apply(outputs[40:]), targets[40:])["loss"])
    assert np.mean(after) < 1.2 * np.mean(before)


def test_of_language_and_of_no_rows_there_is_none() -> None:
    outputs, targets, _, _ = rows_of("language")
    assert fit(task_of("language"), outputs, targets) is None
    assert slope(task_of("language"), outputs, targets) is None
    assert fit(task_of("classification"), [], []) is None
    assert slope(task_of("classification"), [], []) is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "language"])
def test_the_slope_has_the_error_that_it_shows_on_other_rows(kind: str) -> None:
    """By 60 samples of the same distribution: their spread is the standard error that each says."""
    task, found = task_of(kind), []
    for seed in range(60):
        by = slope(task, *drawn(kind, 150, 2.0, seed))
        assert by is not None
        found.append(by)
    slopes, errors = np.array(found).T
    assert slopes.mean() == pytest.approx(0.5, abs=0.06)
    assert errors.mean() == pytest.approx(slopes.std(), rel=0.35)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_outputs_that_all_say_the_same_have_no_slope(kind: str) -> None:
    same = [np.zeros(3 if kind == "classification" else 1)] * 10
    assert slope(task_of(kind), same, [0, 1] * 5) is None


def test_it_is_written_beside_its_adapter_and_read_again(tmp_path: Path) -> None:
    found = Calibration(kind="temperature", temperature=1.25, rows=46)
    found.write(tmp_path)
    assert Calibration.model_validate_json((tmp_path / FILE).read_text()) == found
