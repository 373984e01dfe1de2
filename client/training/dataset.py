"""A site's training data as the model sees it: frozen outputs, labels, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from silotune.client.training import privacy_units
from silotune.client.training.privacy_units import Units
from silotune.common.contract.contract import Contract
from silotune.common.data import records
from silotune.common.models.base import Encoded, Network


@dataclass(frozen=True)
class Dataset:
    """encoded: N records (common/models/base.py). labels: [N, ...], their targets as the task's
    objective has them (common/tasks/). units: of the N records. Private."""

    encoded: Encoded
    labels: torch.Tensor
    units: Units


def load(table: records.Table, contract: Contract, model: Network) -> Dataset:
    """Check a site's table and run the frozen layers over it, once for each model and content.

    Both are public functions of each record by itself: nothing is learnt from one record and used
    on another.
    """
    found = records.parse(table, contract)
    entity = contract.privacy.entity
    of = (
        privacy_units.of_entities(table, entity) if entity else privacy_units.of_records(len(found))
    )
    return Dataset(_encode(model, tuple(found.inputs)), model.objective.tensor(found.labels), of)


@lru_cache(maxsize=16)
def _encode(model: Network, inputs: records.Inputs) -> Encoded:
    return model.encode(inputs)
