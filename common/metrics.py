"""Public metrics of a classifier: numbers from logits and labels, without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

METRICS = {"auc": "AUC", "accuracy": "accuracy", "macro_f1": "macro F1", "loss": "log loss"}


@dataclass(frozen=True)
class Scores:
    """Metrics on labelled public rows; each is None where the rows do not define it.

    auc: area under the ROC curve (binary only; None if one class is absent).
    """

    loss: float
    accuracy: float
    macro_f1: float
    auc: float | None
    predicted_classes: int


def score(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Scores:
    """logits [N, L], labels [N] -> Scores."""
    z = logits.astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    predicted = logits.argmax(axis=1)
    binary = logits.shape[1] == 2 and len(set(labels.tolist())) == 2
    return Scores(
        loss=float(-log_p[np.arange(len(labels)), labels].mean()),
        accuracy=float((predicted == labels).mean()),
        macro_f1=float(
            sk.f1_score(
                labels, predicted, average="macro", labels=range(logits.shape[1]), zero_division=0
            )
        ),
        auc=float(sk.roc_auc_score(labels, log_p[:, 1] - log_p[:, 0])) if binary else None,
        predicted_classes=len(set(predicted.tolist())),
    )
