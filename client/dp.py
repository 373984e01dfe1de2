"""One private gradient: per-record gradients, clipped and summed, noised by a cryptographic stream.

Guarantee of `private_gradient`: for two data sets that differ in one record, the sums of clipped
gradients differ by at most clip_norm in L2 norm over all trained tensors together, and independent
N(0, (noise_multiplier * clip_norm)^2) is added to every coordinate: the Gaussian mechanism. With
the sample drawn by Poisson sampling at the public rate, one call is one step of
client/accounting.py. The divisor is a public constant; no part of the result depends on how many
records there are or were drawn other than through that noised sum. Assumption: each entry of
`losses` is a function of its own record only (common/tasks/).

Floating point. A sum of floats depends on its order, so that one record can move it by more than
its own norm (Casacuberta, Shoemate, Vadhan and Wagaman 2022, arXiv 2207.10635). Here each clipped
gradient is rounded to whole units of 2^-30 of the clip norm, which is made smaller by what rounding
can add, and whole numbers add up exactly in float64 (up to 2^22 records). The gaps between the
numbers a float can hold tell neighbouring noised sums apart (Mironov 2012,
doi:10.1145/2382196.2382264): client/noise.py makes them far smaller than what the result shows, as
the noised sum is rounded to 2^-10 of the noise's standard deviation (post-processing).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from silotune.client.noise import NoiseSource

UNIT = -30  # binary logarithm of the unit of a sum, over what one record can add
GRAIN = -10  # the same of the grain of a noised sum, over the noise's standard deviation


def power_of_two(value: float, exponent: int) -> float:
    """The power of two at or below `value` times 2^exponent: multiplying by it is exact."""
    return math.ldexp(1.0, math.frexp(value)[1] - 1 + exponent)


def noised(total: Tensor, std: float, source: NoiseSource) -> Tensor:
    """An exact sum (float64) plus N(0, std^2) for each entry, rounded to the grain."""
    grain = power_of_two(std, GRAIN)
    noise = torch.from_numpy(source.normal(tuple(total.shape)))
    return ((total + std * noise.to(total.device)) / grain).round_() * grain


class CryptoNoiseOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DPOptimizer with an exact sum, and the noise from `NoiseSource` in float64."""

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
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        if not noise_multiplier > 0:
            raise ValueError("a private step needs a positive noise multiplier")
        self.source = source
        self.divisor = divisor

    def begin(self) -> None:
        """Start a logical batch. One that stays empty has the sum zero, and still gets noise."""
        self.zero_grad(set_to_none=True)
        for p in self.params:
            p.summed_grad = torch.zeros_like(p, dtype=torch.float64)

    def clip_and_accumulate(self) -> None:
        """Add each record's gradient, its norm over all tensors at most the clip norm, as whole
        numbers of units to `.summed_grad`."""
        unit = power_of_two(self.max_grad_norm, UNIT)
        most = self.max_grad_norm - unit * math.sqrt(sum(p.numel() for p in self.params)) / 2
        gradients = [p.grad_sample.flatten(1) for p in self.params]
        norms = torch.stack(
            [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in gradients]
        ).norm(dim=0)
        factors = (most / norms).clamp(max=1.0) / unit
        for p, gradient in zip(self.params, gradients, strict=True):
            rounded = (gradient.double() * factors[:, None]).round_()
            p.summed_grad += rounded.sum(dim=0).view_as(p)

    def add_noise(self) -> None:
        """The noised sum over the public divisor, into each `.grad`."""
        unit = power_of_two(self.max_grad_norm, UNIT)
        for p in self.params:
            total = noised(
                p.summed_grad * unit, self.noise_multiplier * self.max_grad_norm, self.source
            )
            p.grad = (total / self.divisor).to(p.dtype)
            p.summed_grad = None


@contextmanager
def expanded(linears: Iterable[nn.Linear], n: int) -> Iterator[dict[Tensor, Tensor]]:
    """Within, each Linear multiplies every one of n examples by its own (stride-0) view of its
    weight, so the gradient with respect to the view [n, ...] is the per-example gradients.

    Yields parameter -> view, the leaves to differentiate. Inputs are [n, in] or [n, T, in].
    """
    views: dict[Tensor, Tensor] = {}
    linears = list(linears)

    def view(parameter: Tensor) -> Tensor:
        views[parameter] = parameter.detach()[None].expand(n, *parameter.shape).requires_grad_()
        return views[parameter]

    def forward_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        weight = view(linear.weight)
        bias = None if linear.bias is None else view(linear.bias)

        def forward(x: Tensor) -> Tensor:
            rows = x[:, None, :] if x.dim() == 2 else x
            out = torch.matmul(rows, weight.transpose(1, 2))
            if bias is not None:
                out = out + bias[:, None, :]
            return out[:, 0, :] if x.dim() == 2 else out

        return forward

    try:
        for linear in linears:
            linear.forward = forward_of(linear)  # type: ignore[assignment, method-assign]
        yield views
    finally:
        for linear in linears:
            linear.__dict__.pop("forward", None)


def private_gradient(
    linears: Iterable[nn.Linear],
    optimizer: CryptoNoiseOptimizer,
    micro_batches: Iterable[tuple[Tensor, int]],
    losses: Callable[[Tensor], Tensor],
) -> None:
    """Leave the noised, divided sum of clipped per-record gradients in each parameter's `.grad`.

    linears: the modules that hold exactly the optimizer's parameters.
    micro_batches: row numbers and how many of the first of them count (common/model.py, Block);
    together one Poisson sample; may be empty.
    losses: index tensor -> [n] losses, each a function of its own record only.
    Raises ValueError if the modules' parameters are not the optimizer's.
    """
    linears = list(linears)
    held = {p for linear in linears for p in linear.parameters()}
    if held != set(optimizer.params):
        raise ValueError("the modules must hold exactly the parameters that are trained")
    optimizer.begin()
    for index, n in micro_batches:
        if not n:
            continue
        for parameter, gradient in finite_gradients(linears, index, losses).items():
            parameter.grad_sample = gradient[:n].to(parameter.dtype)  # type: ignore[attr-defined]
        optimizer.clip_and_accumulate()
        for parameter in held:
            parameter.grad_sample = None  # type: ignore[attr-defined]
    optimizer.add_noise()


def per_example_gradients(
    linears: Iterable[nn.Linear], index: Tensor, losses: Callable[[Tensor], Tensor]
) -> Mapping[Tensor, Tensor]:
    """parameter -> [n, *shape], row i the gradient of the loss of record index[i] alone."""
    with expanded(linears, len(index)) as views:
        gradients = torch.autograd.grad(losses(index).sum(), list(views.values()))
    return dict(zip(views, gradients, strict=True))


def finite_gradients(
    linears: Iterable[nn.Linear], index: Tensor, losses: Callable[[Tensor], Tensor]
) -> Mapping[Tensor, Tensor]:
    """`per_example_gradients`, with zero for a record whose gradient is not finite.

    A server can send weights under which certain records overflow. If one NaN spoilt the sum, the
    site's failure would tell, without any noise, that such a record was there. A record of which
    nothing is counted moves the sum by less than the clip norm, so the guarantee stands.
    """
    gradients = per_example_gradients(linears, index, losses)
    # The norm in float32: finite entries can still overflow when squared.
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    keep = torch.isfinite(norms)
    return {
        p: torch.where(keep.view(-1, *[1] * (g.dim() - 1)), g, 0.0) for p, g in gradients.items()
    }


def plain_gradient(
    parameters: Iterable[nn.Parameter],
    micro_batches: Iterable[tuple[Tensor, int]],
    losses: Callable[[Tensor], Tensor],
    divisor: float,
) -> None:
    """The same sum without clipping and noise: NO privacy, for the arms that show its price."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for index, n in micro_batches:
        if n:
            (losses(index)[:n].sum() / divisor).backward()  # type: ignore[no-untyped-call]
