"""Metrics that a contract releases: bounded per unit, summed, and noised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from silotune.client.privacy.accountant import Mechanism
from silotune.client.training.dp_optimizer import (
    QUANTUM_LOG2,
    ClippingOptimizer,
    add_gaussian_noise,
    power_of_two,
)
from silotune.client.training.noise import NoiseSource
from silotune.client.training.privacy_units import Group, UnitBatch
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.tasks.objective import Objective


class _Measured:
    """The contract's released metrics, step by step, from the logits of the training itself."""

    def __init__(
        self,
        contract: Contract,
        mechanism: Mechanism,
        objective: Objective,
        divisor: float,
        source: NoiseSource,
    ) -> None:
        self.values = {"loss": objective.losses, "accuracy": objective.correct}
        self.contract, self.mechanism, self.source = contract, mechanism, source
        self.scale = 1 / (divisor * mechanism.steps)
        self.means: dict[Metric, float] = {
            metric: 0.5 if metric == "unclipped" else 0.0 for metric in contract.metrics
        }
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # id of a part's rows -> logits, labels

    def see(self, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        if self.contract.releases:
            self._seen[id(rows)] = logits.detach(), labels

    def step(self, groups: Sequence[Group], optimizer: ClippingOptimizer | None) -> None:
        """Add a step's noised sums; forget what was seen."""
        for released in self.contract.releases:
            value = self.values[released.metric]

            def of_rows(part: UnitBatch, value: Any = value) -> Tensor:
                found: Tensor = value(*self._seen[id(part.rows)])
                return found[: part.n]

            self.means[released.metric] += self.scale * noisy_total(
                _of_units(groups, of_rows),
                released.bound,
                self._noise(released.share),
                self.source,
            )
        adaptive = self.contract.privacy.adaptive
        if adaptive and optimizer:
            # Each unit adds 1/2 or -1/2, so that it moves the sum by 1/2, and how many units there
            # are does not move the mean away from the half that stands for no units at all.
            total = torch.tensor(optimizer.unclipped - optimizer.units / 2, dtype=torch.float64)
            self.means["unclipped"] += self.scale * float(
                add_gaussian_noise(total, 0.5 * self._noise(adaptive.share), self.source)
            )
        self._seen.clear()

    def _noise(self, share: float) -> float:
        return self.mechanism.noise_multiplier / math.sqrt(share)


def _of_units(groups: Iterable[Group], of_rows: Callable[[UnitBatch], Tensor]) -> Iterator[Tensor]:
    """For each group [units]: its records' values; of an entity, the mean of its records'."""
    for units, parts in groups:
        if parts[0].owners is None:
            yield from map(of_rows, parts)
            continue
        sums, counts = torch.zeros(2, units, dtype=torch.float64)
        for part in parts:
            values = of_rows(part).cpu().double()
            sums.index_add_(0, part.owners, values)
            counts.index_add_(0, part.owners, torch.ones_like(values))
        yield sums / counts


def noisy_total(
    values: Iterable[Tensor], bound: float, noise_multiplier: float, source: NoiseSource
) -> float:
    """Sum of the values, each clipped to [0, bound] and counted as 0 if it is not a number, plus
    N(0, (noise_multiplier * bound)^2): the Gaussian mechanism. One unit moves the sum by at most
    `bound`; each value must be of its own unit only. Whole units and a grain as in
    client/training/dp_optimizer.py.
    """
    unit = power_of_two(bound, QUANTUM_LOG2)
    total = torch.zeros((), dtype=torch.float64)
    for v in values:
        counted = v.double().nan_to_num(nan=0.0, posinf=bound).clamp(0, bound)
        total += (counted / unit).floor_().sum().cpu()
    total *= unit
    return float(
        add_gaussian_noise(total, noise_multiplier * bound, source) if noise_multiplier else total
    )
