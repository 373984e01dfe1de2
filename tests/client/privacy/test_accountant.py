"""Epsilon against an independent oracle (google's dp-accounting), and plans that fit exactly.

Each property has at least one mutation below that breaks the accountant on purpose; the property
must see it. What the comparisons tolerate, and why:
- At whole orders both accountants evaluate one finite sum: equal to 1e-6.
- At fractional orders the oracle bounds the RDP from above and drops orders whose series does not
  converge for it, so it may lie above ours; ours are compared with the integral that defines them.
- The oracle's PLD accountant is a bound from above too, rounded up to a grid of 1e-3: within 0.005
  of the truth here.
Exact composition is checked in tests/client/privacy/test_exact_composition.py.
"""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise, product

import dp_accounting  # type: ignore[import-untyped]
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped]
from dp_accounting.rdp import RdpAccountant  # type: ignore[import-untyped]
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis import rdp as rdp_of_opacus
from scipy.optimize import brentq
from scipy.special import log_ndtr

from silotune.client.privacy import accountant
from silotune.client.privacy.accountant import (
    ALPHAS,
    Mechanism,
    best_order,
    best_repeating_order,
    epsilon,
    epsilon_at,
    left_of,
    mechanism_of,
    merged,
    noise_for,
    plan,
    plan_epsilon,
    remaining_epsilon,
    split_delta,
)
from silotune.common.contract.contract import Contract
from silotune.common.errors import UsageError

DELTA = 1e-4
WHOLE = tuple(range(2, 64))
OPACUS = tuple(RDPAccountant.DEFAULT_ALPHAS)
History = tuple[Mechanism, ...]
Property = Callable[[Contract, pytest.MonkeyPatch], None]


def _histories(n: int, seed: int, most: int) -> list[History]:
    """Mixes of up to `most` mechanisms, with very small and very large rates among them."""
    rng = np.random.default_rng(seed)
    rates = [0.01, 0.25, 0.9, 0.9999, 1.0, 1e-4, 1e-6]
    return [
        tuple(
            Mechanism(
                float(0.8 * 10 ** rng.uniform(0, 1.5)),
                # The oracle says 0 for what moves less than delta; so one rate is not tiny.
                float(rng.choice(rates if i else rates[:-2])),
                int(rng.integers(1, 40)),
            )
            for i in range(rng.integers(1, most + 1))
        )
        for _ in range(n)
    ]


EXTREMES = tuple(
    (Mechanism(sigma, rate, steps),)
    for sigma, rate, steps in (
        (0.5, 1e-5, 1000),
        (0.8, 1e-6, 10_000),
        (0.8, 0.01, 1000),
        (5.0, 0.9999, 20),
    )
)
HISTORIES = [*EXTREMES, *_histories(8, seed=0, most=10)]
# (rounds, local steps, sampling rate, share of the budget) of each phase
PLANS = (
    [(12, 1, 0.25, 1.0)],
    [(5, 1, 0.5, 0.4), (10, 1, 0.25, 0.6)],
    [(3, 4, 1.0, 0.2), (20, 2, 0.1, 0.5), (6, 1, 0.02, 0.3)],
    [(20, 5, 0.01, 0.5), (2, 1, 0.99, 0.5)],
)


def _with_phases(contract: Contract, phases: Sequence[tuple[int, int, float, float]]) -> Contract:
    return contract.changed(
        phases=[
            {
                "trains": "head",
                "rounds": r,
                "local_steps": k,
                "sampling_rate": q,
                "budget_share": b,
                "head_lr": 1.0,
            }
            for r, k, q, b in phases
        ]
    )


@cache
def _oracle(history: History, delta: float, kind: str) -> float:
    """Epsilon by dp-accounting: "whole" or "all" orders of RDP, or "pld". Adjacency: add-remove."""
    oracle = (
        PLDAccountant(value_discretization_interval=1e-3)
        if kind == "pld"
        else RdpAccountant(orders=WHOLE if kind == "whole" else OPACUS)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for m in history:
            step = dp_accounting.PoissonSampledDpEvent(
                m.sampling_rate, dp_accounting.GaussianDpEvent(m.noise_multiplier)
            )
            oracle.compose(dp_accounting.SelfComposedDpEvent(step, m.steps))
        return float(oracle.get_epsilon(delta))


def _exact(sigma: float, steps: int, delta: float) -> float:
    """Epsilon of `steps` Gaussian steps without sampling (Balle and Wang 2018, Theorem 8)."""
    mu = math.sqrt(steps) / sigma

    def excess(e: float) -> float:
        first, second = log_ndtr(mu / 2 - e / mu), e + log_ndtr(-mu / 2 - e / mu)
        return math.exp(first) - math.exp(second) - delta

    return float(brentq(excess, 0, 200, xtol=1e-9))


# --- properties that a mutation below must break ---------------------------------------------


def each_orders_rdp_equals_its_integral(_: Contract, patch: pytest.MonkeyPatch) -> None:
    """Mironov, Talwar, Zhang 2019, section 3.3: E over N(0, s^2) of ((1-q) + q e^((2x-1)/2s^2))^a.

    By the trapezoid rule, which is exact to rounding for such a function; less the tangent
    1 + a (ratio - 1), whose mean is 1, so that small rates do not drown in it.
    """
    for sigma in (0.9, 1.5, 4.0, 30.0):
        for q in (1e-6, 1e-4, 0.01, 0.25, 0.9, 0.9999):
            for order in (1.1, 1.9, 3.3, 8.1, 10.9, 12, 32):
                x, dx = np.linspace(-13 * sigma, order + 13 * sigma, 20_001, retstep=True)
                loss = (2 * x - 1) / (2 * sigma**2)
                ratio = np.logaddexp(math.log1p(-q), math.log(q) + loss)
                density = -((x / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))
                tangent = np.exp(density) * (1 + order * q * np.expm1(loss))
                moment = np.log1p(np.sum(np.exp(density + order * ratio) - tangent) * dx)
                assert accountant._rdp_of_step(sigma, q, order) == pytest.approx(
                    moment / (order - 1), rel=1e-6, abs=1e-11
                )


def histories_cost_what_the_oracle_says(_: Contract, patch: pytest.MonkeyPatch) -> None:
    for history in HISTORIES:
        # By all orders: beyond epsilon 60 the oracle has dropped so many that it is 1 % above.
        bound = _oracle(history, DELTA, "all")
        assert 0.99 * bound <= epsilon(history, DELTA) <= bound * (1 + 1e-9)
    patch.setattr(accountant, "ALPHAS", WHOLE)
    for history in HISTORIES:
        for delta in (DELTA, 1e-5, 1e-7):
            expected = _oracle(history, delta, "whole")
            assert epsilon(history, delta) == pytest.approx(expected, rel=1e-6)


def plans_cost_the_contracts_epsilon(contract: Contract, patch: pytest.MonkeyPatch) -> None:
    """By the oracle, with steps and rates from the contract: only the noise is the plan's."""
    for phases, target in product(PLANS, (0.7, 8.0)):
        asked = _with_phases(contract, phases).changed(privacy={"epsilon": target})
        history = tuple(
            Mechanism(m.noise_multiplier, rate, rounds * steps)
            for m, (rounds, steps, rate, _) in zip(plan(asked), phases, strict=True)
        )
        assert target * (1 - 1e-4) <= plan_epsilon(history, DELTA) <= target
        assert _oracle(history, 0.9 * DELTA, "pld") == pytest.approx(target, abs=0.005)


def noise_for_costs_its_target_and_no_more(_: Contract, patch: pytest.MonkeyPatch) -> None:
    for target in (0.5, 8.0):
        for rate, steps in ((0.01, 100), (0.25, 30), (0.999, 3), (1.0, 1)):
            history = (Mechanism(noise_for(target, DELTA, rate, steps), rate, steps),)
            assert target * (1 - 1e-5) <= plan_epsilon(history, DELTA) <= target
            assert _oracle(history, 0.9 * DELTA, "pld") == pytest.approx(target, abs=0.005)


def sampling_makes_a_step_cheaper(_: Contract, patch: pytest.MonkeyPatch) -> None:
    rates = [1e-6, 1e-4, 0.01, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0]
    costs = [epsilon([Mechanism(1.5, q, 20)], DELTA) for q in rates]
    assert all(low < high for low, high in pairwise(costs))
    # At q = 1 another formula takes over, and nothing jumps.
    assert epsilon([Mechanism(1.5, 1 - 1e-9, 20)], DELTA) == pytest.approx(costs[-1], rel=1e-6)


def ten_runs_cost_far_less_than_ten(contract: Contract, patch: pytest.MonkeyPatch) -> None:
    for target, most in ((1.0, 4.0), (8.0, 32.0)):
        asked = _with_phases(contract, PLANS[0]).changed(privacy={"epsilon": target})
        run = tuple(plan(asked))
        ten = epsilon(run * 10, DELTA)
        assert _oracle(run * 10, DELTA, "pld") < ten < most
        assert epsilon(run * 11, DELTA) > ten > 2 * epsilon(run, DELTA)


def splitting_a_history_changes_nothing(_: Contract, patch: pytest.MonkeyPatch) -> None:
    whole = [Mechanism(1.3, 0.9, 10), Mechanism(2.0, 1.0, 3)]
    parts = [Mechanism(2.0, 1.0, 1)] + [Mechanism(1.3, 0.9, 1)] * 10 + [Mechanism(2.0, 1.0, 2)]
    assert epsilon(parts, DELTA) == pytest.approx(epsilon(whole, DELTA), rel=1e-12)
    assert plan_epsilon(parts, DELTA) == plan_epsilon(whole, DELTA)


def no_bound_lies_below_the_exact_value(_: Contract, patch: pytest.MonkeyPatch) -> None:
    for sigma, steps in ((0.5, 1), (2.0, 1), (2.0, 10), (5.0, 10), (20.0, 100), (300.0, 10_000)):
        for delta in (1e-3, DELTA, 1e-6):
            history, exact = [Mechanism(sigma, 1.0, steps)], _exact(sigma, steps, delta)
            assert exact < epsilon(history, delta) < 1.3 * exact + 0.1
            assert exact < plan_epsilon(history, delta) < exact + 0.07


def small_epsilons_cost_what_the_oracle_says(_: Contract, patch: pytest.MonkeyPatch) -> None:
    """The noise for an epsilon from 0.01 to 0.1: by the oracle's PLD it costs that, and RDP at the
    same whole orders is the oracle's."""
    patch.setattr(accountant, "ALPHAS", [a for a in ALPHAS if a == int(a)])
    for target, delta, rate, steps in (
        (0.01, 1e-5, 0.25, 30),
        (0.02, 1e-6, 0.1, 100),
        (0.05, 1e-5, 1.0, 24),
        (0.1, 1e-5, 0.02, 50),
    ):
        noise = noise_for(target, delta, rate, steps)
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        rdp = RdpAccountant(orders=[int(a) for a in accountant.ALPHAS])
        pld = PLDAccountant(value_discretization_interval=target / 5000)
        for oracle in (rdp, pld):
            oracle.compose(dp_accounting.SelfComposedDpEvent(step, steps))
        cost = epsilon([Mechanism(noise, rate, steps)], delta)
        assert rdp.get_epsilon(delta) == pytest.approx(cost, rel=1e-5)
        assert pld.get_epsilon(0.9 * delta) == pytest.approx(target, rel=1e-3)


PROPERTIES: dict[str, Property] = {
    f.__name__: f
    for f in (
        each_orders_rdp_equals_its_integral,
        histories_cost_what_the_oracle_says,
        plans_cost_the_contracts_epsilon,
        noise_for_costs_its_target_and_no_more,
        sampling_makes_a_step_cheaper,
        ten_runs_cost_far_less_than_ten,
        splitting_a_history_changes_nothing,
        no_bound_lies_below_the_exact_value,
        small_epsilons_cost_what_the_oracle_says,
    )
}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # the oracle warns of each order that it drops


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    """What was found is not that of a mutation, nor the other way round."""
    calibrate = accountant._calibrate
    calibrate.cache_clear()
    yield
    calibrate.cache_clear()


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str, table_contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    PROPERTIES[name](table_contract, monkeypatch)


# --- mutations: the accountant broken on purpose ---------------------------------------------

_step, _at, _merge = accountant._rdp_of_step, accountant.epsilon_at, accountant.merged
_solve, _exact_epsilon = accountant._calibrate, accountant.exact_epsilon


def sampling_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "_rdp_of_step", lambda s, q, a: _step(s, 1.0, a))


def sampling_counted_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "_rdp_of_step", lambda s, q, a: _step(s, q * q, a))


def the_variance_read_as_the_noise_multiplier(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "_rdp_of_step", lambda s, q, a: _step(s * s, q, a))


def fractional_orders_rounded_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        accountant, "_rdp_of_step", lambda s, q, a: _step(s, q, a if a < 2 else math.floor(a))
    )


def only_the_last_entry_is_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "merged", lambda history: _merge(history[-1:]))


def equal_entries_counted_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "merged", lambda history: tuple(dict.fromkeys(history)))


def a_step_too_few(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        accountant, "merged", lambda h: tuple(m._replace(steps=m.steps - 1) for m in _merge(h))
    )


def epsilons_added(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        accountant, "epsilon_at", lambda a, history, d: sum(_at(a, [m], d) for m in history)
    )


def a_fixed_delta(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "epsilon_at", lambda a, history, d: _at(a, history, 1e-3))


def noise_to_two_decimals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "_calibrate", lambda *args: round(_solve(*args), 2))


def a_plan_without_its_local_steps(patch: pytest.MonkeyPatch) -> None:
    original = plan

    def broken(contract: Contract) -> list[Mechanism]:
        short = [p.model_dump(mode="json") | {"local_steps": 1} for p in contract.phases]
        return original(contract.changed(phases=short))

    patch.setitem(globals(), "plan", broken)


def large_orders_cost_as_the_order_before(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "_rdp_of_step", lambda s, q, a: _step(s, q, a - (a > 64)))


def plans_counted_by_rdp(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "exact_epsilon", epsilon)


def plans_counted_at_the_whole_delta(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "PLAN_SHARE", 1.0)


def a_plans_epsilon_at_a_fixed_delta(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "exact_epsilon", lambda h, d: _exact_epsilon(h, 1e-3))


MUTATIONS: dict[Callable[[pytest.MonkeyPatch], None], tuple[Property, ...]] = {
    sampling_forgotten: (sampling_makes_a_step_cheaper, histories_cost_what_the_oracle_says),
    sampling_counted_twice: (histories_cost_what_the_oracle_says,),
    the_variance_read_as_the_noise_multiplier: (no_bound_lies_below_the_exact_value,),
    fractional_orders_rounded_down: (each_orders_rdp_equals_its_integral,),
    only_the_last_entry_is_read: (
        histories_cost_what_the_oracle_says,
        plans_cost_the_contracts_epsilon,
    ),
    equal_entries_counted_once: (splitting_a_history_changes_nothing,),
    a_step_too_few: (
        histories_cost_what_the_oracle_says,
        noise_for_costs_its_target_and_no_more,
        plans_cost_the_contracts_epsilon,
    ),
    epsilons_added: (
        ten_runs_cost_far_less_than_ten,
        splitting_a_history_changes_nothing,
        histories_cost_what_the_oracle_says,
    ),
    a_fixed_delta: (histories_cost_what_the_oracle_says, no_bound_lies_below_the_exact_value),
    noise_to_two_decimals: (noise_for_costs_its_target_and_no_more,),
    a_plan_without_its_local_steps: (plans_cost_the_contracts_epsilon,),
    large_orders_cost_as_the_order_before: (small_epsilons_cost_what_the_oracle_says,),
    plans_counted_by_rdp: (
        plans_cost_the_contracts_epsilon,
        small_epsilons_cost_what_the_oracle_says,
    ),
    plans_counted_at_the_whole_delta: (
        plans_cost_the_contracts_epsilon,
        noise_for_costs_its_target_and_no_more,
        no_bound_lies_below_the_exact_value,
    ),
    a_plans_epsilon_at_a_fixed_delta: (
        plans_cost_the_contracts_epsilon,
        no_bound_lies_below_the_exact_value,
    ),
}


@pytest.mark.parametrize(
    ("mutation", "seen_by"),
    [
        pytest.param(m, p, id=f"{m.__name__}-{p.__name__}")
        for m, properties in MUTATIONS.items()
        for p in properties
    ],
)
def test_a_broken_accountant_is_caught(
    mutation: Callable[[pytest.MonkeyPatch], None],
    seen_by: Property,
    table_contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        seen_by(table_contract, monkeypatch)


def test_every_property_has_a_mutation_that_it_sees() -> None:
    assert {p.__name__ for seen in MUTATIONS.values() for p in seen} == set(PROPERTIES)


# --- orders, shares and refusals -------------------------------------------------------------


def test_the_bisection_finds_the_best_of_all_orders() -> None:
    for history in HISTORIES:
        assert epsilon(history, DELTA) == min(epsilon_at(a, history, DELTA) for a in ALPHAS)


def test_the_filling_order_allows_the_most_repeats() -> None:
    plan_ = [Mechanism(3.0, 0.5, 10)]

    def repeats(order: float) -> int:
        return next(n for n in range(1, 500) if epsilon_at(order, plan_ * n, DELTA) > 12) - 1

    best = best_repeating_order(plan_, 12, DELTA)
    assert repeats(best) == max(repeats(a) for a in ALPHAS if a < 20)
    assert repeats(best) >= repeats(best_order(plan_, DELTA))


def test_no_history_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], DELTA) == 0.0
    assert epsilon([Mechanism(0.0, 0.5, 1)], DELTA) == math.inf


@given(
    log_target=st.floats(-6, -1),
    log_delta=st.floats(-9, -2.5),
    rate=st.sampled_from([0.02, 0.25, 0.9, 1.0]),
    steps=st.integers(1, 300),
)
@example(log_target=-1.0, log_delta=-5.0, rate=0.25, steps=30)
@example(log_target=-2.0, log_delta=-5.0, rate=0.25, steps=30)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_small_epsilon_is_reached_or_refused_with_one_that_is(
    log_target: float, log_delta: float, rate: float, steps: int
) -> None:
    target, delta = 10**log_target, 10**log_delta
    try:
        noise = noise_for(target, delta, rate, steps)
    except UsageError as error:
        refusal = error
    else:
        assert plan_epsilon([Mechanism(noise, rate, steps)], delta) <= target
        assert noise <= accountant.MOST_NOISE * (1 + 1e-5)
        return
    text = str(refusal)
    assert refusal.code == "E103"
    assert f"epsilon = {target:g} with delta = {delta:g} cannot be reached" in text
    advised = float(re.findall(r"to at least ([0-9.e-]+)[,.]", text)[0].removesuffix("."))
    assert target < advised
    assert noise_for(advised, delta, rate, steps) <= accountant.MOST_NOISE * (1 + 1e-5)
    if "fewer steps" in text:
        assert noise_for(target, delta, rate, 1) <= accountant.MOST_NOISE * (1 + 1e-5)


def test_a_contract_with_a_small_epsilon_has_a_plan(table_contract: Contract) -> None:
    small = table_contract.changed(privacy={"epsilon": 0.01, "delta": 1e-5})
    assert plan_epsilon(plan(small), 1e-5) == pytest.approx(0.01, rel=1e-5)
    with pytest.raises(UsageError, match=r"epsilon = 1e-05 with delta = 1e-05 cannot be reached"):
        plan(table_contract.changed(privacy={"epsilon": 1e-5, "delta": 1e-5}))


def test_a_ledger_that_counts_by_an_old_order_counts_as_before() -> None:
    """The order of a ledger's first charge stays; Opacus' orders are equal to the bit."""
    for order in OPACUS:
        rdp = rdp_of_opacus.compute_rdp(q=0.25, noise_multiplier=1.3, steps=1, orders=[order])
        assert accountant._rdp_of_step(1.3, 0.25, order) == rdp[0]


def test_beyond_opacus_orders_the_moment_is_the_same_sum() -> None:
    """At orders that Opacus can still compute, to its rounding: its moment is near 1."""
    for sigma, q, order in product((0.8, 3.0, 100.0), (1e-3, 0.25, 0.9), (64, 181, 1024)):
        theirs = rdp_of_opacus.compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=[order])[0]
        assert accountant._rdp_of_step(sigma, q, order) == pytest.approx(
            theirs, rel=1e-9, abs=1e-14
        )


def test_budget_shares_are_zcdp_shares_without_sampling(table_contract: Contract) -> None:
    contract = _with_phases(table_contract, [(10, 1, 1.0, 0.7), (4, 1, 1.0, 0.3)])
    rho = [m.steps / (2 * m.noise_multiplier**2) for m in plan(contract)]
    assert rho[0] / sum(rho) == pytest.approx(0.7)


def test_equal_phases_keep_their_own_mechanisms(table_contract: Contract) -> None:
    contract = _with_phases(table_contract, [(2, 1, 1.0, 0.5), (2, 3, 0.5, 0.5)])
    found = [mechanism_of(contract, plan(contract), r) for r in (1, 2, 3, 4)]
    assert [m.sampling_rate for m in found] == [1.0, 1.0, 0.5, 0.5]
    assert [m.steps for m in found] == [1, 1, 3, 3]
    # What the rounds are charged one by one is what the plan was made for.
    assert plan_epsilon(found, DELTA) == plan_epsilon(plan(contract), DELTA)


def test_the_orders_are_opacus_own_and_larger_ones() -> None:
    assert ALPHAS[: len(OPACUS)] == OPACUS
    assert all(low < high < 1.2 * low for low, high in pairwise(ALPHAS[len(OPACUS) - 1 :]))


@pytest.mark.parametrize("used", [0.0, 0.25, 0.5, 0.9])
def test_what_is_left_is_what_a_gaussian_mechanism_may_still_cost(used: float) -> None:
    """RDP adds up at one order: of a Gaussian mechanism that costs the whole limit there, what is
    left after the part `used` of its rho is the plan's epsilon of the mechanism with the rest."""
    whole, of_filter = noise_for(8.0, DELTA, 1.0, 1), split_delta(DELTA)[1]
    order = best_order([Mechanism(whole, 1.0, 1)], of_filter)
    limit = epsilon_at(order, [Mechanism(whole, 1.0, 1)], of_filter)
    history = [Mechanism(whole / math.sqrt(used), 1.0, 1)] if used else []
    rest = Mechanism(whole / math.sqrt(1 - used), 1.0, 1)
    assert remaining_epsilon(order, history, limit, DELTA) == pytest.approx(
        plan_epsilon([rest], DELTA), rel=1e-9
    )
    assert epsilon_at(order, [*history, rest], of_filter) == pytest.approx(limit, rel=1e-9)
    assert remaining_epsilon(order, [*history, rest], limit, DELTA) == 0


def test_a_plan_has_noise_where_a_unit_is_hardly_ever_sampled() -> None:
    """Within delta such a unit could be published whole."""
    assert noise_for(8.0, DELTA, 1e-6, 3) == pytest.approx(accountant.LEAST_NOISE)


def test_no_account_loads_torch() -> None:
    """`privacy spent` and `privacy plan` would wait for it."""
    code = (
        "import sys; from silotune.client.privacy import accountant as a\n"
        "steps = [a.Mechanism(1.3, 0.25, 4)]\n"
        "assert a.plan_epsilon(steps, 1e-4) < a.epsilon(steps, 1e-4)\n"
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_delta_is_split_and_all_of_it_is_used() -> None:
    for delta in (1e-2, 1e-5, 3.3e-9):
        of_plan, of_filter = split_delta(delta)
        assert of_plan == pytest.approx(0.9 * delta)
        assert of_plan + of_filter == pytest.approx(delta, rel=1e-12)


def test_what_is_left_of_a_plan_are_its_steps_that_were_not_taken() -> None:
    a, b = Mechanism(2.0, 0.5, 3), Mechanism(3.0, 1.0, 2)
    one = a._replace(steps=1)
    assert left_of([a, b], []) == merged([b, a])
    assert left_of([a, b], [b, one]) == (a._replace(steps=2),)
    assert left_of([a, b], [one, b, one, one]) == ()
    assert left_of([a, b], [one] * 4) is None
    assert left_of([a, b], [Mechanism(2.0, 0.25, 1)]) is None
    assert left_of([a, b], [Mechanism(2.0000001, 0.5, 1)]) is None


def test_a_plan_whose_delta_is_too_small_for_exact_composition_is_counted_by_rdp() -> None:
    sampled, whole = [Mechanism(3.0, 0.25, 10)], [Mechanism(3.0, 1.0, 10)]
    assert plan_epsilon(sampled, 1e-12) == epsilon(sampled, 0.9e-12)
    assert plan_epsilon(whole, 1e-12) == pytest.approx(_exact(3.0, 10, 0.9e-12), rel=1e-6)


def test_equal_plans_have_equal_noise_to_the_last_digit(table_contract: Contract) -> None:
    """Two workers on one ledger must name one plan."""
    contract = _with_phases(table_contract, PLANS[1])
    first = plan(contract)
    accountant._calibrate.cache_clear()
    accountant.exact_composition.epsilon.cache_clear()
    accountant.exact_composition._loss.cache_clear()
    assert plan(contract) == first
    nearly = [m._replace(noise_multiplier=m.noise_multiplier * (1 + 1e-7)) for m in first]
    other = [m._replace(noise_multiplier=m.noise_multiplier * 1.001) for m in first]
    assert accountant.are_close(nearly, first)
    assert not accountant.are_close(other, first)
    assert not accountant.are_close(first[:1], first)


@pytest.mark.parametrize(
    ("steps", "delta", "by_rdp"),
    [(300_000, 5e-10, True), (1000, 5e-10, False), (1000, 5e-11, True), (300_000, 1e-8, False)],
)
def test_many_steps_at_a_small_delta_are_counted_by_rdp(
    steps: int, delta: float, by_rdp: bool
) -> None:
    """The grid's Fourier transforms leave about 1e-16 a step: at (5, 0.01, 300,000 steps) and a
    delta of 5e-10 exact composition came out 0.004 below a composition in two stages."""
    history = [Mechanism(5.0, 0.01, steps)]
    found = accountant.exact_epsilon(history, delta)
    assert (found == accountant.epsilon(history, delta)) is by_rdp
