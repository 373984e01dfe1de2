"""What a task learns: each record's loss, a function of that record alone.

Guarantee: `losses` of a record depends on its own outputs and target and on public constants, never
on the batch it stands in. Sensitivity rests on it (client/training/dp_optimizer.py), and
client/training/selftest.py checks it.

Shapes: n records, T tokens, L outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from silotune.common.contract.task import Task


class Objective:
    """of_tokens: outputs are [n, T, L], one for each token, instead of [n, L]. weights: [L], what
    the task's labels count in `losses`, if it weighs them."""

    of_tokens = False

    def __init__(self, task: Task) -> None:
        weights = getattr(task, "class_weights", None)
        self.weights = torch.tensor(weights) if weights else None

    def tensor(self, targets: Sequence[Any]) -> Tensor:
        """The records' targets (common/contract/task.py) as a tensor [N, ...]."""
        return torch.tensor(np.asarray(targets), dtype=torch.float32)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[n]"""
        raise NotImplementedError

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[n], 0 to 1: the share of each record that is predicted correctly; a contract may have it
        released."""
        raise NotImplementedError

    def predictions(self, outputs: Tensor, targets: Tensor) -> Sequence[Any]:
        """Of each record what common/tasks/metrics.py scores."""
        return list(outputs.float().numpy(force=True))
