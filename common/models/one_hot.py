"""The one-hot model: logistic or linear regression on public bins."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from silotune.common.contract.compute import Performance
from silotune.common.contract.inputs import TableInput
from silotune.common.contract.model import OneHotModel
from silotune.common.contract.task import Task
from silotune.common.data import featurize
from silotune.common.data.records import Inputs
from silotune.common.models.aligned_linear import align
from silotune.common.models.base import Encoded, Network
from silotune.common.protocol.messages import Arrays
from silotune.common.protocol.tensors import orthonormal


class OneHot(Network):
    """Logistic or linear regression on one-hot public bins; with `hidden`, one layer between."""

    def __init__(
        self, spec: OneHotModel, table: TableInput, task: Task, performance: Performance
    ) -> None:
        size = sum(len(c.choices) + 1 for c in table.columns)
        super().__init__(size, task, performance)
        self.table, self.spec = table, spec
        self.scale = spec.norm / len(table.columns) ** 0.5
        if spec.hidden:
            first = nn.Linear(size, spec.hidden, device=self.device)
            last = nn.Linear(spec.hidden, task.outputs, device=self.device)
            align(first)
            align(last)
            self.head = nn.Sequential(OrderedDict(hidden=first, act=nn.Tanh(), out=last))

    def initial_arrays(self) -> Arrays:
        """Zeros; a hidden layer's weights are public random ones, or nothing would ever move."""
        arrays = super().initial_arrays()
        first = arrays.get("head.hidden.weight")
        if first is not None:
            rng = np.random.default_rng(0)
            size = min(first.shape)
            found = orthonormal(size, max(first.shape), rng)
            arrays["head.hidden.weight"] = np.ascontiguousarray(
                found if first.shape[0] == size else found.T
            )
        return arrays

    def encode(self, inputs: Inputs) -> Encoded:
        rows = featurize.to_one_hot(self.table, inputs)  # type: ignore[arg-type]
        return Encoded(torch.arange(len(rows))[:, None], torch.from_numpy(rows) * self.scale)
