"""Metrics on the operator's own public rows: overall and by the site they resemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.common.contract.contract import Contract
from silotune.common.contract.task import Classification, Regression, Task
from silotune.common.data import records
from silotune.common.data.calibration_rows import calibration_rows
from silotune.common.data.text_decoding import Reading
from silotune.common.models.base import Network
from silotune.common.protocol.messages import Arrays
from silotune.common.tasks.calibration import Calibration, fit
from silotune.common.tasks.metrics import Scores, score


class PublicTest:
    """Labelled public rows, read and encoded once.

    files: group name -> file. Nothing here is a site's record.
    """

    def __init__(
        self,
        contract: Contract,
        model: Network,
        files: Mapping[str, Path],
        reading: Reading | None = None,
    ) -> None:
        self.model, self.task = model, contract.task
        tables = {group: records.read(path, contract, reading) for group, path in files.items()}
        self.groups = [group for group, table in tables.items() for _ in range(len(table))]
        self.labels = [label for table in tables.values() for label in table.labels]
        self.queries = [query for table in tables.values() for query in table.queries]
        rows: list[Any] = [row for table in tables.values() for row in table.inputs]
        self.encoded = model.encode(rows)
        self.targets = model.objective.tensor(self.labels)

    def divided(self) -> tuple[PublicTest, PublicTest | None]:
        """The rows for figures, and those to calibrate by, which no figure uses; None where there
        are too few for both, and all are for figures."""
        few_labels = isinstance(self.task, (Classification, Regression))
        labels = self.labels if few_labels else [0] * len(self.labels)
        together = self.queries or list(map(str, range(len(self.labels))))
        chosen = calibration_rows(list(zip(self.groups, labels, strict=True)), together)
        return (self._part(~chosen), self._part(chosen)) if chosen.any() else (self, None)

    def _part(self, chosen: NDArray[np.bool_]) -> PublicTest:
        """Some of the rows."""
        part, rows = copy(self), np.flatnonzero(chosen).tolist()
        part.groups = [self.groups[row] for row in rows]
        part.labels = [self.labels[row] for row in rows]
        part.queries = [self.queries[row] for row in rows] if self.queries else []
        part.encoded = replace(self.encoded, texts=self.encoded.texts[rows])
        part.targets = self.targets[rows]
        return part

    def outputs(self, adapter: Arrays, *, adapter_active: bool) -> list[Any]:
        """What evaluation keeps of each row (common/tasks/)."""
        with self.model.lock:
            self.model.load(adapter)
            return self.model.predict(self.encoded, self.targets, adapter=adapter_active)

    def scores(self, adapter: Arrays, *, adapter_active: bool) -> dict[str, Scores]:
        """Scores of all rows under "", and of each group under its name."""
        return self.scores_of(self.outputs(adapter, adapter_active=adapter_active))

    def scores_of(self, outputs: Sequence[Any]) -> dict[str, Scores]:
        """The same from outputs that are known."""
        return scores_by_group(self.task, outputs, self.labels, self.queries, self.groups)

    def calibration(self, adapter: Arrays, *, adapter_active: bool) -> Calibration | None:
        """The calibration that fits these rows: none of them may be one that it is judged by."""
        return fit(self.task, self.outputs(adapter, adapter_active=adapter_active), self.labels)

    def metrics(self, adapter: Arrays, adapter_active: bool) -> Scores:
        """The overall scores, for the curve of a run."""
        return self.scores(adapter, adapter_active=adapter_active)[""]


def scores_by_group(
    task: Task,
    outputs: Sequence[Any],
    labels: Sequence[Any],
    queries: Sequence[str],
    groups: Sequence[str],
) -> dict[str, Scores]:
    """Scores of all rows under "", and of each group under its name. groups: of each row."""
    found = {"": range(len(outputs))} | {
        group: [row for row, own in enumerate(groups) if own == group]
        for group in dict.fromkeys(groups)
    }
    return {
        group: score(
            task,
            [outputs[r] for r in rows],
            [labels[r] for r in rows],
            [queries[r] for r in rows] if queries else (),
        )
        for group, rows in found.items()
    }
