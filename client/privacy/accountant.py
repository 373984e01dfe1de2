"""Privacy accounting: what a plan costs, and the noise that makes it cost what it may.

Adjacency: add or remove one unit. Each step is the Poisson-subsampled Gaussian mechanism. There are
two accounts. A run's steps are fixed by its contract, so a plan is counted by exact composition
(`plan_epsilon`; client/privacy/exact_composition.py). What is chosen as it goes, run after run, is
counted in Rényi DP (Mironov, Talwar, Zhang 2019, arXiv 1908.10530), which converts to
(epsilon, delta) by Balle et al. 2020 (arXiv 1905.09982), both as Opacus' RDP accountant has them.
Delta is split between the two (`split_delta`); why: client/privacy/budget.py.

At order a the conversion alone adds about log(1 / delta) / (a - 1), whatever the noise. So a small
epsilon needs large orders: ALPHAS goes on beyond Opacus' last order, 63, in steps of a fourth of an
octave, which costs at most 0.4 % of epsilon beside all orders in between.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp

from silotune.client.privacy import exact_composition
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Target
from silotune.common.errors import ErrorCode, UsageError

ALPHAS = (
    *(1 + x / 10 for x in range(1, 100)),
    *range(12, 64),  # Opacus' own
    *(round(2 ** (x / 4)) for x in range(24, 53)),  # 64 to 8192
)
LAST_OF_OPACUS = 63  # its binomial coefficients overflow from order 1030 on
MOST_NOISE = 1e4  # a plan that needs more noise than this has no use
LEAST_NOISE = 0.1  # where a unit is sampled with a probability below delta, none would be needed
EXACT, RDP = "exact composition", "RDP"  # the names of the two accounts
PLAN_SHARE = 0.9  # of delta; more for the filter would make each plan noisier, less the second one


class Mechanism(NamedTuple):
    """`steps` equal steps with noise multiplier sigma and Poisson rate q."""

    noise_multiplier: float
    sampling_rate: float
    steps: int


def split_delta(delta: float) -> tuple[float, float]:
    """What of `delta` a plan is counted at by exact composition, and what the filter of all that is
    beyond one plan is."""
    return PLAN_SHARE * delta, (1 - PLAN_SHARE) * delta


def plan_epsilon(steps: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of steps of one plan by exact composition, as contracts and reports state it.

    Args:
        steps: Some or all of the steps of a plan that was fixed beforehand.
        delta: What goes with it for a run or a lifetime; the plan is counted at its part of it.

    Returns:
        Epsilon; 0 without steps, inf without noise.
    """
    return exact_epsilon(steps, split_delta(delta)[0])


def exact_epsilon(steps: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of a fixed set of steps by exact composition; where delta is too small for it, by
    RDP, which bounds that from above."""
    if not steps:
        return 0.0
    if any(m.noise_multiplier <= 0 for m in steps) or not 0 < delta < 1:
        return math.inf
    if delta < exact_composition.least_delta(steps):
        return epsilon(steps, delta)
    value = exact_composition.epsilon(merged(steps), delta)
    return math.inf if math.isnan(value) else value


def epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of everything in `history` together by RDP; 0 if it is empty, inf without noise.

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
    """Epsilon of the largest further plan that the filter lets pass after `history`.

    Taken for a Gaussian mechanism without sampling, whose RDP at order a is a rho; sampled plans of
    the same epsilon cost about as much at the orders that matter here.
    """
    if any(m.noise_multiplier <= 0 for m in history):
        return 0.0
    left = epsilon_ - _rdp_conversion_term(order, split_delta(delta)[1]) - _rdp_at(order, history)
    rho = left / order
    return plan_epsilon([Mechanism(math.sqrt(0.5 / rho), 1.0, 1)], delta) if rho > 1e-9 else 0.0


def merged(history: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """Equal steps as one Mechanism, sorted: the same for the same set of steps in any order."""
    kinds = _count(history)
    return tuple(sorted(Mechanism(sigma, q, n) for (sigma, q), n in kinds.items()))


def left_of(plan: Sequence[Mechanism], taken: Sequence[Mechanism]) -> tuple[Mechanism, ...] | None:
    """The steps of `plan` that are not in `taken`; None if a step of `taken` is none of the plan's,
    or one more than it has."""
    left = _count(plan)
    left.subtract(_count(taken))
    if any(n < 0 for n in left.values()):
        return None
    return tuple(Mechanism(sigma, q, n) for (sigma, q), n in left.items() if n)


def _count(history: Sequence[Mechanism]) -> Counter[tuple[float, float]]:
    """The number of steps of each noise multiplier and rate."""
    steps: Counter[tuple[float, float]] = Counter()
    for m in history:
        steps[m.noise_multiplier, m.sampling_rate] += m.steps
    return steps


def _rdp_at(order: float, history: Sequence[Mechanism]) -> float:
    return sum(
        _rdp_of_step(m.noise_multiplier, m.sampling_rate, order) * m.steps for m in merged(history)
    )


def _rdp_conversion_term(order: float, delta: float) -> float:
    """What the conversion from RDP at `order` adds to epsilon (Balle et al. 2020, Theorem 21)."""
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


@lru_cache(maxsize=1 << 16)
def _rdp_of_step(noise_multiplier: float, sampling_rate: float, order: float) -> float:
    """The RDP of one step; RDP adds up over steps."""
    if order > LAST_OF_OPACUS and order == int(order) and sampling_rate < 1:
        return _rdp_at_whole_order(noise_multiplier, sampling_rate, int(order))
    found = _rdp_of_opacus().compute_rdp(
        q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=[order]
    )
    return float(found[0])


@cache
def _rdp_of_opacus() -> Any:
    """Opacus' module for the RDP of a step, by itself: importing its package loads torch, for which
    `privacy spent` would wait seconds."""
    package = importlib.util.find_spec("opacus")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "accountants", "analysis", "rdp.py")
    spec = importlib.util.spec_from_file_location("opacus_rdp", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    found by the epsilon of exact composition (`plan_epsilon`).
    """
    p = contract.privacy
    found: list[Mechanism] = []
    for phase in contract.phases:
        steps = phase.rounds * phase.local_steps
        sigma = phase.sampling_rate * math.sqrt(steps / phase.budget_share)
        if phase.noise_decay is None:
            found.append(Mechanism(sigma, phase.sampling_rate, steps))
            continue
        decay = [phase.noise_decay**k for k in range(phase.rounds)]
        scale = math.sqrt(sum(d**-2 for d in decay) / phase.rounds)
        found += [
            Mechanism(sigma * d * scale, phase.sampling_rate, phase.local_steps) for d in decay
        ]
    if p.mode == "none":
        return scaled(found, 0.0)
    return scaled(found, _calibrate(tuple(found), *(target or Target(p.epsilon, p.delta))))


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
    if len(mechanisms) == 1:
        return [1.0]
    order = best_order(mechanisms, delta)
    parts = [_rdp_at(order, [m]) for m in mechanisms]
    return [part / sum(parts) for part in parts]


def noise_for(epsilon_: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier by which `steps` steps cost at most (epsilon, delta)."""
    return _calibrate((Mechanism(1.0, sampling_rate, steps),), epsilon_, delta)


def scaled(mechanisms: Sequence[Mechanism], factor: float) -> list[Mechanism]:
    """The same steps with `factor` times the noise."""
    return [m._replace(noise_multiplier=factor * m.noise_multiplier) for m in mechanisms]


@lru_cache(maxsize=1 << 10)
def _calibrate(mechanisms: tuple[Mechanism, ...], target: float, delta: float) -> float:
    """The smallest factor of all noise multipliers, to 1e-6, by which the plan costs at most
    `target` at `delta` and has noise of at least LEAST_NOISE.

    Raises:
        UsageError: E103, if a plan whose smallest noise multiplier is MOST_NOISE costs more.
    """

    def cost(factor: float) -> float:
        return plan_epsilon(scaled(mechanisms, factor), delta)

    smallest = min(m.noise_multiplier for m in mechanisms)
    least, most = LEAST_NOISE / smallest, MOST_NOISE / smallest
    low = high = min(max(_likely_factor(mechanisms, target, delta), least), most)
    width = 1.02
    while cost(high) > target:
        if high == most:
            raise _unreachable(mechanisms, target, delta)
        low, high, width = high, min(high * width, most), width**2
    while cost(low) <= target:
        if low == least:
            return low
        low, high, width = max(low / width, least), low, width**2

    def excess(log_factor: float) -> float:
        return math.log(max(cost(math.exp(log_factor)) / target, 1e-3))

    found = math.exp(brentq(excess, math.log(low), math.log(high), xtol=1e-7))
    while cost(found) > target:  # by the last digit
        found *= 1 + 1e-7
    return min(found, high)


def _likely_factor(mechanisms: Sequence[Mechanism], target: float, delta: float) -> float:
    """About what `_calibrate` finds: as if the privacy loss were Gaussian."""
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian

    sigma = get_sigma_gaussian(target, split_delta(delta)[0])

    def excess(log_factor: float) -> float:
        found = exact_composition.loss_variance(scaled(mechanisms, math.exp(log_factor)))
        return math.log(found * sigma**2)

    return math.exp(brentq(excess, -30, 30))


def _unreachable(mechanisms: Sequence[Mechanism], target: float, delta: float) -> UsageError:
    """That a plan costs more than `target` with any noise."""
    most = scaled(mechanisms, MOST_NOISE / min(m.noise_multiplier for m in mechanisms))
    least = _rounded_up(plan_epsilon(most, delta))
    fewer = [most[0]._replace(steps=1)]
    return UsageError(
        f"epsilon = {target:g} with delta = {delta:g} cannot be reached: with a noise "
        f"multiplier of {MOST_NOISE:,.0f}, the largest that is accounted for, this plan costs "
        f"{least:g}. Set epsilon to at least {least:g}"
        + (", or plan fewer steps." if plan_epsilon(fewer, delta) <= target else "."),
        code=ErrorCode.CONFIG_INVALID,
    )


def _rounded_up(value: float) -> float:
    """The next number with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit


def are_close(one: Sequence[Mechanism], other: Sequence[Mechanism]) -> bool:
    """Whether two plans are the same but for the last digits of their noise."""
    return [m[1:] for m in one] == [m[1:] for m in other] and all(
        math.isclose(a.noise_multiplier, b.noise_multiplier, rel_tol=1e-5)
        for a, b in zip(one, other, strict=True)
    )


def mechanism_of(
    contract: Contract, mechanisms: Sequence[Mechanism], round_number: int
) -> Mechanism:
    """The one of a round in `by_round`. ValueError for a round that is not in the plan."""
    rounds = by_round(contract, mechanisms)
    if not 1 <= round_number <= len(rounds):
        raise ValueError(f"round {round_number} is not in the plan of {len(rounds)} rounds")
    return rounds[round_number - 1]


def by_round(contract: Contract, mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    """The mechanism of each round of a plan: its noise and rate, with the steps of one round."""
    found: list[Mechanism] = []
    parts = iter(mechanisms)
    part = next(parts)
    for phase in contract.phases:
        for _ in range(phase.rounds):
            if not part.steps:
                part = next(parts)
            found.append(part._replace(steps=phase.local_steps))
            part = part._replace(steps=part.steps - phase.local_steps)
    return found


def rounds_in(contract: Contract, mechanisms: Sequence[Mechanism]) -> int:
    """How many whole rounds the beginning of a plan is long."""
    steps, rounds = sum(mechanism.steps for mechanism in mechanisms), 0
    while rounds < contract.rounds and steps >= contract.round_plan(rounds + 1).phase.local_steps:
        rounds += 1
        steps -= contract.round_plan(rounds).phase.local_steps
    return rounds
