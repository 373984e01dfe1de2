"""Public metrics of each task: numbers from a model's outputs and the targets, without torch.

Shapes: N rows, L outputs. A metric is None where the rows do not define it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn import metrics as sk

from silotune.common.contract.task import (
    Classification,
    Language,
    Ranking,
    Regression,
    Task,
    Tokens,
)
from silotune.common.formats import tag_schemes

METRICS = {
    "auc": "AUC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "f1": "entity F1",
    "precision": "entity precision",
    "recall": "entity recall",
    "exact_match": "exact match",
    "r2": "R²",
    "mae": "MAE",
    "rmse": "RMSE",
    "mrr": "MRR",
    "ndcg": "NDCG@10",
    "recall_at_10": "recall@10",
    "perplexity": "perplexity",
    "calibration": "calibration error",
    "loss": "log loss",
}
CUTOFF = 10  # of NDCG@k and recall@k
BINS = 15  # of the expected calibration error

Scores = dict[str, float | None]


def score(task: Task, outputs: Any, targets: Any, queries: Sequence[str] = ()) -> Scores:
    """The task's metrics (common/contract/task.py), and for classes how many of them are ever
    predicted.

    outputs, targets: what Network.predict and the records hold for N rows; at least one row.
    queries: [N], for ranking.
    """
    if isinstance(task, Tokens):
        return _tokens(task, outputs, targets)
    if isinstance(task, Regression):
        return _regression(task, np.asarray(outputs), np.asarray(targets))
    if isinstance(task, Ranking):
        return _ranking(np.asarray(outputs), np.asarray(targets), queries)
    kinds: dict[str, Callable[[Any, Any], Scores]] = {
        "classification": _classes,
        "multi-label": _labels,
        "language": _language,
    }
    return kinds[task.kind](np.asarray(outputs), np.asarray(targets))


def constant(task: Task, targets: Sequence[Any]) -> list[Any] | None:
    """The outputs of always giving the best same answer to these N rows: the label that most have,
    the mean number, no entity. None for language, of which there is none worth a comparison."""
    n = len(targets)
    if isinstance(task, Classification):
        shares = np.bincount(targets, minlength=task.outputs) / n
        return [np.log(np.maximum(shares, 1e-9)).astype(np.float32)] * n
    if isinstance(task, Tokens):
        tags = [tag for row in targets for tag in row]
        shares = np.bincount(tags, minlength=task.outputs) / max(len(tags), 1)
        shares[0] = shares.max()  # O, of equal ones the first
        row = np.log(np.maximum(shares, 1e-9)).astype(np.float32)
        return [np.tile(row, (len(own), 1)) for own in targets]
    if isinstance(task, Language):
        return None
    mean = np.atleast_1d(np.mean(np.asarray(targets, dtype=np.float64), axis=0))
    if not isinstance(task, Regression):
        mean = np.log(np.clip(mean, 1e-9, 1 - 1e-9) / np.clip(1 - mean, 1e-9, 1 - 1e-9))
    return [mean.astype(np.float32)] * n


def _classes(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Scores:
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    predicted = logits.argmax(axis=1)
    binary = logits.shape[1] == 2 and len(set(labels.tolist())) == 2
    right = predicted == labels
    return {
        "loss": float(-log_p[np.arange(len(labels)), labels].mean()),
        "accuracy": float(right.mean()),
        "macro_f1": float(
            sk.f1_score(
                labels, predicted, average="macro", labels=range(logits.shape[1]), zero_division=0
            )
        ),
        "auc": float(sk.roc_auc_score(labels, log_p[:, 1] - log_p[:, 0])) if binary else None,
        "auprc": float(sk.average_precision_score(labels, log_p[:, 1])) if binary else None,
        "calibration": calibration_error(np.exp(log_p.max(axis=1)), right),
        "predicted_classes": len(set(predicted.tolist())),
    }


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Expected calibration error: |share right - mean confidence| by bins of equal width, weighted
    by their rows (Naeini, Cooper and Hauskrecht 2015). confidence [N] in [0, 1]; right [N]."""
    bins = bins_of(confidence)
    found = [
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
        for b in np.unique(bins)
    ]
    return float(sum(found))


def bins_of(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which bin of the calibration error each is in."""
    found: NDArray[np.int64] = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return found


def _labels(logits: NDArray[np.float32], labels: NDArray[np.float32]) -> Scores:
    z = logits.astype(np.float64)
    predicted = logits > 0
    truth = labels > 0.5
    f1 = {
        average: float(sk.f1_score(truth, predicted, average=average, zero_division=0))
        for average in ("micro", "macro")
    }
    return {
        "loss": float((np.logaddexp(0, z) - z * labels).mean()),
        "accuracy": float((predicted == truth).mean()),
        "exact_match": float((predicted == truth).all(axis=1).mean()),
        "micro_f1": f1["micro"],
        "macro_f1": f1["macro"],
        "predicted_classes": int(predicted.any(axis=0).sum()),
    }


def _tokens(task: Tokens, outputs: Sequence[Any], targets: Sequence[NDArray[np.int64]]) -> Scores:
    truth, found = tags_of(task, outputs, targets)
    pairs = [(a, b) for t, f in zip(truth, found, strict=True) for a, b in zip(t, f, strict=True)]
    return {
        "loss": float(np.mean([tag_loss(z, t) for z, t in zip(outputs, targets, strict=True)])),
        "accuracy": float(np.mean([a == b for a, b in pairs])) if pairs else None,
        **tag_schemes.scores(truth, found),
        "predicted_classes": len({b for _, b in pairs}),
    }


def tags_of(
    task: Tokens, outputs: Sequence[Any], targets: Sequence[Any]
) -> tuple[list[list[str]], list[list[str]]]:
    """The tags of N sentences, and those that are predicted.

    outputs: of each sentence the logits [W, L] of its words, of fewer than it has where a model
    reads no further: those behind count as O, and in no loss.
    """
    truth = [[task.tags[t] for t in tags] for tags in targets]
    return truth, [
        [task.tags[t] for t in logits.argmax(axis=1)] + [task.tags[0]] * (len(true) - len(logits))
        for logits, true in zip(outputs, truth, strict=True)
    ]


def tag_loss(logits: NDArray[np.float32], tags: Any) -> float:
    """The mean cross entropy of a sentence's words that are read; 0 where none is. Each word counts
    as much, also where a contract weighs tags."""
    read = len(logits)
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    return float(-log_p[np.arange(read), list(tags[:read])].mean()) if read else 0.0


def _regression(
    task: Regression, outputs: NDArray[np.float32], targets: NDArray[np.float64]
) -> Scores:
    """R² on the scale that is learnt, where it says what share of the spread is explained; the
    errors in the numbers' own unit."""
    predicted, true = outputs[:, 0].astype(np.float64), targets.astype(np.float64)
    spread = float(((true - true.mean()) ** 2).sum())
    numbers = [np.array([task.number(place) for place in at]) for at in (predicted, true)]
    off = numbers[0] - numbers[1]
    squares = (predicted - true) ** 2
    return {
        "loss": float(squares.mean() / 2),
        "r2": 1 - float(squares.sum()) / spread if spread > 0 else None,
        "mae": float(np.abs(off).mean()),
        "rmse": float(np.sqrt((off**2).mean())),
        "predicted_classes": len(set(np.round(predicted, 6).tolist())),
    }


def _ranking(
    outputs: NDArray[np.float32], targets: NDArray[np.int64], queries: Sequence[str]
) -> Scores:
    """Means over the queries of `of_queries`."""
    z = outputs[:, 0].astype(np.float64)
    figures = [own for _, own in of_queries(z, targets, queries)]
    both = len(set(targets.tolist())) == 2
    return {
        "loss": float((np.logaddexp(0, z) - z * targets).mean()),
        "auc": float(sk.roc_auc_score(targets, z)) if both else None,
        "predicted_classes": len(set((z > 0).tolist())),
        **{
            name: float(np.mean([own[name] for own in figures])) if figures else None
            for name in ("mrr", "ndcg", "recall_at_10")
        },
    }


def of_queries(
    z: NDArray[np.float64], targets: NDArray[np.int64], queries: Sequence[str]
) -> list[tuple[list[int], dict[str, float]]]:
    """The rows and figures of each query that has a relevant candidate and another one. Ties count
    as if the relevant ones came last: a model that gives all the same score finds nothing."""
    of_query: dict[str, list[int]] = {}
    for row, query in enumerate(queries):
        of_query.setdefault(query, []).append(row)
    figures: list[tuple[list[int], dict[str, float]]] = []
    for rows in of_query.values():
        true = targets[rows]
        relevant = int(true.sum())
        if not 0 < relevant < len(rows):
            continue
        order = np.lexsort((true, -z[rows]))
        ranked = true[order]
        discounts = 1 / np.log2(np.arange(2, min(len(rows), CUTOFF) + 2))
        ideal = discounts[:relevant].sum()
        own = {
            "mrr": 1 / (1 + int(ranked.argmax())),
            "ndcg": float((ranked[:CUTOFF] * discounts).sum() / ideal),
            "recall_at_10": float(ranked[:CUTOFF].sum() / min(relevant, CUTOFF)),
        }
        figures.append((rows, own))
    return figures


def _language(outputs: NDArray[np.float64], targets: Any) -> Scores:
    """outputs [N, 3]: of each answer the negative log likelihood, its tokens, and how many of them
    are the likeliest after those before. If all are, greedy decoding gives the answer exactly."""
    nll, tokens, right = outputs.T.astype(np.float64)
    counted = max(tokens.sum(), 1)
    return {
        "loss": float((nll / np.maximum(tokens, 1)).mean()),
        "perplexity": float(np.exp(nll.sum() / counted)),
        "accuracy": float(right.sum() / counted),
        "exact_match": float((right == tokens).mean()),
        "predicted_classes": 2,
    }
