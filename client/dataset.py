"""A site's training data as the model sees it: frozen outputs and labels, kept in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from silotune.common.records import Records
from silotune.common.model import Classifier, Encoded


@dataclass(frozen=True)
class Dataset:
    """encoded: N rows (common/model.py). labels: [N] int64. Both are private."""

    encoded: Encoded
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def build(records: Records, model: Classifier) -> Dataset:
    """Run the frozen layers once over all records: a public function of each record by itself."""
    return Dataset(model.encode(records.inputs), torch.from_numpy(records.labels))
