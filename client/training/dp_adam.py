"""Adam on noised gradients: its second moment without what the noise puts into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from silotune.common.contract.training import Adam


class NoiseCorrectedAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) for gradients with independent noise of variance noise_std^2.

    The mean of squares of noised gradients exceeds that of the gradients by that variance, which
    makes plain Adam's step nearly the same for every coordinate. Here it is taken off:
    x <- x - rate m / sqrt(max(v - noise_std^2, floor^2)), m and v the bias-corrected moments (Tang,
    Shpilevskiy and Lécuyer 2024, arXiv 2312.14334, Algorithm 1). A function of noised gradients and
    public constants: no privacy cost.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], settings: Adam, *, noise_std: float
    ) -> None:
        """groups: {"params": [...], "lr": rate}; noise_std: of each coordinate of `.grad`."""
        super().__init__(groups, {"lr": 0.0})
        self.settings, self.noise_variance = settings, noise_std**2

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["t"] += 1
                state["m"].lerp_(p.grad, 1 - beta1)
                state["v"].lerp_(p.grad.square(), 1 - beta2)
                m = state["m"] / (1 - beta1 ** state["t"])
                v = state["v"] / (1 - beta2 ** state["t"]) - self.noise_variance
                p.sub_(group["lr"] * m / v.clamp(min=self.settings.floor**2).sqrt())
