"""Whether the texts of a pair belong together."""

from __future__ import annotations

from torch import Tensor, nn

from silotune.common.tasks.objective import Objective


class RankingObjective(Objective):
    """Logistic loss of each pair by itself. (Losses over the candidates of a batch would let one
    record move another's gradient.)"""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(
            outputs[:, 0], targets, reduction="none"
        )

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs[:, 0] > 0) == (targets > 0.5)).float()
