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
    ClippingOptimizer,
    DPOptimizer,
    plain_gradient,
    private_gradient,
)
from silotune.client.training.local_state import NOTHING, LocalState
from silotune.client.training.noise import NoiseSource
from silotune.client.training.privacy_units import Group
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
    contract's released metrics (means over the steps of sum / expected batch). local_state: what
    the site has of its own, of earlier changes: it begins there.

    In mode "dp" the return values together are (with the accountant's epsilon for `mechanism`)
    differentially private in `data`: they are a function of `adapter`, public constants and the
    noised sums of client/training/dp_optimizer.py and `_Measured` alone, and of `local_state`,
    which is made of such.

    The change is the sum of the steps, not a difference of weights: as float32 that would lie on a
    grid as coarse as the adapter that the server chose, and of a weighted sum of few possible
    values each one can be told (tests/client/training/test_update_granularity.py).
    """
    names = trained_names(adapter, plan.trains)
    clipped = contract.privacy.mode == "dp" or contract.privacy.clip_only is True
    with model.lock, model.requiring(names), model.batch_invariant(clipped):
        trainer = LocalTrainer(
            contract, plan, mechanism, model, data, adapter, source, clip_norm, local_state
        )
        for number in range(mechanism.steps):
            trainer.step(number)
        return trainer.change(), trainer.measured.means


class LocalTrainer:
    """The steps of one round, on a model that is locked and whose trained tensors require gradients
    (`train_round`, which says what the arguments are)."""

    def __init__(
        self,
        contract: Contract,
        plan: RoundPlan,
        mechanism: Mechanism,
        model: Network,
        data: Dataset,
        adapter: Arrays,
        source: NoiseSource,
        clip_norm: float,
        local_state: LocalState,
    ) -> None:
        self.plan, self.mechanism, self.model, self.data = plan, mechanism, model, data
        self.source = source
        self.divisor = contract.privacy.expected_units * mechanism.sampling_rate
        self.measured = _Measured(contract, mechanism, model.objective, self.divisor, source)
        self._dropout: Tensor | None = None  # of the head's inputs, in the step that is being done
        model.load(local_state.laid_over(adapter))
        known, names = model.named_tensors(), trained_names(adapter, plan.trains)
        self.tensors = {name: known[name] for name in names}
        self._start = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self._moved = {name: torch.zeros_like(tensor) for name, tensor in self._start.items()}
        self._pulled = {
            name: self._start[name] - _tensor(adapter[name], model)
            for name in local_state.tensors
            if name in self._start
        }
        self._corrections = {
            name: _tensor(array, model)
            for name, array in local_state.corrections(adapter, names).items()
        }
        gradient_noise = mechanism.noise_multiplier / math.sqrt(1 - contract.released_share)
        self._inner = self._optimizer(gradient_noise * clip_norm / self.divisor)
        self._clipping: ClippingOptimizer | None = None
        if contract.privacy.mode == "dp":
            self._clipping = DPOptimizer(
                torch.optim.SGD(self.tensors.values()),
                source=source,
                noise_multiplier=gradient_noise,
                clip_norm=clip_norm,
                divisor=self.divisor,
            )
        elif contract.privacy.clip_only:
            self._clipping = ClippingOptimizer(
                torch.optim.SGD(self.tensors.values()), clip_norm=clip_norm, divisor=self.divisor
            )

    def _optimizer(self, noise_std: float) -> torch.optim.Optimizer:
        """What makes steps of the noised gradients; noise_std: of one of their entries."""
        rates = [
            {"params": [moved], "lr": self.plan.learning_rate(name)}
            for name, moved in self._moved.items()
        ]
        if self.plan.phase.adam:
            return NoiseCorrectedAdam(rates, self.plan.phase.adam, noise_std=noise_std)
        return torch.optim.SGD(rates)

    def step(self, number: int) -> None:
        """One step on a new Poisson sample. number: from 0 in the round."""
        self._dropout = _dropout_mask(
            self.plan.phase, self.model, (self.plan.round_in_phase, number)
        )
        groups = self._sample()
        self._gradient(groups)
        self.measured.step(groups, self._clipping)
        for name, tensor in self.tensors.items():
            self._moved[name].grad = self._corrected(name, tensor.grad)
        self._inner.step()
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(self._start[name] + self._moved[name])

    def change(self) -> Arrays:
        """The sum of the steps so far, by the tensors' names."""
        return {
            name: np.asarray(moved.cpu().numpy(), order="C") for name, moved in self._moved.items()
        }

    def _sample(self) -> list[Group]:
        """A Poisson sample of the privacy units, in batches that the model takes at a time."""
        units = self.data.units
        drawn = self.source.poisson_sample(len(units), self.mechanism.sampling_rate)
        return list(
            units.groups(
                torch.from_numpy(drawn),
                lambda rows: self.model.micro_batches(
                    self.data.encoded, rows, adapter=self.plan.phase.adapts
                ),
            )
        )

    def _gradient(self, groups: list[Group]) -> None:
        """Put the sample's gradient into the tensors' `grad`: clipped and noised under DP."""
        if self._clipping is None:
            plain_gradient(self.tensors.values(), groups, self._losses, self.divisor)
            return
        private_gradient(
            self.model.trained_modules(self.plan.trains),
            self._clipping,
            groups,
            self._losses,
            gradients=self.model.performance.gradients,
        )

    def _losses(self, index: Tensor) -> Tensor:
        encoded = self.data.encoded
        outputs = self.model(
            encoded, index, adapter=self.plan.phase.adapts, dropout_mask=self._dropout
        )
        targets = self.model.targets(encoded, self.data.labels, index).to(outputs.device)
        self.measured.see(index, outputs, targets)
        return self.model.objective.losses(outputs, targets)

    def _corrected(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """A tensor's gradient with the pull of FedProx, or the correction of SCAFFOLD."""
        if gradient is None:
            return None
        if mu := self.plan.phase.proximal_mu:
            # What has moved so far is made of noised sums: pulling it back costs nothing.
            return gradient + mu * (self._moved[name] + self._pulled.get(name, 0.0))
        if name in self._corrections:
            return gradient + self._corrections[name]
        return gradient


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
