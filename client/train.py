"""One round at a site: local steps from the server's adapter, and the change they made.

Released metrics share the steps' budget. A step's mechanism has the noise multiplier s. With shares
b_j of its budget for the metrics and B their sum, the clipped gradients get the noise multiplier
s / sqrt(1 - B) and metric j, bounded by its bound, s / sqrt(b_j), all on the same Poisson sample.
Scaled to unit noise, one record moves the whole by at most sqrt((1 - B) / s^2 + sum b_j / s^2) =
1 / s: together they are the one Gaussian mechanism that the ledger charged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from silotune.client.accounting import Mechanism
from silotune.client.dataset import Dataset
from silotune.client.dp import (
    UNIT,
    CryptoNoiseOptimizer,
    noised,
    plain_gradient,
    power_of_two,
    private_gradient,
)
from silotune.client.noise import NoiseSource
from silotune.common.adapter import trained_names
from silotune.common.contract import Contract, Metric, Phase
from silotune.common.messages import Arrays
from silotune.common.model import Classifier
from silotune.common.tasks import classification


def train_round(
    contract: Contract,
    phase: Phase,
    mechanism: Mechanism,
    model: Classifier,
    data: Dataset,
    adapter: Arrays,
    source: NoiseSource,
) -> tuple[Arrays, dict[Metric, float]]:
    """The change of the phase's trained tensors after `mechanism.steps` DP-SGD steps, and the
    contract's released metrics (a mean over the steps of sum / expected batch).

    In mode "dp" the return values together are (with the accountant's epsilon for `mechanism`)
    differentially private in `data`: they are a function of `adapter`, public constants and the
    noised sums of client/dp.py and `_metrics` alone.
    """
    names = trained_names(adapter, phase.trains)
    with_adapter = phase.trains == "head+adapter"
    divisor = contract.privacy.expected_records * mechanism.sampling_rate

    metrics: dict[Metric, float] = {released.metric: 0.0 for released in contract.releases}

    def logits(index: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(data.encoded, index, adapter=with_adapter)
        return found

    def losses(index: torch.Tensor) -> torch.Tensor:
        return classification.per_example_loss(logits(index), data.labels[index])

    def measure(batches: Sequence[tuple[torch.Tensor, int]]) -> None:
        for released in contract.releases:
            value = classification.VALUES[released.metric]
            total = noisy_total(
                (value(logits(index), data.labels[index])[:n] for index, n in batches if n),
                released.bound, mechanism.noise_multiplier / math.sqrt(released.share), source,
            )
            metrics[released.metric] += total / (divisor * mechanism.steps)

    with model.lock:
        model.load(adapter)
        tensors = model.named_tensors()
        sgd = torch.optim.SGD([{"params": [tensors[n]], "lr": _rate(phase, n)} for n in names])
        optimizer = None
        if contract.privacy.mode == "dp":
            optimizer = CryptoNoiseOptimizer(
                sgd,
                source=source,
                noise_multiplier=mechanism.noise_multiplier
                / math.sqrt(1 - contract.released_share),
                clip_norm=contract.privacy.clip_norm,
                divisor=divisor,
            )
        for _ in range(mechanism.steps):
            drawn = torch.from_numpy(source.poisson_sample(len(data), mechanism.sampling_rate))
            batches = list(model.micro_batches(data.encoded, drawn, adapter=with_adapter))
            measure(batches)
            if optimizer is not None:
                private_gradient(model.trained_linears(phase.trains), optimizer, batches, losses)
            else:
                plain_gradient([tensors[n] for n in names], batches, losses, divisor)
            sgd.step()
        after = model.arrays(names)
    change = {name: np.subtract(after[name], adapter[name], dtype=np.float32) for name in names}
    return change, metrics


def noisy_total(
    values: Iterable[torch.Tensor], bound: float, noise_multiplier: float, source: NoiseSource
) -> float:
    """Sum of the values, each clipped to [0, bound] and counted as 0 if it is not a number, plus
    N(0, (noise_multiplier * bound)^2): the Gaussian mechanism. One record moves the sum by at most
    `bound`; each value must be of its own record only. Whole units and a grain as in client/dp.py.
    """
    unit = power_of_two(bound, UNIT)
    with torch.no_grad():
        counted = [
            (v.double().nan_to_num(nan=0.0, posinf=bound).clamp(0, bound) / unit).floor_().sum()
            for v in values
        ]
    total = unit * sum(counted, torch.zeros((), dtype=torch.float64))
    return float(noised(total, noise_multiplier * bound, source) if noise_multiplier else total)


def _rate(phase: Phase, name: str) -> float:
    if name.startswith("head."):
        return phase.head_rate
    assert phase.adapter_rate is not None
    return phase.adapter_rate
