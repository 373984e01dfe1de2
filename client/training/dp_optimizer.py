"""One private gradient: per-unit gradients, clipped and summed, noised by a cryptographic stream.

Guarantee of `private_gradient`: for two data sets that differ in one unit (a record, or an entity
with all its records), the sums of clipped gradients differ by at most clip_norm in L2 norm over all
trained tensors together, and independent N(0, (noise_multiplier * clip_norm)^2) is added to every
coordinate: the Gaussian mechanism. With the sample drawn by Poisson sampling at the public rate,
one call is one step of client/privacy/accountant.py. The divisor is a public constant; no part of
the result depends on how many units there are or were drawn other than through that noised sum.
Assumption: each entry of `losses` is a function of its own record only (common/tasks/).

Floating point. A sum of floats depends on its order, so that one record can move it by more than
its own norm (Casacuberta, Shoemate, Vadhan and Wagaman 2022, arXiv 2207.10635). Here each clipped
gradient is rounded to whole units of 2^-23 of the clip norm, which is made smaller by what rounding
can add, and whole numbers add up exactly in float64 (up to 2^28 units). Before that, a unit's own
gradient must not depend by as much as a rounding on which others are there: blocks of fixed shape
(common/models/base.py), products over aligned rows (common/models/aligned_linear.py), an entity's
rows added one by one; client/training/selftest.py refuses a machine on which it does. The gaps
between the numbers a float can hold tell neighbouring noised sums apart (Mironov 2012,
doi:10.1145/2382196.2382264): client/training/noise.py makes them far smaller than what the result
shows, as the noised sum is rounded to 2^-10 of the noise's standard deviation (post-processing).

With gradients = "ghost" (common/contract/compute.py) no single gradient is ever there to be
measured: the bound above then rests on float32 products being what they should be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from opacus import optimizers
from torch import Tensor, nn

from silotune.client.training.noise import NoiseSource
from silotune.client.training.per_sample_gradients import PER_EXAMPLE, Losses, ghost_sum
from silotune.client.training.privacy_units import Group, UnitBatch

QUANTUM_LOG2 = -23  # binary logarithm of the unit of a sum, over what one unit of privacy can add
# Binary logarithm of what a noised sum is rounded to, over the noise's standard deviation.
NOISE_ROUNDING_LOG2 = -10
SLACK = 2.0**-20  # of the clip norm: more than float32 can add when a gradient is scaled
GHOST_SLACK = 1e-3  # the same for Opacus' ghost norms, where it is a guess


def power_of_two(value: float, exponent: int) -> float:
    """The power of two at or below `value` times 2^exponent: multiplying by it is exact."""
    return math.ldexp(1.0, math.frexp(value)[1] - 1 + exponent)


def add_gaussian_noise(total: Tensor, std: float, source: NoiseSource) -> Tensor:
    """An exact sum (float64) plus N(0, std^2) for each entry, rounded to the grain."""
    grain = power_of_two(std, NOISE_ROUNDING_LOG2)
    noise = torch.from_numpy(source.normal(tuple(total.shape)))
    return ((total + std * noise.to(total.device)) / grain).round_() * grain


class ClippingOptimizer(optimizers.DPOptimizer):  # type: ignore[misc]
    """Opacus' DPOptimizer with an exact sum of clipped gradients and no noise: NO privacy. It is
    for variants that show what the noise costs.

    Args:
        optimizer: The optimizer that takes the gradients.
        clip_norm: The largest norm of a unit's gradient.
        divisor: What the sum is divided by: public, the expected size of a batch.

    Attributes:
        units: How many units this batch had. It is private.
        unclipped: How many of them had a norm within the clip norm. It is private.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        divisor: float,
        noise_multiplier: float = 0.0,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self.divisor = divisor
        self.units = self.unclipped = 0

    def begin(self) -> None:
        """Start a logical batch. One that stays empty has the sum zero, and still gets noise."""
        self.zero_grad(set_to_none=True)
        self.units = self.unclipped = 0
        for p in self.params:
            p.summed_grad = torch.zeros_like(p, dtype=torch.float64)

    @property
    def unit(self) -> float:
        """What `.summed_grad` counts."""
        return power_of_two(self.max_grad_norm, QUANTUM_LOG2)

    @property
    def effective_clip_norm(self) -> float:
        """The norm to clip to: what scaling and rounding can add still fits below the clip norm."""
        rounding = self.unit * math.sqrt(sum(p.numel() for p in self.params)) / 2
        return float(self.max_grad_norm * (1 - SLACK) - rounding)

    def clip_and_accumulate(self) -> None:
        """Add each unit's gradient, its norm over all tensors at most the clip norm, as whole
        numbers of `unit` to `.summed_grad`. Overwrites `.grad_sample` [units, ...] (float32).

        A unit whose gradient is not finite counts as zero. A server can send weights under which
        certain records overflow; if one NaN spoilt the sum, the site's failure would tell, without
        any noise, that such a record was there.
        """
        gradients = [p.grad_sample.flatten(1).contiguous() for p in self.params]
        norms = torch.stack(
            [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in gradients]
        ).norm(dim=0)
        finite = torch.isfinite(norms)
        factors = torch.where(
            finite, (self.effective_clip_norm / norms).clamp(max=1.0) / self.unit, 0.0
        ).float()
        spoilt = not finite.all()  # asked once: on a GPU each answer waits for all before it
        for p, gradient in zip(self.params, gradients, strict=True):
            if spoilt:
                gradient[~finite] = 0.0
            whole = gradient.mul_(factors[:, None]).round_()
            p.summed_grad += whole.sum(dim=0, dtype=torch.float64).view_as(p)
        self.count(torch.where(finite, norms, math.inf))

    def count(self, norms: Tensor) -> None:
        self.units += len(norms)
        self.unclipped += len(norms) - int((norms > self.max_grad_norm).sum())

    def add_noise(self) -> None:
        """The sum over the public divisor, into each `.grad`, as it is."""
        for p in self.params:
            p.grad = (p.summed_grad * self.unit / self.divisor).to(p.dtype)
            p.summed_grad = None


class DPOptimizer(ClippingOptimizer):
    """Opacus' DPOptimizer with an exact sum, and the noise from `NoiseSource` in float64.

    Args:
        optimizer: The optimizer that takes the noised gradients.
        source: Where the noise comes from.
        noise_multiplier: The standard deviation of a step's noise in clip norms.
        clip_norm: The largest norm of a unit's gradient.
        divisor: What the noised sum is divided by: public, the expected size of a batch.

    Attributes:
        units: How many units this batch had. It is private.
        unclipped: How many of them had a norm within the clip norm. It is private.

    Raises:
        ValueError: If the noise multiplier is not positive.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        source: NoiseSource,
        noise_multiplier: float,
        clip_norm: float,
        divisor: float,
    ) -> None:
        super().__init__(
            optimizer, clip_norm=clip_norm, divisor=divisor, noise_multiplier=noise_multiplier
        )
        if not noise_multiplier > 0:
            raise ValueError("a private step needs a positive noise multiplier")
        self.source = source

    def add_noise(self) -> None:
        """The noised sum over the public divisor, into each `.grad`."""
        for p in self.params:
            total = add_gaussian_noise(
                p.summed_grad * self.unit, self.noise_multiplier * self.max_grad_norm, self.source
            )
            p.grad = (total / self.divisor).to(p.dtype)
            p.summed_grad = None


def private_gradient(
    modules: Iterable[nn.Module],
    optimizer: ClippingOptimizer,
    groups: Iterable[Group],
    losses: Losses,
    *,
    gradients: str = "expanded",
) -> None:
    """Leave the noised, divided sum of clipped per-unit gradients in each parameter's `.grad`; it
    is private if the optimizer is a DPOptimizer, which adds noise.

    modules: those that hold exactly the optimizer's parameters.
    groups: together one Poisson sample (client/training/privacy_units.py); may be none.
    losses: row numbers [n] -> [n] losses, each a function of its own record only; called once a
    part, in order.
    gradients: see common/contract/compute.py. Raises ValueError if the modules' parameters are not
    the optimizer's, or for ghost clipping of entities.
    """
    modules = list(modules)
    held = {p for module in modules for p in module.parameters(recurse=False)}
    if held != set(optimizer.params):
        raise ValueError("the modules must hold exactly the parameters that are trained")
    optimizer.begin()
    try:
        _accumulate(modules, optimizer, groups, losses, gradients)
        optimizer.add_noise()
    finally:  # a sum without noise must not outlive the step
        for p in held:
            p.grad_sample = p.summed_grad = None  # type: ignore[attr-defined]


def _accumulate(
    modules: list[nn.Module],
    optimizer: ClippingOptimizer,
    groups: Iterable[Group],
    losses: Losses,
    gradients: str,
) -> None:
    for units, parts in groups:
        if gradients == "ghost":
            for part in parts:
                _add_ghost(modules, optimizer, part, losses)
            continue
        of_units: dict[Tensor, Tensor] = {}
        for rows, n, owners, weights in parts:
            found = PER_EXAMPLE[gradients](modules, rows, losses)
            for p, gradient in found.items():
                own = gradient[:n].float()
                if owners is None or weights is None:
                    of_units[p] = own
                    continue
                total = of_units.setdefault(p, own.new_zeros(units, *p.shape))
                # One after the other: index_add_ takes them in any order on a GPU.
                for unit, weight, one in zip(owners.tolist(), weights.tolist(), own, strict=True):
                    total[unit].add_(one, alpha=weight)
        for p in optimizer.params:
            p.grad_sample = of_units[p]
        optimizer.clip_and_accumulate()


def _add_ghost(
    modules: list[nn.Module], optimizer: ClippingOptimizer, part: UnitBatch, losses: Losses
) -> None:
    if part.owners is not None:
        raise ValueError("ghost clipping has no gradient of an entity")
    norms, sums = ghost_sum(
        modules, part.rows, part.n, losses, optimizer.max_grad_norm * (1 - GHOST_SLACK)
    )
    for p, total in sums.items():
        p.summed_grad += (total.double() / optimizer.unit).round_()  # type: ignore[attr-defined]
    optimizer.count(norms)


def plain_gradient(
    parameters: Iterable[nn.Parameter], groups: Iterable[Group], losses: Losses, divisor: float
) -> None:
    """The same sum without clipping and noise: NO privacy, for the variants that show its price."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for group in groups:
        for rows, n, _, weights in group.parts:
            values = losses(rows)[:n]
            if weights is not None:
                values = values * weights.to(values.device)
            (values.sum() / divisor).backward()  # type: ignore[no-untyped-call]
