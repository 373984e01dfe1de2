"""Metrics on the operator's own public rows: overall and by the site they resemble."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from silotune.common import records
from silotune.common.classifier import Classifier
from silotune.common.contract import Contract
from silotune.common.messages import Arrays
from silotune.common.metrics import Scores, score


class PublicTest:
    """Labelled public rows, read and encoded once.

    files: group name -> CSV file. Nothing here is a site's record.
    """

    def __init__(self, contract: Contract, model: Classifier, files: Mapping[str, Path]) -> None:
        self.model = model
        tables = {group: records.read(path, contract) for group, path in files.items()}
        self.groups = [group for group, table in tables.items() for _ in range(len(table))]
        self.labels = np.concatenate([table.labels for table in tables.values()])
        rows: list[Any] = [row for table in tables.values() for row in table.inputs]
        self.encoded = model.encode(rows)

    def logits(self, adapter: Arrays, *, with_adapter: bool) -> np.ndarray:
        with self.model.lock:
            self.model.load(adapter)
            return self.model.predict(self.encoded, adapter=with_adapter)

    def scores(self, adapter: Arrays, *, with_adapter: bool) -> dict[str, Scores]:
        """Scores of all rows under "", and of each group under its name."""
        logits = self.logits(adapter, with_adapter=with_adapter)
        groups = np.array(self.groups)
        return {
            group: score(logits[keep], self.labels[keep])
            for group, keep in [
                ("", np.full(len(groups), True)),
                *((g, groups == g) for g in dict.fromkeys(self.groups)),
            ]
        }

    def metrics(self, adapter: Arrays, with_adapter: bool) -> dict[str, float | None]:
        """The overall scores as plain numbers, for the curve of a run."""
        return dict(vars(self.scores(adapter, with_adapter=with_adapter)[""]))

