"""Any number of labels a record."""

from __future__ import annotations

from torch import Tensor, nn

from silotune.common.tasks.objective import Objective


class MultiLabelObjective(Objective):
    """The mean over the labels of each one's logistic loss."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(
            outputs, targets, reduction="none"
        ).mean(dim=1)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The share of labels predicted correctly."""
        return ((outputs > 0) == (targets > 0.5)).float().mean(dim=1)
