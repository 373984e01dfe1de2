"""Matrix products in which a row's rounding does not depend on its place in memory."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

ALIGNED = 16  # numbers of four bytes


def pad_for_alignment(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, ..., in] and weight [..., in], filled with zeros so that each of the n begins where
    memory is aligned.

    A matrix product adds up in an order that depends on where in memory a row begins. Without
    this, leaving out one record would move the roundings of those behind it, and a server can
    choose weights under which nothing but roundings decides
    (tests/client/training/test_batch_invariance.py).
    """
    if x[0].numel() % ALIGNED == 0:
        return x, weight
    fill = -x.shape[-1] % ALIGNED
    return nn.functional.pad(x, (0, fill)), nn.functional.pad(weight, (0, fill))


def align(linear: nn.Linear) -> None:
    """Let a Linear fill up its inputs by `pad_for_alignment`."""
    linear.forward = partial(_aligned, linear)  # type: ignore[method-assign]


def _aligned(linear: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(*pad_for_alignment(x, linear.weight), linear.bias)
