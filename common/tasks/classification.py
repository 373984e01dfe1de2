"""One label a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from silotune.common.contract.task import Classification
from silotune.common.tasks.objective import Objective


def per_example_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each example by itself, [N]: nothing in it depends on the batch."""
    return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


class ClassificationObjective(Objective):
    """Cross entropy, softmax over the labels; the contract may weigh labels and smooth targets."""

    def __init__(self, task: Classification) -> None:
        super().__init__(task)
        self.smoothing = task.label_smoothing or 0.0

    def tensor(self, targets: Sequence[Any]) -> Tensor:
        return torch.tensor(np.asarray(targets), dtype=torch.long)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        found = per_example_loss(outputs, targets, self.smoothing)
        # By the record's own label: torch's weights would also weigh what smoothing adds.
        return found if self.weights is None else found * self.weights.to(found.device)[targets]

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(dim=1) == targets).float()
