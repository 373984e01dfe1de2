"""Before a worker trains: on its own model and task, one private step equals clipping by hand.

The rows are made up from the public contract, the noise is off, and the arithmetic of the check
shares nothing with client/dp.py: each record's gradient by itself, from torch, put together by
unit and clipped in float64.
A model whose examples mix (a batch norm, a loss averaged over a batch), an engine that does not
clip, or a torch that computes something else is found before anything is charged.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from silotune.client.dp import CryptoNoiseOptimizer, private_gradient
from silotune.client.noise import NoiseSource
from silotune.client.units import Units, of_records
from silotune.common import schema
from silotune.common.adapter import trained_names
from silotune.common.classifier import Classifier
from silotune.common.contract import Contract
from silotune.common.errors import RefusalError
from silotune.common.inputs import TableInput
from silotune.common.records import Inputs
from silotune.common.tasks import classification

ROWS = 5
TINY = 1e-12
TOLERANCE = 1e-3  # of the clip norm
# bf16 keeps 8 bits, and blocks of another size round in other places (0.003 to 0.014 was seen);
# ghost clips a little lower.
LOOSE = 0.05


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
    encoded, engine = model.encode(_rows(contract)), model.performance.gradients
    entity = contract.privacy.entity
    of = [[0], [1, 2], [3], [4]] if entity else [[row] for row in range(ROWS)]
    units = of_records(ROWS)
    if entity:
        starts = torch.tensor([0, *map(len, of)]).cumsum(0)
        units = Units(torch.arange(ROWS), starts, entity.combine == "mean")
    # Rows 1 and 2, which may be one entity, pull the same way: their mean is not small.
    labels = torch.tensor([0, 1, 1, 2, 3]) % len(contract.label_names)
    rng = np.random.default_rng(0)
    with model.lock:
        initial = model.initial_arrays()
        # Away from zero: a head of zeros would hide every gradient of the adapter behind it.
        model.load({
            name: (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32)
            for name, a in initial.items()
        })
        for trains in dict.fromkeys(phase.trains for phase in contract.phases):
            with_adapter = trains == "head+adapter"

            def losses(index: torch.Tensor, adapter: bool = with_adapter) -> torch.Tensor:
                logits = model(encoded, index, adapter=adapter)
                return classification.per_example_loss(logits, labels[index].to(logits.device))

            tensors = model.named_tensors()
            parameters = [tensors[name] for name in trained_names(initial, trains)]
            alone = [
                torch.cat([
                    g.double().flatten() for g in torch.autograd.grad(
                        losses(torch.tensor([row])).sum(), parameters
                    )
                ]) for row in range(ROWS)
            ]
            whole = [
                torch.stack([alone[row] for row in rows]).sum(dim=0)
                / (len(rows) if units.mean else 1) for rows in of
            ]
            # Below the middle one's norm: some gradients are clipped, and some are not.
            clip = max(0.99 * float(torch.stack([g.norm() for g in whole]).median()), TINY)
            by_hand = sum(g * min(1.0, clip / max(float(g.norm()), TINY)) for g in whole)
            optimizer = CryptoNoiseOptimizer(
                torch.optim.SGD(parameters, lr=1.0), source=_Silent(site="self-test"),
                noise_multiplier=1e-6, clip_norm=clip, divisor=1.0,
            )
            groups = units.groups(
                torch.arange(len(units)),
                partial(model.micro_batches, encoded, adapter=with_adapter),
            )
            private_gradient(
                model.trained_linears(trains), optimizer, groups, losses, gradients=engine
            )
            found = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
            error = float((found - by_hand).norm()) / clip
            tolerance = LOOSE if model.bf16 or engine == "ghost" else TOLERANCE
            if not error <= tolerance:
                raise RefusalError(
                    f"The self-test of {trains} failed: the private step is off by {error:.2g} "
                    f"clip norms (allowed: {tolerance:g}). Nothing is trained with such an engine.",
                    code="E208",
                )


def _rows(contract: Contract) -> Inputs:
    """Made-up rows of different lengths; nothing in them is anybody's."""
    if isinstance(contract.input, TableInput):
        return schema.synthetic(contract.input, ROWS, seed=0)
    return [" ".join(["a public sentence"] * (row + 1)) for row in range(ROWS)]
