"""Privacy accounting: what a plan costs, and the noise that makes it cost what it may.

Adjacency: add or remove one unit. Each step is the Poisson-subsampled Gaussian mechanism
(Mironov, Talwar, Zhang 2019, arXiv 1908.10530); steps compose in Rényi DP and convert to
(epsilon, delta) by Balle et al. 2020 (arXiv 1905.09982), both as Opacus' RDP accountant has them.

At order a the conversion alone adds about log(1 / delta) / (a - 1), whatever the noise. So a small
epsilon needs large orders: ALPHAS goes on beyond Opacus' last order, 63, in steps of a fourth of an
octave, which costs at most 0.4 % of epsilon beside all orders in between.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, logsumexp

from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Target
from silotune.common.errors import UsageError

ALPHAS = (
    *(1 + x / 10 for x in range(1, 100)),
    *range(12, 64),  # Opacus' own
    *(round(2 ** (x / 4)) for x in range(24, 53)),  # 64 to 8192
)
LAST_OF_OPACUS = 63  # its binomial coefficients overflow from order 1030 on
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
    return epsilon_at(best_order(history, delta), history, delta)


def epsilon_at(order: float, history: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of `history` by one Rényi order that was fixed before it began.

    As a stopping rule this is a Rényi filter (Feldman and Zrnic 2021, arXiv 2008.11193, Theorem
    4.5; Lécuyer 2021): it holds also when the server picks each step after seeing the last.
    Taking the best order of an adaptive history does not have that proof.
    """
    if not history:
        return 0.0
    if any(m.noise_multiplier <= 0 for m in history):
        return math.inf
    value = _rdp_conversion_term(order, delta) + _rdp_at(order, history)
    return math.inf if math.isnan(value) else max(0.0, value)


def best_order(history: Sequence[Mechanism], delta: float) -> float:
    """The order at which `history` costs least.

    Found by bisection: with x = order - 1 the cost is (convex function of x) / x, as x times the
    RDP is a cumulant generating function, so along the orders it falls and then rises.
    """
    low, high = 0, len(ALPHAS) - 1
    while low < high:
        middle = (low + high) // 2
        here, after = (epsilon_at(ALPHAS[i], history, delta) for i in (middle, middle + 1))
        low, high = (middle + 1, high) if after < here else (low, middle)
    return float(ALPHAS[low])


def best_repeating_order(plan: Sequence[Mechanism], epsilon: float, delta: float) -> float:
    """The order by which `plan` can be repeated most often within (epsilon, delta)."""

    def repeats(order: float) -> float:
        return (epsilon - _rdp_conversion_term(order, delta)) / _rdp_at(order, plan)

    return float(max(ALPHAS, key=repeats))


def remaining_epsilon(
    order: float, history: Sequence[Mechanism], epsilon_: float, delta: float
) -> float:
    """Epsilon of the largest further plan that fits with `history` within (epsilon_, delta).

    Taken for a Gaussian mechanism without sampling, whose RDP at order a is a rho; sampled plans of
    the same epsilon cost about as much at the orders that matter here.
    """
    if any(m.noise_multiplier <= 0 for m in history):
        return 0.0
    rho = (epsilon_ - _rdp_conversion_term(order, delta) - _rdp_at(order, history)) / order
    return epsilon([Mechanism(math.sqrt(0.5 / rho), 1.0, 1)], delta) if rho > 1e-9 else 0.0


def tight_epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """Epsilon by numerical composition of privacy loss variables (Gopi, Lee, Wutschitz 2021,
    arXiv 2106.02848; Opacus' PRV accountant, its upper bound): for reports, never for stopping.

    Below a delta of 1e-8 its rounding can carry it below the truth; there, and wherever RDP says
    less, this is the RDP bound.
    """
    if not history:
        return 0.0
    bound = epsilon(history, delta)
    if math.isinf(bound) or delta < 1e-8:
        return bound
    from opacus.accountants import PRVAccountant  # loads torch: commands that account nothing wait

    accountant = PRVAccountant()
    accountant.history = list(_merged(history))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return min(float(accountant.get_epsilon(delta)), bound)


def _merged(history: Sequence[Mechanism]) -> list[Mechanism]:
    """Equal steps as one Mechanism."""
    steps: Counter[tuple[float, float]] = Counter()
    for m in history:
        steps[m.noise_multiplier, m.sampling_rate] += m.steps
    return [Mechanism(sigma, q, n) for (sigma, q), n in steps.items()]


def _rdp_at(order: float, history: Sequence[Mechanism]) -> float:
    return sum(
        _rdp_of_step(m.noise_multiplier, m.sampling_rate, order) * m.steps for m in _merged(history)
    )


def _rdp_conversion_term(order: float, delta: float) -> float:
    """What the conversion from RDP at `order` adds to epsilon (Balle et al. 2020, Theorem 21)."""
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


@lru_cache(maxsize=1 << 16)
def _rdp_of_step(noise_multiplier: float, sampling_rate: float, order: float) -> float:
    """The RDP of one step; RDP adds up over steps."""
    if order > LAST_OF_OPACUS and order == int(order) and sampling_rate < 1:
        return _rdp_at_whole_order(noise_multiplier, sampling_rate, int(order))
    from opacus.accountants.analysis import rdp

    return float(
        rdp.compute_rdp(
            q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=[order]
        )[0]
    )


def _rdp_at_whole_order(sigma: float, q: float, order: int) -> float:
    """The RDP of one step at a whole order and a rate below 1 (Mironov et al. 2019, section 3.3):
    log(sum over k of binom(order, k) (1 - q)^(order - k) q^k exp(k (k - 1) / (2 sigma^2))) over
    order - 1. The binomial weights add up to 1, which is taken off each term (the first two are
    then 0) and added to the sum, so that a moment close to 1 keeps its digits.
    """
    k = np.arange(2, order + 1, dtype=np.float64)
    log_weight = (
        gammaln(order + 1)
        - gammaln(k + 1)
        - gammaln(order - k + 1)
        + k * math.log(q)
        + (order - k) * math.log1p(-q)
    )
    exponent = k * (k - 1) / (2 * sigma**2)
    excess = logsumexp(log_weight + exponent + np.log(-np.expm1(-exponent)))
    return float(np.logaddexp(0.0, excess)) / (order - 1)


def plan(contract: Contract, target: Target | None = None) -> list[Mechanism]:
    """Mechanisms in order of the rounds, so that the whole run costs at most `target`, or what
    [privacy] says. One a phase; where the noise decays, one a round.

    A phase with budget b, T steps and rate q gets sigma = s q sqrt(T / b): at q = 1 its part of
    the zCDP budget T / (2 sigma^2) is then exactly b (Bun and Steinke 2016). Beside one with a much
    larger rate, a phase whose sigma falls below about 1 takes more than b: `shares` says how much.
    Decaying noise is scaled so that the sum of 1 / sigma^2 stays the same. The one unknown s is
    found by bisection on the composed epsilon.
    """
    p = contract.privacy
    epsilon_, delta = target or Target(p.epsilon, p.delta)

    def at(s: float) -> list[Mechanism]:
        found: list[Mechanism] = []
        for phase in contract.phases:
            steps = phase.rounds * phase.local_steps
            sigma = s * phase.sampling_rate * math.sqrt(steps / phase.budget_share)
            if phase.noise_decay is None:
                found.append(Mechanism(sigma, phase.sampling_rate, steps))
                continue
            decay = [phase.noise_decay**k for k in range(phase.rounds)]
            scale = math.sqrt(sum(d**-2 for d in decay) / phase.rounds)
            found += [
                Mechanism(sigma * d * scale, phase.sampling_rate, phase.local_steps) for d in decay
            ]
        return found

    if p.mode == "none":
        return [m._replace(noise_multiplier=0.0) for m in at(1.0)]
    return at(_calibrate(at, epsilon_, delta))


def inverse_variance_weights(contract: Contract) -> dict[str, float]:
    """The public weights under which the mean's noise is least: site i's noise has the standard
    deviation s_i (of `plan`, alike for all phases), the mean's variance is sum w_i^2 s_i^2 over
    (sum w_i)^2, and by Cauchy and Schwarz that is least where w_i is proportional to 1 / s_i^2. The
    largest is 1. Sites that allow less ε then count for less: what is quiet is not what is fair.
    """
    noise = {
        site.name: plan(contract, contract.target_of(site.name))[0].noise_multiplier
        for site in contract.sites
    }
    least = min(noise.values())
    return {name: (least / s) ** 2 if s else 1.0 for name, s in noise.items()}


def shares(mechanisms: Sequence[Mechanism], delta: float) -> list[float]:
    """What part of a plan's Rényi divergence each mechanism takes, at the plan's best order."""
    order = best_order(mechanisms, delta)
    parts = [_rdp_at(order, [m]) for m in mechanisms]
    return [part / sum(parts) for part in parts]


def noise_for(epsilon_: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier by which `steps` steps cost at most (epsilon, delta)."""

    def at(s: float) -> list[Mechanism]:
        return [Mechanism(s, sampling_rate, steps)]

    return _calibrate(at, epsilon_, delta)


def _calibrate(at: Callable[[float], list[Mechanism]], target: float, delta: float) -> float:
    """The smallest s, to 1e-6, with epsilon(at(s)) <= target.

    Args:
        at: The plan whose noise multipliers are s times those of `at(1.0)`.
        target: The largest epsilon of the plan, at `delta`.

    Raises:
        UsageError: E103, if a plan whose smallest noise multiplier is MOST_NOISE costs more.
    """
    scale = MOST_NOISE / min(m.noise_multiplier for m in at(1.0))
    least = epsilon(at(scale), delta)
    if least > target:
        fewer = [m._replace(steps=1) for m in at(scale)[:1]]
        raise UsageError(
            f"epsilon = {target:g} with delta = {delta:g} cannot be reached: with a noise "
            f"multiplier of {MOST_NOISE:,.0f}, the largest that is accounted for, this plan costs "
            f"{_rounded_up(least):g}. Set epsilon to at least {_rounded_up(least):g}"
            + (", or plan fewer steps." if epsilon(fewer, delta) <= target else "."),
            code="E103",
        )
    high = 1.0
    while epsilon(at(high), delta) > target:
        high *= 2
    while epsilon(at(high / 2), delta) <= target:
        high /= 2
    low = high / 2
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon(at(middle), delta) > target else (low, middle)
    return high


def _rounded_up(value: float) -> float:
    """The next number with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit


def mechanism_of(
    contract: Contract, mechanisms: Sequence[Mechanism], round_number: int
) -> Mechanism:
    """The mechanism of one round of a plan: its noise and rate, with the steps of one round."""
    steps = contract.round_plan(round_number).phase.local_steps
    before = sum(contract.round_plan(n).phase.local_steps for n in range(1, round_number))
    for mechanism in mechanisms:
        if before < mechanism.steps:
            return mechanism._replace(steps=steps)
        before -= mechanism.steps
    raise ValueError(f"the plan ends before round {round_number}")


def rounds_in(contract: Contract, mechanisms: Sequence[Mechanism]) -> int:
    """How many whole rounds the beginning of a plan is long."""
    steps, rounds = sum(mechanism.steps for mechanism in mechanisms), 0
    while rounds < contract.rounds and steps >= contract.round_plan(rounds + 1).phase.local_steps:
        rounds += 1
        steps -= contract.round_plan(rounds).phase.local_steps
    return rounds
