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

import numpy as np
import torch
from torch import Tensor, nn

from silotune.client.privacy.accountant import Mechanism
from silotune.client.training.dataset import Dataset
from silotune.client.training.dp_adam import NoiseCorrectedAdam
from silotune.client.training.dp_optimizer import (
    DPOptimizer,
    plain_gradient,
    private_gradient,
)
from silotune.client.training.local_state import NOTHING, LocalState
from silotune.client.training.noise import NoiseSource
from silotune.client.training.released_metrics import _Measured
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.contract.schedule import RoundPlan
from silotune.common.contract.training import Phase
from silotune.common.models.base import Network
from silotune.common.protocol.messages import Arrays
from silotune.common.protocol.tensors import trained_names


def train_round(
    contract: Contract,
    plan: RoundPlan,
    mechanism: Mechanism,
    model: Network,
    data: Dataset,
    adapter: Arrays,
    source: NoiseSource,
    clip_norm: float,
    local_state: LocalState = NOTHING,
) -> tuple[Arrays, dict[Metric, float]]:
    """The change of the round's trained tensors after `mechanism.steps` private steps, and the
    contract's released metrics (means over the steps of sum / expected batch). own: what the site
    has of its own, of earlier changes: it begins there.

    In mode "dp" the return values together are (with the accountant's epsilon for `mechanism`)
    differentially private in `data`: they are a function of `adapter`, public constants and the
    noised sums of client/training/dp_optimizer.py and `_Measured` alone, and of `local_state`,
    which is made of such.

    The change is the sum of the steps, not a difference of weights: as float32 that would lie on a
    grid as coarse as the adapter that the server chose, and of a weighted sum of few possible
    values each one can be told (tests/client/training/test_update_granularity.py).
    """
    phase = plan.phase
    names = trained_names(adapter, plan.trains)
    adapter_active = phase.adapts
    divisor = contract.privacy.expected_units * mechanism.sampling_rate
    private = contract.privacy.mode == "dp"
    measured = _Measured(contract, mechanism, model.objective, divisor, source)

    dropout_mask: Tensor | None = None  # of the head's inputs, where the phase has dropout

    def losses(index: Tensor) -> Tensor:
        outputs = model(data.encoded, index, adapter=adapter_active, dropout_mask=dropout_mask)
        targets = model.targets(data.encoded, data.labels, index).to(outputs.device)
        measured.see(index, outputs, targets)
        return model.objective.losses(outputs, targets)

    with model.lock, model.requiring(names), model.batch_invariant(private):
        model.load(local_state.laid_over(adapter))
        known = model.named_tensors()
        tensors = {name: known[name] for name in names}
        start = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        moved = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        pulled = {
            name: start[name] - _tensor(adapter[name], model)
            for name in local_state.tensors
            if name in start
        }
        corrections = {
            name: _tensor(array, model)
            for name, array in local_state.corrections(adapter, names).items()
        }
        rates = [{"params": [moved[name]], "lr": plan.learning_rate(name)} for name in names]
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
            optimizer = DPOptimizer(
                torch.optim.SGD(tensors.values()),
                source=source,
                noise_multiplier=gradient_noise,
                clip_norm=clip_norm,
                divisor=divisor,
            )
        for step in range(mechanism.steps):
            dropout_mask = _dropout_mask(phase, model, (plan.round_in_phase, step))
            drawn = torch.from_numpy(
                source.poisson_sample(len(data.units), mechanism.sampling_rate)
            )
            groups = list(
                data.units.groups(
                    drawn,
                    lambda rows: model.micro_batches(data.encoded, rows, adapter=adapter_active),
                )
            )
            if optimizer is not None:
                private_gradient(
                    model.trained_modules(plan.trains),
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
                if phase.proximal_mu:
                    away = moved[name] + pulled.get(name, 0.0)
                    moved[name].grad = tensor.grad + phase.proximal_mu * away
                elif name in corrections:
                    moved[name].grad = tensor.grad + corrections[name]
            inner.step()
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(start[name] + moved[name])
    change = {name: np.asarray(found.cpu().numpy(), order="C") for name, found in moved.items()}
    return change, measured.means


def _tensor(array: np.ndarray, model: Network) -> Tensor:
    return torch.from_numpy(array).to(model.device)


def _dropout_mask(phase: Phase, model: Network, seed: tuple[int, int]) -> Tensor | None:
    """What the head's inputs are multiplied by in a step: dropout with one mask for all records,
    drawn from the round's public place in its phase and the step."""
    if not phase.dropout:
        return None
    size = next(m.in_features for m in model.head.modules() if isinstance(m, nn.Linear))
    dropout_mask = np.random.default_rng(seed).random(size) >= phase.dropout
    return torch.from_numpy(dropout_mask / (1 - phase.dropout)).float().to(model.device)
