"""Privacy accounting: what a plan costs, and the noise that makes it cost what it may.

Adjacency: add or remove one unit. Each step is the Poisson-subsampled Gaussian mechanism
(Mironov, Talwar, Zhang 2019, arXiv 1908.10530); steps compose in Rényi DP and convert to
(epsilon, delta) by Balle et al. 2020 (arXiv 1905.09982), both as Opacus' RDP accountant has them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from opacus.accountants.analysis import rdp
from opacus.accountants.rdp import RDPAccountant

from silotune.common.contract import Contract
from silotune.common.errors import UsageError

ALPHAS = RDPAccountant.DEFAULT_ALPHAS
MOST_NOISE = 1e4  # a plan that needs more noise than this has no use


class Mechanism(NamedTuple):
    """`steps` equal steps with noise multiplier sigma and Poisson rate q."""

    noise_multiplier: float
    sampling_rate: float
    steps: int


def epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of everything in `history` together; 0 if it is empty, inf without noise.

    The best of all orders: valid for a history that was fixed beforehand, as a plan is. What stops
    a server that chooses as it goes is `epsilon_at`.
    """
    if not history:
        return 0.0
    if any(m.noise_multiplier <= 0 for m in history):
        return math.inf
    return _convert(ALPHAS, _rdp(history), delta)[0]


def epsilon_at(order: float, history: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of `history` by one Rényi order that was fixed before it began.

    As a stopping rule this is a Rényi filter (Feldman and Zrnic 2021, arXiv 2008.11193, Theorem
    4.5; Lécuyer 2021): it holds also when the server picks each step after seeing the last.
    Taking the best order of an adaptive history does not have that proof.
    """
    if not history:
        return 0.0
    return _convert([order], _rdp(history)[[ALPHAS.index(order)]], delta)[0]


def best_order(history: Sequence[Mechanism], delta: float) -> float:
    """The order at which `history` costs least."""
    return _convert(ALPHAS, _rdp(history), delta)[1]


def _rdp(history: Sequence[Mechanism]) -> NDArray[np.float64]:
    steps = [_rdp_of_step(m.noise_multiplier, m.sampling_rate) * m.steps for m in history]
    return np.asarray(sum(steps))


def _convert(
    orders: Sequence[float], total: NDArray[np.float64], delta: float
) -> tuple[float, float]:
    """(epsilon, order) by the best of `orders`."""
    with warnings.catch_warnings():
        # At the end of the list of orders the bound holds all the same; it is only less tight.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        found, order = rdp.get_privacy_spent(orders=list(orders), rdp=total, delta=delta)
    return float(found), float(order)


@lru_cache(maxsize=1024)
def _rdp_of_step(noise_multiplier: float, sampling_rate: float) -> NDArray[np.float64]:
    """The RDP of one step at each order; RDP adds up over steps."""
    return np.asarray(
        rdp.compute_rdp(
            q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=ALPHAS
        )
    )


def plan(contract: Contract) -> list[Mechanism]:
    """One Mechanism a phase, so that the whole run costs at most the contract's epsilon.

    A phase with budget share b, T steps and rate q gets sigma = s q sqrt(T / b): at q = 1 its
    part of the zCDP budget T / (2 sigma^2) is then exactly b (Bun and Steinke 2016). The one
    unknown s is found by bisection on the composed epsilon.
    """
    phases = contract.phases

    def at(s: float) -> list[Mechanism]:
        return [
            Mechanism(
                s * p.sampling_rate * math.sqrt(p.rounds * p.local_steps / p.budget),
                p.sampling_rate,
                p.rounds * p.local_steps,
            )
            for p in phases
        ]

    if contract.privacy.mode == "none":
        return [m._replace(noise_multiplier=0.0) for m in at(1.0)]
    target, delta = contract.privacy.epsilon, contract.privacy.delta
    high = 1.0
    try:
        while epsilon(at(high), delta) > target:
            high *= 2
            if min(m.noise_multiplier for m in at(high)) > MOST_NOISE:
                raise ValueError("the bound has a floor above the target")
        while epsilon(at(high / 2), delta) <= target:
            high /= 2
    except ValueError:  # a step's RDP too small to compute, or orders too few for the target
        raise UsageError(
            f"privacy.epsilon = {target:g} with delta = {delta:g} needs more noise than the "
            "accountant can account for. Raise epsilon, or plan fewer steps.",
            code="E103",
        ) from None
    low = high / 2
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon(at(middle), delta) > target else (low, middle)
    return at(high)


def mechanism_of(
    contract: Contract, mechanisms: Sequence[Mechanism], round_number: int
) -> Mechanism:
    """The mechanism of one round: its phase's noise and rate, with the steps of one round."""
    phase = contract.phase_of(round_number)
    return mechanisms[contract.phases.index(phase)]._replace(steps=phase.local_steps)
