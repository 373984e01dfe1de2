"""A task's metrics on many resamples of the same rows at once: how much a figure depends on which
rows happened to be test rows (Efron 1979).

A resample is how often each example is drawn. An example is a row, or a query with its candidates
for the metrics of a ranking; the words of a text are drawn together. Figures of several models on
the same resamples can be subtracted: that is the paired bootstrap.

Shapes: B resamples, N rows, U examples, L outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from silotune.common.contract.task import (
    Classification,
    Language,
    MultiLabel,
    Ranking,
    Regression,
    Task,
    Tokens,
)
from silotune.common.formats import tag_schemes
from silotune.common.tasks import metrics

RESAMPLES, SEED = 2000, 2026
CELLS = 1 << 21  # of an array [B, N] that is in memory at a time

Floats = NDArray[np.float64]
OfWeights = Callable[[Floats], Floats]  # [B, N] weights of rows -> [B]


def draws(rows: int, queries: Sequence[str] = (), resamples: int = RESAMPLES) -> Iterator[Floats]:
    """How often each row is drawn, [B, rows] in parts of some resamples; always the same.

    Args:
        rows: How many rows there are.
        queries: Of a ranking the query of each: all rows of a query are drawn together.
        resamples: How many in all.
    """
    example = np.unique(queries, return_inverse=True)[1] if queries else np.arange(rows)
    examples = int(example.max()) + 1
    rng = np.random.default_rng(SEED)
    at_a_time = max(1, CELLS // rows)
    for start in range(0, resamples, at_a_time):
        size = min(at_a_time, resamples - start)
        drawn = rng.integers(examples, size=(size, examples))
        drawn += examples * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * examples).reshape(size, examples)
        yield counts[:, example].astype(np.float64)


def metric_of(
    task: Task, metric: str, outputs: Sequence[Any], targets: Sequence[Any], queries: Sequence[str]
) -> OfWeights:
    """A metric of weighted rows, NaN where they do not define it. With whole weights it is that of
    the rows repeated as often (`metrics.score`).

    Args:
        task: Whose metric it is.
        metric: One of the task's.
        outputs: What evaluation keeps of N rows.
        targets: Their targets.
        queries: Of a ranking the query of each row.

    Returns:
        A function of weights [B, N] that gives the metric of each resample, [B].
    """
    if isinstance(task, Tokens):
        return _tokens(task, metric, outputs, targets)
    found, true = np.asarray(outputs), np.asarray(targets)
    if isinstance(task, Classification):
        return _classes(metric, found, true)
    if isinstance(task, MultiLabel):
        return _labels(metric, found, true)
    if isinstance(task, Regression):
        return _numbers(task, metric, found, true)
    if isinstance(task, Ranking):
        return _ranking(metric, found, true, queries)
    assert isinstance(task, Language)
    return _answers(metric, found)


def _ratio(above: Any, below: Any) -> Floats:
    """NaN where there is nothing to divide by."""
    above, below = np.broadcast_arrays(above, below)
    out = np.full(above.shape, np.nan)
    found: Floats = np.divide(above, below, out=out, where=below > 0)
    return found


def _mean(values: Any) -> OfWeights:
    column = np.asarray(values, dtype=np.float64)
    return lambda weights: _ratio(weights @ column, weights.sum(axis=1))


def _f1(hits: Any, both: Any, average: str = "") -> OfWeights:
    """From the hits of each row [N, K], and what is there plus what is predicted; 0 of what is
    neither. average: "macro" over the K kinds, else of their sums."""

    def of(weights: Floats) -> Floats:
        found, of_both = weights @ hits.astype(np.float64), weights @ both.astype(np.float64)
        if average != "macro":
            found, of_both = found.sum(axis=1, keepdims=True), of_both.sum(axis=1, keepdims=True)
        f1: Floats = np.nan_to_num(_ratio(2 * found, of_both)).mean(axis=1)
        return f1

    return of


def _classes(metric: str, logits: NDArray[Any], labels: NDArray[Any]) -> OfWeights:
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    predicted = logits.argmax(axis=1)
    right = predicted == labels
    if metric == "loss":
        return _mean(-log_p[np.arange(len(labels)), labels])
    if metric == "accuracy":
        return _mean(right)
    if metric in ("auc", "auprc"):
        if logits.shape[1] != 2:
            return lambda weights: np.full(len(weights), np.nan)
        scores = log_p[:, 1] - log_p[:, 0] if metric == "auc" else log_p[:, 1]
        return _by_order(metric, scores, labels == 1)
    kinds = np.arange(logits.shape[1])
    there, told = labels[:, None] == kinds, predicted[:, None] == kinds
    if metric == "macro_f1":
        return _f1(there & told, there.astype(int) + told, "macro")
    confidence = np.exp(log_p.max(axis=1))
    bins = metrics.bins_of(confidence)[:, None] == np.arange(metrics.BINS)
    off = (right - confidence)[:, None] * bins
    return lambda weights: _ratio(np.abs(weights @ off).sum(axis=1), weights.sum(axis=1))


def _labels(metric: str, logits: NDArray[Any], labels: NDArray[Any]) -> OfWeights:
    z, truth, told = logits.astype(np.float64), labels > 0.5, logits > 0
    if metric in ("micro_f1", "macro_f1"):
        return _f1(truth & told, truth.astype(int) + told, metric.removesuffix("_f1"))
    of_rows = {
        "loss": (np.logaddexp(0, z) - z * labels).mean(axis=1),
        "accuracy": (told == truth).mean(axis=1),
        "exact_match": (told == truth).all(axis=1),
    }
    return _mean(of_rows[metric])


def _tokens(task: Tokens, metric: str, outputs: Sequence[Any], targets: Sequence[Any]) -> OfWeights:
    if metric == "loss":
        return _mean([metrics.tag_loss(z, own) for z, own in zip(outputs, targets, strict=True)])
    truth, told = metrics.tags_of(task, outputs, targets)
    if metric == "accuracy":
        right = np.array(
            [
                sum(a == b for a, b in zip(t, f, strict=True))
                for t, f in zip(truth, told, strict=True)
            ]
        )
        words = np.array([len(own) for own in truth])
        return lambda weights: _ratio(weights @ right, weights @ words)
    there, found, hits = np.array(tag_schemes.counts(truth, told), dtype=np.float64).T
    below = {"precision": found, "recall": there, "f1": (there + found) / 2}[metric]
    return lambda weights: np.nan_to_num(_ratio(weights @ hits, weights @ below))


def _numbers(
    task: Regression, metric: str, outputs: NDArray[Any], targets: NDArray[Any]
) -> OfWeights:
    predicted, true = outputs[:, 0].astype(np.float64), targets.astype(np.float64)
    squares = (predicted - true) ** 2
    if metric == "loss":
        return _mean(squares / 2)
    if metric == "r2":
        # From the mean of all rows: squares of numbers far from 0 would lose digits.
        off = true - true.mean()

        def r2(weights: Floats) -> Floats:
            spread = weights @ off**2 - _ratio((weights @ off) ** 2, weights.sum(axis=1))
            spread = np.where(spread > 1e-12 * weights.sum(axis=1), spread, 0.0)
            return 1 - _ratio(weights @ squares, spread)

        return r2
    wrong = np.array(
        [task.number(p) - task.number(t) for p, t in zip(predicted, true, strict=True)]
    )
    if metric == "mae":
        return _mean(np.abs(wrong))
    of_squares = _mean(wrong**2)
    return lambda weights: np.sqrt(of_squares(weights))


def _ranking(
    metric: str, outputs: NDArray[Any], targets: NDArray[Any], queries: Sequence[str]
) -> OfWeights:
    z = outputs[:, 0].astype(np.float64)
    if metric == "loss":
        return _mean(np.logaddexp(0, z) - z * targets)
    if metric == "auc":
        return _by_order("auc", z, targets == 1)
    figures = metrics.of_queries(z, targets, queries)
    if not figures:
        return lambda weights: np.full(len(weights), np.nan)
    # All rows of a query have its weight: its first one stands for it.
    first, of_query = zip(*((rows[0], own[metric]) for rows, own in figures), strict=True)
    mean = _mean(of_query)
    return lambda weights: mean(weights[:, list(first)])


def _answers(metric: str, outputs: NDArray[Any]) -> OfWeights:
    nll, tokens, right = outputs.astype(np.float64).T
    if metric == "loss":
        return _mean(nll / np.maximum(tokens, 1))
    if metric == "exact_match":
        return _mean(right == tokens)
    above = right if metric == "accuracy" else nll

    def of_tokens(weights: Floats) -> Floats:
        found: Floats = (weights @ above) / np.maximum(weights @ tokens, 1)
        return found if metric == "accuracy" else np.exp(found)

    return of_tokens


def _by_order(metric: str, scores: Floats, positive: NDArray[np.bool_]) -> OfWeights:
    """AUC, or average precision as scikit-learn has it: steps, and equal scores are one."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    last = slice(None) if len(ends) == len(scores) else ends
    positives = positive[order].astype(np.float32)

    def of(weights: Floats) -> Floats:
        # Counts of rows are exact in single precision, and take a third of the time.
        own = np.take(weights.astype(np.float32), order, axis=1)
        drawn = np.cumsum(own, axis=1)[:, last]
        hits = np.cumsum(own * positives, axis=1)[:, last]
        steps = np.diff(hits, axis=1, prepend=np.float32(0))
        found, rows = hits[:, -1].astype(np.float64), drawn[:, -1].astype(np.float64)
        if metric == "auprc":
            precision = np.nan_to_num(_ratio(hits.astype(np.float64), drawn))
            figure = _ratio(np.einsum("bn,bn->b", steps, precision), found)
        else:
            misses = drawn - hits
            before = np.einsum("bn,bn->b", steps, misses, dtype=np.float64)
            before += np.einsum("bn,bn->b", steps[:, 1:], misses[:, :-1], dtype=np.float64)
            figure = 1 - _ratio(before / 2, found * (rows - found))
        # Rows of one class define neither.
        return np.where((found > 0) & (found < rows), figure, np.nan)

    return of
