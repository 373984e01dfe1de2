"""A number between public bounds."""

from __future__ import annotations

from torch import Tensor

from silotune.common.errors import UsageError
from silotune.common.tasks.objective import Objective


class RegressionObjective(Objective):
    """Half the squared error of the place between the bounds, 0 to 1."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square() / 2

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise UsageError("a regression has no accuracy", code="E101")
