"""A site's training data as the model sees it: frozen outputs and labels, kept in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from silotune.common import records
from silotune.common.contract import Contract
from silotune.common.model import Classifier, Encoded


@dataclass(frozen=True)
class Dataset:
    """encoded: N rows (common/model.py). labels: [N] int64. Both are private."""

    encoded: Encoded
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(table: records.Table, contract: Contract, model: Classifier) -> Dataset:
    """Check a site's table and run the frozen layers over it, once for each model and content.

    Both are public functions of each record by itself: nothing is learnt from one record and used
    on another.
    """
    rows = records.parse(table, contract)
    return _encode(model, tuple(rows.inputs), tuple(rows.labels.tolist()))


@lru_cache(maxsize=16)
def _encode(model: Classifier, inputs: records.Inputs, labels: tuple[int, ...]) -> Dataset:
    return Dataset(model.encode(inputs), torch.tensor(labels, dtype=torch.long))
