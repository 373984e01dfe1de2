"""Each record's loss is a function of that record alone, and the one that its formula says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from silotune.common.contract.task import Task
from silotune.common.errors import UsageError
from silotune.common.tasks import objective_of
from silotune.common.tasks.metrics import score
from silotune.common.tasks.objective import Objective
from silotune.common.tasks.token_classification import IGNORED
from tests import tiny

FUZZ = settings(deadline=None, max_examples=40, derandomize=True, database=None)
KINDS = [
    "classification",
    "weighed",
    "multi-label",
    "tokens",
    "weighed tokens",
    "regression",
    "ranking",
    "language",
]
N, T, V = 7, 6, 11
WEIGHTS, SMOOTHING, TAG_WEIGHTS = (0.5, 1.0, 4.0), 0.2, (0.25, 1.0, 2.0, 0.5, 3.0)
WEIGHED: dict[str, tuple[str, dict[str, Any]]] = {
    "weighed": ("classification", {"class_weights": WEIGHTS, "label_smoothing": SMOOTHING}),
    "weighed tokens": ("tokens", {"class_weights": TAG_WEIGHTS}),
}
Floats = NDArray[np.float64]


def task_of(kind: str) -> Any:
    plain, more = WEIGHED.get(kind, (kind, {}))
    return TypeAdapter(Task).validate_python(tiny.task_of(plain) | more)


def objective(kind: str) -> Objective:
    return objective_of(task_of(kind))


def batch(kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs and targets of N records as training compares them."""
    rng = np.random.default_rng(seed)
    kind, _ = WEIGHED.get(kind, (kind, {}))
    shape = {"tokens": (N, T, 5), "language": (N, T, V), "regression": (N, 1), "ranking": (N, 1)}
    outputs = torch.tensor(rng.normal(0, 3, shape.get(kind, (N, 3))), dtype=torch.float32)
    if kind == "classification":
        return outputs, torch.tensor(rng.integers(3, size=N))
    if kind in ("tokens", "language"):
        targets = rng.integers(outputs.shape[2], size=(N, T))
        targets[rng.random((N, T)) < 0.4] = IGNORED
        targets[2] = IGNORED  # a record of which nothing counts
        targets[3, 1:], targets[3, 0] = IGNORED, 1
        return outputs, torch.tensor(targets)
    if kind == "regression":
        return outputs, torch.tensor(rng.random(N), dtype=torch.float32)
    size = (N, 3) if kind == "multi-label" else (N,)
    return outputs, torch.tensor(rng.integers(2, size=size), dtype=torch.float32)


# --- the formulas, in numpy and by records -----------------------------------------------------


def log_softmax(z: Floats) -> Floats:
    return z - z.max() - np.log(np.exp(z - z.max()).sum())  # type: ignore[no-any-return]


def logistic(z: float, y: float) -> float:
    p = 1 / (1 + math.exp(-z))
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


def of_class(z: Floats, y: Any) -> float:
    return float(-log_softmax(z)[y])


def of_weighed(z: Floats, y: Any) -> float:
    """Cross entropy against (1 - s) of the label and s / L of each, times the label's weight."""
    smooth = np.full(3, SMOOTHING / 3)
    smooth[y] += 1 - SMOOTHING
    return float(-(smooth * log_softmax(z)).sum()) * WEIGHTS[int(y)]


def of_labels(z: Floats, y: Any) -> float:
    return float(np.mean([logistic(a, b) for a, b in zip(z, y, strict=True)]))


def of_tokens(z: Floats, y: Any) -> float:
    found = [of_class(row, tag) for row, tag in zip(z, y, strict=True) if tag != IGNORED]
    return sum(found) / len(found) if found else 0.0


def of_weighed_tokens(z: Floats, y: Any) -> float:
    """By the number of tokens, not by what they weigh."""
    found = [
        TAG_WEIGHTS[tag] * of_class(row, tag)
        for row, tag in zip(z, y, strict=True)
        if tag != IGNORED
    ]
    return sum(found) / len(found) if found else 0.0


FORMULAS: dict[str, Callable[[Floats, Any], float]] = {
    "classification": of_class,
    "weighed": of_weighed,
    "multi-label": of_labels,
    "tokens": of_tokens,
    "weighed tokens": of_weighed_tokens,
    "language": of_tokens,
    "regression": lambda z, y: (z[0] - y) ** 2 / 2,
    "ranking": lambda z, y: logistic(z[0], y),
}
RIGHT: dict[str, Callable[[Floats, Any], float]] = {
    "classification": lambda z, y: z.argmax() == y,
    "weighed": lambda z, y: z.argmax() == y,
    "multi-label": lambda z, y: np.mean((z > 0) == (y == 1)),
    "ranking": lambda z, y: (z[0] > 0) == (y == 1),
}


def share(z: Floats, y: Any) -> float:
    found = [row.argmax() == tag for row, tag in zip(z, y, strict=True) if tag != IGNORED]
    return sum(found) / max(len(found), 1)


RIGHT |= {"tokens": share, "weighed tokens": share, "language": share}


def by_records(formula: Callable[[Floats, Any], float], outputs: Tensor, targets: Tensor) -> Floats:
    rows = zip(outputs.double().numpy(), targets.numpy(), strict=True)
    return np.array([formula(z, y) for z, y in rows], dtype=np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_formulas(kind: str) -> None:
    outputs, targets = batch(kind)
    found = objective(kind).losses(outputs, targets)
    expected = by_records(FORMULAS[kind], outputs, targets)
    assert found.shape == (N,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-6)
    assert len(set(np.round(expected, 6).tolist())) == N


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_told_rightly(kind: str) -> None:
    outputs, targets = batch(kind)
    found = objective(kind).correct(outputs, targets).numpy()
    np.testing.assert_allclose(found, by_records(RIGHT[kind], outputs, targets), rtol=1e-6)
    assert 0 < found.mean() < 1


def test_a_number_is_never_right() -> None:
    with pytest.raises(UsageError, match="no accuracy"):
        objective("regression").correct(*batch("regression"))


@pytest.mark.parametrize(("kind", "labels"), [("classification", 3), ("tokens", 5)])
def test_weights_of_one_and_no_smoothing_change_nothing(kind: str, labels: int) -> None:
    settings = tiny.task_of(kind) | {"class_weights": (1.0,) * labels}
    same = objective_of(TypeAdapter(Task).validate_python(settings))
    for outputs, targets in (batch(kind), batch(kind, 1)):
        expected = objective(kind).losses(outputs, targets)
        assert torch.equal(same.losses(outputs, targets), expected)


# --- each record by itself ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_does_not_know_its_batch(kind: str) -> None:
    """Bit by bit: for any records, of this batch or others, in any order, any number of times."""
    learnt = objective(kind)
    outputs, targets = (torch.cat(part) for part in zip(batch(kind), batch(kind, 1), strict=True))
    alone = torch.cat([learnt.losses(outputs[i : i + 1], targets[i : i + 1]) for i in range(2 * N)])

    @FUZZ
    @given(st.lists(st.integers(0, 2 * N - 1), min_size=1, max_size=20))
    def check(rows: list[int]) -> None:
        found = learnt.losses(outputs[rows], targets[rows])
        assert torch.equal(found, alone[rows])

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_crosses_from_record_to_record(kind: str) -> None:
    outputs, targets = batch(kind)
    outputs.requires_grad_()
    losses = objective(kind).losses(outputs, targets)
    for row in range(N):
        (gradient,) = torch.autograd.grad(losses[row], outputs, retain_graph=True)
        others = [other for other in range(N) if other != row]
        assert not gradient[others].any()
        nothing = targets.dim() == 2 and bool((targets[row] == IGNORED).all())
        assert bool(gradient[row].any()) is not nothing
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_overflows_spoils_no_other(kind: str) -> None:
    outputs, targets = batch(kind)
    expected = objective(kind).losses(outputs, targets)
    outputs[1] = math.nan
    found = objective(kind).losses(outputs, targets)
    rest = [row for row in range(N) if row != 1]
    assert torch.equal(found[rest], expected[rest])


@pytest.mark.parametrize("kind", ["tokens", "language"])
def test_padding_behind_changes_no_loss(kind: str) -> None:
    outputs, targets = batch(kind)
    wider = torch.cat([outputs, 9 * torch.ones(N, 3, outputs.shape[2])], dim=1)
    marks = torch.cat([targets, torch.full((N, 3), IGNORED)], dim=1)
    for value in ("losses", "correct"):
        found = getattr(objective(kind), value)(wider, marks)
        expected = getattr(objective(kind), value)(outputs, targets)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


# --- targets and what evaluation keeps ---------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        ("classification", [0, 2, 1], torch.tensor([0, 2, 1])),
        ("multi-label", [[0, 1, 0], [1, 1, 0]], torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])),
        (
            "tokens",
            [[1], [], [0, 4, 2]],
            torch.tensor([[1, *[IGNORED] * 2], [IGNORED] * 3, [0, 4, 2]]),
        ),
        ("regression", [0.25, 1.0], torch.tensor([0.25, 1.0])),
        ("ranking", [0, 1], torch.tensor([0.0, 1.0])),
    ],
)
def test_targets_as_a_tensor(kind: str, targets: list[Any], expected: Tensor) -> None:
    found = objective(kind).tensor(targets)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize(
    "kind", ["classification", "weighed", "multi-label", "regression", "ranking"]
)
def test_outputs_are_kept_as_they_are(kind: str) -> None:
    outputs, targets = batch(kind)
    kept = objective(kind).predictions(outputs.bfloat16(), targets)
    assert len(kept) == N
    assert {row.dtype for row in kept} == {np.dtype(np.float32)}
    assert np.array_equal(np.stack(kept), outputs.bfloat16().float().numpy())


@pytest.mark.parametrize("kind", ["tokens", "weighed tokens"])
def test_of_tokens_the_words_logits_are_kept_and_scored_by_the_unweighed_loss(kind: str) -> None:
    outputs, targets = batch("tokens")
    losses = objective("tokens").losses(outputs, targets)
    kept = objective(kind).predictions(outputs.bfloat16(), targets)
    assert {row.dtype for row in kept} == {np.dtype(np.float32)}
    for row, logits in enumerate(objective(kind).predictions(outputs, targets)):
        counted = [t for t in range(T) if targets[row, t] != IGNORED]
        assert np.array_equal(logits, outputs[row, counted].numpy())
        found = score(task_of(kind), [logits], [targets[row, counted].tolist()])
        assert found["loss"] == pytest.approx(float(losses[row]), rel=1e-4)


def test_of_answers_three_sums_are_kept() -> None:
    outputs, targets = batch("language")
    for row, (nll, tokens, right) in enumerate(objective("language").predictions(outputs, targets)):
        z, y = outputs[row].double().numpy(), targets[row].numpy()
        assert tokens == (y != IGNORED).sum()
        assert right == pytest.approx(share(z, y) * tokens)
        assert nll == pytest.approx(of_tokens(z, y) * tokens, rel=1e-5)
