"""An answer, token by token: each example's loss is the mean over its own answer's tokens.

Shapes: N examples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from silotune.common.tasks.objective import Objective
from silotune.common.tasks.token_classification import (
    IGNORED,
    per_example_loss,
    share_right,
)


class LanguageModelingObjective(Objective):
    """Targets are [N, T]: at each place the next token if it is the answer's, else IGNORED."""

    of_tokens = True

    def tensor(self, targets: Sequence[Any]) -> Tensor:
        return torch.zeros(len(targets))  # the texts hold them

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return per_example_loss(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return share_right(outputs, targets)

    def predictions(self, outputs: Tensor, targets: Tensor) -> Sequence[Any]:
        """[n, 3]: negative log likelihood, tokens, and how many are the likeliest."""
        counted = targets != IGNORED
        losses = nn.functional.cross_entropy(
            outputs.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view(targets.shape)
        right = (outputs.argmax(dim=2) == targets) & counted
        figures = (losses, counted, right)
        return list(torch.stack([f.double().sum(dim=1) for f in figures], 1).numpy(force=True))
