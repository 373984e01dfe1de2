"""Before a worker trains: on its own model and task, one private step equals clipping by hand.

The rows are made up from the public contract, the noise is off, and the arithmetic of the check
shares nothing with client/dp.py: each record's gradient by itself, from torch, clipped in float64.
A model whose examples mix (a batch norm, a loss averaged over a batch), an engine that does not
clip, or a torch that computes something else is found before anything is charged.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from silotune.client.dp import CryptoNoiseOptimizer, private_gradient
from silotune.client.noise import NoiseSource
from silotune.common import schema
from silotune.common.adapter import trained_names
from silotune.common.contract import Contract
from silotune.common.errors import RefusalError
from silotune.common.inputs import TableInput
from silotune.common.model import BF16, Classifier
from silotune.common.records import Inputs
from silotune.common.tasks import classification

ROWS = 5
TINY = 1e-12
# Of the whole gradient's norm. bf16 keeps 8 bits, and blocks of another size round in other places.
TOLERANCE = 0.03 if BF16 else 1e-3


class _Silent(NoiseSource):
    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.zeros(shape)


# What has passed in this process: simulations build many workers on one model.
_passed: WeakKeyDictionary[Classifier, set[str]] = WeakKeyDictionary()


def check(contract: Contract, model: Classifier) -> None:
    """RefusalError E208 unless the private step is right for every phase of the contract."""
    passed = _passed.setdefault(model, set())
    if contract.hash not in passed:
        _check(contract, model)
        passed.add(contract.hash)


def _check(contract: Contract, model: Classifier) -> None:
    encoded = model.encode(_rows(contract))
    labels = torch.arange(ROWS) % len(contract.label_names)
    rng = np.random.default_rng(0)
    with model.lock:
        initial = model.initial_arrays()
        # Away from zero: a head of zeros would hide every gradient of the adapter behind it.
        model.load({
            name: (a + 0.3 * rng.standard_normal(a.shape)).astype(np.float32)
            for name, a in initial.items()
        })
        for trains in dict.fromkeys(phase.trains for phase in contract.phases):
            with_adapter = trains == "head+adapter"

            def losses(index: torch.Tensor, adapter: bool = with_adapter) -> torch.Tensor:
                logits = model(encoded, index, adapter=adapter)
                return classification.per_example_loss(logits, labels[index])

            tensors = model.named_tensors()
            parameters = [tensors[name] for name in trained_names(initial, trains)]
            alone = [
                torch.cat([
                    g.double().flatten() for g in torch.autograd.grad(
                        losses(torch.tensor([row])).sum(), parameters
                    )
                ]) for row in range(ROWS)
            ]
            # Below the middle one's norm: some gradients are clipped, and some are not.
            clip = max(0.99 * float(torch.stack([g.norm() for g in alone]).median()), TINY)
            by_hand = sum(g * min(1.0, clip / max(float(g.norm()), TINY)) for g in alone)
            optimizer = CryptoNoiseOptimizer(
                torch.optim.SGD(parameters, lr=1.0), source=_Silent(site="self-test"),
                noise_multiplier=1e-6, clip_norm=clip, divisor=1.0,
            )
            batches = model.micro_batches(encoded, torch.arange(ROWS), adapter=with_adapter)
            private_gradient(model.trained_linears(trains), optimizer, batches, losses)
            found = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
            error = float((found - by_hand).norm()) / clip
            if not error <= TOLERANCE:
                raise RefusalError(
                    f"The self-test of {trains} failed: the private step is off by {error:.2g} "
                    f"clip norms (allowed: {TOLERANCE:g}). Nothing is trained with such an engine.",
                    code="E208",
                )


def _rows(contract: Contract) -> Inputs:
    """Made-up rows of different lengths; nothing in them is anybody's."""
    if isinstance(contract.input, TableInput):
        return schema.synthetic(contract.input, ROWS, seed=0)
    return [" ".join(["a public sentence"] * (row + 1)) for row in range(ROWS)]
