"""Outputs that say how sure they are: one temperature of the logits, or a line for numbers.

Noise in the weights makes a model overconfident. A temperature is a single number that does not
change which answer is given (Guo, Pleiss, Sun and Weinberger 2017), so that few labelled rows are
enough for it. Where the rows are public, it costs no ε.

classification, multi-label, tokens, ranking   logits / temperature, of the lowest log loss with
                                               a prior that keeps it near 1 where rows are few
regression                                     offset + slope x output, of the least squares
language                                       none: evaluation keeps no logits of a vocabulary

Shapes: N rows, W words of a row, L outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, log_softmax, softmax

from silotune.common.contract.task import (
    Classification,
    Language,
    Regression,
    Task,
    Tokens,
)
from silotune.common.errors import DataError, ErrorCode
from silotune.common.runtime.atomic_files import write_durably
from silotune.common.tasks import metrics

FILE = "calibration.json"  # beside the adapter that it belongs to
COLDEST, HOTTEST = 0.05, 20.0  # temperatures; rows that a model has all right ask for 0
PRIOR = 0.5  # the standard deviation of a temperature's logarithm before rows are seen


# Of each row a loss, and its first and second derivative by the scale of the logits.
Derivatives = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


class Calibration(BaseModel):
    """How outputs become calibrated ones: logits / temperature, or offset + slope x output.

    Attributes:
        kind: "temperature" of logits, or "affine" of a regression's outputs.
        temperature: What logits are divided by; 1 of a regression.
        slope: What a regression's outputs, places between the bounds, are multiplied by.
        offset: What is added to them then.
        rows: How many public rows it was fitted to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["temperature", "affine"]
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    slope: float = Field(default=1.0, allow_inf_nan=False)
    offset: float = Field(default=0.0, allow_inf_nan=False)
    rows: int = Field(ge=1)

    def apply(self, outputs: Iterable[Any]) -> list[Any]:
        """The calibrated outputs of N rows, in the form that common/tasks/metrics.py scores."""
        if self.kind == "affine":
            return [self.offset + self.slope * np.asarray(row) for row in outputs]
        return [np.asarray(row) / self.temperature for row in outputs]

    def write(self, folder: Path) -> None:
        """Write it beside the adapter in `folder`."""
        write_durably(folder / FILE, self.model_dump_json(indent=1).encode() + b"\n")

    @classmethod
    def read(cls, folder: Path, task: Task) -> Calibration | None:
        """The calibration of the adapter in `folder`.

        Args:
            folder: A run's folder.
            task: What the adapter was trained for.

        Returns:
            The calibration; None where the folder has none.

        Raises:
            DataError: If the file is damaged, or is of another task.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            found = cls.model_validate_json(file.read_bytes())
        except (OSError, ValueError):
            raise DataError(
                f"{file} is damaged. Copy it again from the run, or delete it: predictions are not "
                "calibrated then.",
                code=ErrorCode.HASH_MISMATCH,
            ) from None
        if (found.kind == "affine") != isinstance(task, Regression):
            raise DataError(
                f"{file} is of another task than the contract beside it ({task.kind}). Delete it: "
                "predictions are not calibrated then.",
                code=ErrorCode.HASH_MISMATCH,
            )
        return found


def fit(task: Task, outputs: Sequence[Any], targets: Sequence[Any]) -> Calibration | None:
    """The calibration of the lowest loss on these rows.

    Args:
        task: Which loss that is.
        outputs: What evaluation keeps of N rows.
        targets: Their targets.

    Returns:
        The calibration; None for language, and where there are no rows.
    """
    if isinstance(task, Language) or not len(targets):
        return None
    if isinstance(task, Regression):
        slope, offset = _line(np.asarray(outputs)[:, 0], np.asarray(targets))
        return Calibration(kind="affine", slope=slope, offset=offset, rows=len(targets))
    return Calibration(
        kind="temperature",
        temperature=1 / _likely_scale(_losses(task, outputs, targets)),
        rows=len(targets),
    )


def slope(task: Task, outputs: Sequence[Any], targets: Sequence[Any]) -> tuple[float, float] | None:
    """The calibration slope on N rows and its standard error: what the logits (of a regression the
    outputs) would have to be multiplied by for the lowest loss on these rows. 1 is calibrated, less
    is overconfident (Cox 1958; Van Calster et al. 2019).

    The error is the sandwich estimate, which holds also where the model is wrong: rows are
    independent, the words of one are not.

    Returns:
        Slope and standard error; None where the rows do not define them: for language, where all
        outputs say the same, or where the loss has no minimum within the bounds, as where every row
        is right.
    """
    if isinstance(task, Language) or not len(targets):
        return None
    if isinstance(task, Regression):
        predicted, true = np.asarray(outputs, np.float64)[:, 0], np.asarray(targets, np.float64)
        spread = predicted - predicted.mean()
        if not np.sum(spread**2) > 0:
            return None
        by, offset = _line(predicted, true)
        off = true - offset - by * predicted
        return by, float(np.sqrt(np.sum((spread * off) ** 2)) / np.sum(spread**2))
    losses = _losses(task, outputs, targets)
    scale = _scale(losses)
    if scale is None:
        return None
    _, first, second = losses(scale)
    curvature = float(second.sum())
    if not curvature > 0:
        return None
    return scale, float(np.sqrt(np.sum(first**2)) / curvature)


def _likely_scale(losses: Callable[[float], Derivatives]) -> float:
    """The scale of the lowest loss of all rows together with a prior of its logarithm, normal with
    mean 0 and standard deviation PRIOR. Few rows with no errors would else ask for scales without
    bound, and new rows would pay for it."""

    def cost(log: float) -> float:
        return float(losses(math.exp(log))[0].sum()) + (log / PRIOR) ** 2 / 2

    bounds = (-math.log(HOTTEST), -math.log(COLDEST))
    return math.exp(float(minimize_scalar(cost, bounds=bounds, method="bounded").x))


def _scale(losses: Callable[[float], Derivatives]) -> float | None:
    """The scale of the lowest mean loss, which is convex in it: where its derivative is 0. None
    where that is not within the bounds, or everywhere."""

    def derivative(scale: float) -> float:
        return float(losses(scale)[1].sum())

    least, most = 1 / HOTTEST, 1 / COLDEST
    if derivative(most) <= 0 or derivative(least) >= 0:
        return None
    return float(brentq(derivative, least, most))


def _line(predicted: NDArray[Any], true: NDArray[Any]) -> tuple[float, float]:
    """Slope and offset of least squares; the mean where all outputs are the same."""
    x, y = predicted.astype(np.float64), true.astype(np.float64)
    spread = x - x.mean()
    squares = float(np.sum(spread**2))
    by = float(np.sum(spread * (y - y.mean())) / squares) if squares > 0 else 0.0
    return by, float(y.mean() - by * x.mean())


def _losses(
    task: Task, outputs: Sequence[Any], targets: Sequence[Any]
) -> Callable[[float], Derivatives]:
    """Of each row the log loss of its logits times a scale, and its first and second derivative by
    the scale: a function of the scale that gives three arrays [N]."""
    if isinstance(task, Tokens):
        read = [len(row) for row in outputs]
        z = np.concatenate(outputs).astype(np.float64)
        tags = [tag for own, n in zip(targets, read, strict=True) for tag in own[:n]]
        of_words = _softmax_losses(z, np.array(tags, dtype=np.int64))
        row = np.repeat(np.arange(len(read)), read)
        share = 1 / np.maximum(read, 1)

        def of_rows(scale: float) -> Derivatives:
            first, second, third = (
                np.bincount(row, words, len(read)) * share for words in of_words(scale)
            )
            return first, second, third

        return of_rows
    z = np.asarray(outputs, dtype=np.float64)
    if isinstance(task, Classification):
        return _softmax_losses(z, np.asarray(targets))
    y = np.asarray(targets, dtype=np.float64).reshape(z.shape)

    def of_labels(scale: float) -> Derivatives:
        p = expit(scale * z)
        return (
            (np.logaddexp(0, scale * z) - scale * z * y).mean(axis=1),
            (z * (p - y)).mean(axis=1),
            (z**2 * p * (1 - p)).mean(axis=1),
        )

    return of_labels


def _softmax_losses(z: NDArray[np.float64], labels: NDArray[Any]) -> Callable[[float], Derivatives]:
    """The same of a softmax of logits [N, L] with one label each."""
    row = np.arange(len(z))
    true = z[row, labels]

    def of_rows(scale: float) -> Derivatives:
        p = softmax(scale * z, axis=1)
        mean = (p * z).sum(axis=1)
        return (
            -log_softmax(scale * z, axis=1)[row, labels],
            mean - true,
            (p * (z - mean[:, None]) ** 2).sum(axis=1),
        )

    return of_rows


def expected_error(task: Task, outputs: Sequence[Any], targets: Sequence[Any]) -> float | None:
    """The expected calibration error (`metrics.calibration_error`) of each answer: a record's
    class, each of its labels, each word's tag, whether a pair belongs together. None of numbers and
    of language."""
    if isinstance(task, (Language, Regression)):
        return None
    if isinstance(task, Tokens):
        z = np.concatenate(outputs).astype(np.float64)
        true = np.array(
            [t for own, row in zip(targets, outputs, strict=True) for t in own[: len(row)]]
        )
    else:
        z, true = np.asarray(outputs, dtype=np.float64), np.asarray(targets)
    if isinstance(task, (Classification, Tokens)):
        confidence, right = softmax(z, axis=1).max(axis=1), z.argmax(axis=1) == true
    else:
        p = expit(z).ravel()
        confidence, right = np.maximum(p, 1 - p), (p > 0.5) == (true.ravel() > 0.5)
    return metrics.calibration_error(confidence, right)
