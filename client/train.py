"""One round at a site: local steps from the server's adapter, and the change they made."""

from __future__ import annotations

import numpy as np
import torch

from silotune.client.accounting import Mechanism
from silotune.client.dataset import Dataset
from silotune.client.dp import CryptoNoiseOptimizer, plain_gradient, private_gradient
from silotune.client.noise import NoiseSource
from silotune.common.adapter import trained_names
from silotune.common.contract import Contract, Phase
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
) -> Arrays:
    """The change of the phase's trained tensors after `mechanism.steps` DP-SGD steps.

    In mode "dp" the return value is (with the accountant's epsilon for `mechanism`)
    differentially private in `data`: it is a function of `adapter`, public constants and the noised
    sums of client/dp.py alone.
    """
    names = trained_names(adapter, phase.trains)
    with_adapter = phase.trains == "head+adapter"
    divisor = contract.privacy.expected_records * mechanism.sampling_rate

    def losses(index: torch.Tensor) -> torch.Tensor:
        logits = model(data.encoded, index, adapter=with_adapter)
        return classification.per_example_loss(logits, data.labels[index])

    with model.lock:
        model.load(adapter)
        tensors = model.named_tensors()
        sgd = torch.optim.SGD([{"params": [tensors[n]], "lr": _rate(phase, n)} for n in names])
        optimizer = None
        if contract.privacy.mode == "dp":
            optimizer = CryptoNoiseOptimizer(
                sgd,
                source=source,
                noise_multiplier=mechanism.noise_multiplier,
                clip_norm=contract.privacy.clip_norm,
                divisor=divisor,
            )
        for _ in range(mechanism.steps):
            drawn = torch.from_numpy(source.poisson_sample(len(data), mechanism.sampling_rate))
            batches = model.micro_batches(data.encoded, drawn, adapter=with_adapter)
            if optimizer is not None:
                private_gradient(model.trained_linears(phase.trains), optimizer, batches, losses)
            else:
                plain_gradient([tensors[n] for n in names], batches, losses, divisor)
            sgd.step()
        after = model.arrays(names)
    return {name: np.subtract(after[name], adapter[name], dtype=np.float32) for name in names}


def _rate(phase: Phase, name: str) -> float:
    if name.startswith("head."):
        return phase.head_rate
    assert phase.adapter_rate is not None
    return phase.adapter_rate
