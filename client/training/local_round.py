"""One round at a site: local steps from the server's adapter, and the change they made.

Released metrics share the steps' budget. A step's mechanism has the noise multiplier s. With shares
b_j of its budget for the metrics and B their sum, the clipped gradients get the noise multiplier
s / sqrt(1 - B) and metric j, by which a unit can move a sum by at most its bound, s / sqrt(b_j),
all on the same Poisson sample. Scaled to unit noise, one unit moves the whole by at most
sqrt((1 - B) / s^2 + sum b_j / s^2) = 1 / s: together they are the one Gaussian mechanism that the
ledger charged. (For the share of unclipped units that is Theorem 1 of arXiv 1905.03871.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from silotune.client.privacy.accountant import Mechanism
from silotune.client.training.dataset import Dataset
from silotune.client.training.dp_adam import NoiseCorrectedAdam
from silotune.client.training.dp_optimizer import (
    UNIT,
    CryptoNoiseOptimizer,
    noised,
    plain_gradient,
    power_of_two,
    private_gradient,
)
from silotune.client.training.local_state import NOTHING, Own
from silotune.client.training.noise import NoiseSource
from silotune.client.training.privacy_units import Group, Part
from silotune.common.contract.contract import Contract
from silotune.common.contract.plan import Metric, Phase
from silotune.common.models.base import Network
from silotune.common.protocol.messages import Arrays
from silotune.common.protocol.tensors import trained_names
from silotune.common.tasks.objective import Objective


def train_round(
    contract: Contract,
    phase: Phase,
    mechanism: Mechanism,
    model: Network,
    data: Dataset,
    adapter: Arrays,
    source: NoiseSource,
    clip_norm: float,
    place: int = 1,
    own: Own = NOTHING,
) -> tuple[Arrays, dict[Metric, float]]:
    """The change of the phase's trained tensors after `mechanism.steps` private steps, and the
    contract's released metrics (means over the steps of sum / expected batch). place: the round's,
    1-based, in its phase. own: what the site has of its own, of earlier changes: it begins there.

    In mode "dp" the return values together are (with the accountant's epsilon for `mechanism`)
    differentially private in `data`: they are a function of `adapter`, public constants and the
    noised sums of client/training/dp_optimizer.py and `_Measured` alone, and of `own`, which is
    made of such.

    The change is the sum of the steps, not a difference of weights: as float32 that would lie on a
    grid as coarse as the adapter that the server chose, and of a weighted sum of few possible
    values each one can be told (tests/client/training/test_update_granularity.py).
    """
    trains = contract.trains_at(phase, place)
    names = trained_names(adapter, trains)
    with_adapter = phase.adapts
    divisor = contract.privacy.expected_records * mechanism.sampling_rate
    private = contract.privacy.mode == "dp"
    measured = _Measured(contract, mechanism, model.objective, divisor, source)

    kept: Tensor | None = None  # of the head's inputs, where the phase has dropout

    def losses(index: Tensor) -> Tensor:
        outputs = model(data.encoded, index, adapter=with_adapter, kept=kept)
        targets = model.targets(data.encoded, data.labels, index).to(outputs.device)
        measured.see(index, outputs, targets)
        return model.objective.losses(outputs, targets)

    with model.lock, model.requiring(names), model.unmixed(private):
        model.load(own.laid_over(adapter))
        known = model.named_tensors()
        tensors = {name: known[name] for name in names}
        start = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        moved = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        pulled = {
            name: start[name] - _tensor(adapter[name], model)
            for name in own.tensors
            if name in start
        }
        corrections = {
            name: _tensor(array, model) for name, array in own.corrections(adapter, names).items()
        }
        rates = [{"params": [moved[name]], "lr": phase.rate(name, place)} for name in names]
        gradient_noise = mechanism.noise_multiplier / math.sqrt(1 - contract.released_share)
        inner: torch.optim.Optimizer
        if phase.adam:
            inner = NoiseCorrectedAdam(
                rates, phase.adam, noise_std=gradient_noise * clip_norm / divisor
            )
        else:
            inner = torch.optim.SGD(rates)
        optimizer = None
        if private:
            optimizer = CryptoNoiseOptimizer(
                torch.optim.SGD(tensors.values()),
                source=source,
                noise_multiplier=gradient_noise,
                clip_norm=clip_norm,
                divisor=divisor,
            )
        for step in range(mechanism.steps):
            kept = _kept(phase, model, (place, step))
            drawn = torch.from_numpy(
                source.poisson_sample(len(data.units), mechanism.sampling_rate)
            )
            groups = list(
                data.units.groups(
                    drawn,
                    lambda rows: model.micro_batches(data.encoded, rows, adapter=with_adapter),
                )
            )
            if optimizer is not None:
                private_gradient(
                    model.trained_modules(trains),
                    optimizer,
                    groups,
                    losses,
                    gradients=model.performance.gradients,
                )
            else:
                plain_gradient(tensors.values(), groups, losses, divisor)
            measured.step(groups, optimizer)
            for name, tensor in tensors.items():
                moved[name].grad = tensor.grad
                if tensor.grad is None:
                    continue
                # What has moved so far is made of noised sums: pulling it back costs nothing.
                if phase.proximal:
                    away = moved[name] + pulled.get(name, 0.0)
                    moved[name].grad = tensor.grad + phase.proximal * away
                elif name in corrections:
                    moved[name].grad = tensor.grad + corrections[name]
            inner.step()
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(start[name] + moved[name])
    change = {name: np.asarray(found.cpu().numpy(), order="C") for name, found in moved.items()}
    return change, measured.means


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
        self.values = {"loss": objective.losses, "accuracy": objective.right}
        self.contract, self.mechanism, self.source = contract, mechanism, source
        self.scale = 1 / (divisor * mechanism.steps)
        self.means: dict[Metric, float] = {
            metric: 0.5 if metric == "unclipped" else 0.0 for metric in contract.metrics
        }
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # id of a part's rows -> logits, labels

    def see(self, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        if self.contract.releases:
            self._seen[id(rows)] = logits.detach(), labels

    def step(self, groups: Sequence[Group], optimizer: CryptoNoiseOptimizer | None) -> None:
        """Add a step's noised sums; forget what was seen."""
        for released in self.contract.releases:
            value = self.values[released.metric]

            def of_rows(part: Part, value: Any = value) -> Tensor:
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
                noised(total, 0.5 * self._noise(adaptive.share), self.source)
            )
        self._seen.clear()

    def _noise(self, share: float) -> float:
        return self.mechanism.noise_multiplier / math.sqrt(share)


def _of_units(groups: Iterable[Group], of_rows: Callable[[Part], Tensor]) -> Iterator[Tensor]:
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
    unit = power_of_two(bound, UNIT)
    total = torch.zeros((), dtype=torch.float64)
    for v in values:
        counted = v.double().nan_to_num(nan=0.0, posinf=bound).clamp(0, bound)
        total += (counted / unit).floor_().sum().cpu()
    total *= unit
    return float(noised(total, noise_multiplier * bound, source) if noise_multiplier else total)


def _tensor(array: np.ndarray, model: Network) -> Tensor:
    return torch.from_numpy(array).to(model.device)


def _kept(phase: Phase, model: Network, seed: tuple[int, int]) -> Tensor | None:
    """What the head's inputs are multiplied by in a step: dropout with one mask for all records,
    drawn from the round's public place in its phase and the step."""
    if not phase.dropout:
        return None
    size = next(m.in_features for m in model.head.modules() if isinstance(m, nn.Linear))
    kept = np.random.default_rng(seed).random(size) >= phase.dropout
    return torch.from_numpy(kept / (1 - phase.dropout)).float().to(model.device)
