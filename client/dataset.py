"""A site's training data as the model sees it: frozen outputs, labels, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from silotune.client import units
from silotune.client.units import Units
from silotune.common import records
from silotune.common.classifier import Classifier, Encoded
from silotune.common.contract import Contract


@dataclass(frozen=True)
class Dataset:
    """encoded: N rows (common/classifier.py). labels: [N] int64. units: of the N rows. Private."""

    encoded: Encoded
    labels: torch.Tensor
    units: Units


def load(table: records.Table, contract: Contract, model: Classifier) -> Dataset:
    """Check a site's table and run the frozen layers over it, once for each model and content.

    Both are public functions of each record by itself: nothing is learnt from one record and used
    on another.
    """
    rows = records.parse(table, contract)
    entity = contract.privacy.entity
    of = units.of_entities(table, entity) if entity else units.of_records(len(rows))
    encoded, labels = _encode(model, tuple(rows.inputs), tuple(rows.labels.tolist()))
    return Dataset(encoded, labels, of)


@lru_cache(maxsize=16)
def _encode(
    model: Classifier, inputs: records.Inputs, labels: tuple[int, ...]
) -> tuple[Encoded, torch.Tensor]:
    return model.encode(inputs), torch.tensor(labels, dtype=torch.long)
