"""Epsilon against an independent oracle (google's dp-accounting), and plans that fit exactly."""

from __future__ import annotations

import logging
import math
import warnings

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.integrate import quad
from scipy.stats import norm

from silotune.client import accounting
from silotune.client.accounting import (
    ALPHAS,
    Mechanism,
    _rdp_of_step,
    best_order,
    epsilon,
    epsilon_at,
    filling_order,
    mechanism_of,
    plan,
    tight_epsilon,
)
from silotune.common.contract import Contract
from silotune.common.errors import UsageError


def _event(m: Mechanism) -> dp_accounting.DpEvent:
    return dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(
            m.sampling_rate, dp_accounting.GaussianDpEvent(m.noise_multiplier)
        ),
        m.steps,
    )


def _histories(n: int) -> list[list[Mechanism]]:
    rng = np.random.default_rng(0)
    return [
        [
            Mechanism(
                float(rng.uniform(0.8, 6)), float(rng.choice([0.05, 0.25, 1.0])),
                int(rng.integers(1, 40)),
            )
            for _ in range(rng.integers(1, 4))
        ]
        for _ in range(n)
    ]


@pytest.mark.parametrize("sigma", [0.9, 1.5, 4.0])
@pytest.mark.parametrize("q", [0.01, 0.25])
def test_each_orders_rdp_equals_its_integral(q: float, sigma: float) -> None:
    # Mironov, Talwar, Zhang 2019, section 3.3: E over N(0, s^2) of ((1-q) + q e^((2x-1)/2s^2))^a.
    for order in (1.1, 1.9, 3.3, 8.1, 12, 32):

        def f(x: float, a: float = order) -> float:
            ratio = np.logaddexp(math.log(1 - q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
            return math.exp(float(norm.logpdf(x, scale=sigma)) + a * float(ratio))

        value = quad(f, -40, 90, points=[0, order / 2, order], limit=2000, epsabs=0)[0]
        assert _rdp_of_step(sigma, q, order) == pytest.approx(
            math.log(value) / (order - 1), rel=1e-6
        )


@pytest.mark.parametrize("history", _histories(20))
def test_epsilon_agrees_with_the_oracles_rdp(
    history: list[Mechanism], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    oracle = RdpAccountant(orders=ALPHAS)
    for m in history:
        oracle.compose(_event(m))
    # The oracle bounds fractional orders from above and drops some; ours are exact (test above).
    expected = oracle.get_epsilon(1e-4)
    assert 0.99 * expected <= epsilon(history, 1e-4) <= expected * (1 + 1e-9)


@pytest.mark.parametrize("history", _histories(20))
def test_epsilon_equals_the_oracles_rdp_at_whole_orders(
    history: list[Mechanism], monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = list(range(2, 64))
    monkeypatch.setattr(accounting, "ALPHAS", orders)
    oracle = RdpAccountant(orders=orders)
    for m in history:
        oracle.compose(_event(m))
    assert epsilon(history, 1e-4) == pytest.approx(oracle.get_epsilon(1e-4), rel=1e-9)


@pytest.mark.parametrize("history", _histories(4))
def test_epsilon_lies_above_the_oracles_pld(history: list[Mechanism]) -> None:
    oracle = PLDAccountant()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for m in history:
            oracle.compose(_event(m))
        assert epsilon(history, 1e-4) >= oracle.get_epsilon(1e-4) - 1e-3


def test_one_gaussian_step_is_above_the_exact_value() -> None:
    # Balle and Wang 2018, Theorem 8: delta of the Gaussian mechanism at epsilon and sigma.
    eps, sigma = epsilon([Mechanism(2.0, 1.0, 1)], 1e-4), 2.0
    exact = norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * norm.cdf(
        -0.5 / sigma - eps * sigma
    )
    assert exact <= 1e-4


@pytest.mark.parametrize("history", _histories(4))
def test_the_tight_epsilon_lies_between_the_oracles_pld_and_the_rdp(
    history: list[Mechanism],
) -> None:
    oracle = PLDAccountant()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for m in history:
            oracle.compose(_event(m))
        assert oracle.get_epsilon(1e-4) - 0.01 <= tight_epsilon(history, 1e-4)
    assert tight_epsilon(history, 1e-4) <= epsilon(history, 1e-4)


@pytest.mark.parametrize("history", _histories(10))
def test_the_bisection_finds_the_best_of_all_orders(history: list[Mechanism]) -> None:
    assert epsilon(history, 1e-4) == min(epsilon_at(a, history, 1e-4) for a in ALPHAS)


def test_the_filling_order_allows_the_most_repeats() -> None:
    plan_ = [Mechanism(3.0, 0.5, 10)]

    def repeats(order: float) -> int:
        return next(n for n in range(1, 500) if epsilon_at(order, plan_ * n, 1e-4) > 12) - 1

    best = filling_order(plan_, 12, 1e-4)
    assert repeats(best) == max(repeats(a) for a in ALPHAS if a < 20)
    assert repeats(best) >= repeats(best_order(plan_, 1e-4))


def test_splitting_a_history_changes_nothing() -> None:
    whole = [Mechanism(1.3, 0.25, 10)]
    parts = [Mechanism(1.3, 0.25, 1)] * 10
    assert epsilon(parts, 1e-5) == pytest.approx(epsilon(whole, 1e-5), rel=1e-12)


def test_no_history_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], 1e-4) == 0.0
    assert epsilon([Mechanism(0.0, 0.5, 1)], 1e-4) == math.inf


@pytest.mark.parametrize("target", [0.5, 1.0, 3.0, 8.0, 20.0])
def test_a_plan_spends_its_budget_and_no_more(table_contract: Contract, target: float) -> None:
    contract = table_contract.changed(privacy={"epsilon": target})
    spent = epsilon(plan(contract), contract.privacy.delta)
    assert target * (1 - 1e-4) <= spent <= target


def test_the_plans_own_order_costs_what_the_plan_costs(table_contract: Contract) -> None:
    mechanisms, delta = plan(table_contract), table_contract.privacy.delta
    order = best_order(mechanisms, delta)
    assert epsilon_at(order, mechanisms, delta) == pytest.approx(epsilon(mechanisms, delta))
    for other in ALPHAS:
        assert epsilon_at(other, mechanisms, delta) >= epsilon(mechanisms, delta) - 1e-12


def test_an_epsilon_too_small_to_account_for_is_a_usage_error(table_contract: Contract) -> None:
    with pytest.raises(UsageError, match=r"privacy\.epsilon = 0\.01"):
        plan(table_contract.changed(privacy={"epsilon": 0.01}))


def test_budget_shares_are_zcdp_shares_without_sampling(table_contract: Contract) -> None:
    phases = [
        {"trains": "head", "rounds": r, "sampling_rate": 1.0, "budget": b, "head_rate": 1.0}
        for r, b in ((10, 0.7), (4, 0.3))
    ]
    first, second = plan(table_contract.changed(phases=phases))
    rho = [m.steps / (2 * m.noise_multiplier**2) for m in (first, second)]
    assert rho[0] / sum(rho) == pytest.approx(0.7)


def test_equal_phases_keep_their_own_mechanisms(table_contract: Contract) -> None:
    phases = [
        {"trains": "head", "rounds": 2, "sampling_rate": q, "budget": 0.5, "head_rate": 1.0,
         "local_steps": k}
        for q, k in ((1.0, 1), (0.5, 3))
    ]
    contract = table_contract.changed(phases=phases)
    found = [mechanism_of(contract, plan(contract), r) for r in (1, 2, 3, 4)]
    assert [m.sampling_rate for m in found] == [1.0, 1.0, 0.5, 0.5]
    assert [m.steps for m in found] == [1, 1, 3, 3]
    # What the rounds are charged one by one is what the plan was made for.
    assert epsilon(found, contract.privacy.delta) == pytest.approx(
        epsilon(plan(contract), contract.privacy.delta)
    )
