"""The ledger's arithmetic against an oracle, record by record, over files that overlap.

The charges of most of these tests name no plan: the filter counts them, at a tenth of delta.
tests/client/privacy/test_budget_plans.py has those of plans.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from silotune.client.privacy import accountant as accounting
from silotune.client.privacy.accountant import EXACT, RDP, Mechanism
from silotune.client.privacy.budget import (
    Budget,
    ChargeHistory,
    Cost,
    Limit,
    mechanism_of,
    order_of,
)
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.records.record_ids import RecordSet
from silotune.common.errors import RefusalError

DELTA = 1e-5
OF_FILTER = accounting.split_delta(DELTA)[1]
RUNS = 60


def event(m: Mechanism) -> dp_accounting.DpEvent:
    sampled = dp_accounting.PoissonSampledDpEvent(
        m.sampling_rate, dp_accounting.GaussianDpEvent(m.noise_multiplier)
    )
    return dp_accounting.SelfComposedDpEvent(sampled, m.steps)


def oracle(history: Sequence[Mechanism], orders: Sequence[float], delta: float) -> float:
    accountant = RdpAccountant(list(orders))
    for m in history:
        accountant.compose(event(m))
    return float(accountant.get_epsilon(delta))


def tight_oracle(history: Sequence[Mechanism], delta: float) -> float:
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for m in history:
        accountant.compose(event(m))
    return float(accountant.get_epsilon(delta))


def lineage_of(numbers: Sequence[int], basis: str = "basis") -> RecordSet:
    found = b"".join(int(number).to_bytes(16, "little") for number in sorted(numbers))
    return RecordSet.of_bytes(basis, found, len(numbers))


def charge(
    ledger: PrivacyLedger, records: RecordSet, m: Mechanism, order: float = 8.0, **facts: Any
) -> None:
    with ledger.writing():
        ledger.charge(
            records,
            **{
                "source": "rows.csv",
                "unit": "record",
                "contract": "1" * 64,
                "run": "r",
                "round": 1,
                "attempt": len(ledger.charges) + 1,
                "request": "2" * 64,
                "noise_multiplier": m.noise_multiplier,
                "sampling_rate": m.sampling_rate,
                "steps": m.steps,
                "order": order,
                **facts,
            },
        )


def mechanism(rng: np.random.Generator) -> Mechanism:
    return Mechanism(
        float(rng.uniform(0.8, 8)),
        float(rng.choice([0.01, 0.1, 0.25, 0.5, 1.0])),
        int(rng.integers(1, 30)),
    )


History = tuple[float | None, tuple[Mechanism, ...]]


def expected(charges: Sequence[tuple[frozenset[int], Mechanism, float]], record: int) -> History:
    """A record's history told one by one: what it took part in, at the order of the first."""
    own = [(m, order) for records, m, order in charges if record in records]
    return (own[0][1] if own else None), tuple(m for m, _ in own)


def run_of(seed: int) -> tuple[PrivacyLedger, list[tuple[frozenset[int], Mechanism, float]]]:
    """Random charges on overlapping sets of 12 records, at random whole orders."""
    rng = np.random.default_rng(seed)
    ledger = PrivacyLedger.in_memory("north")
    files = [
        frozenset(rng.choice(12, size=rng.integers(1, 9), replace=False).tolist())
        for _ in range(rng.integers(2, 5))
    ]
    charges = []
    for _ in range(rng.integers(1, 9)):
        records = files[rng.integers(len(files))]
        charges.append((records, mechanism(rng), float(rng.integers(2, 41))))
        charge(ledger, lineage_of(sorted(records)), *charges[-1][1:])
    return ledger, charges


@pytest.mark.parametrize("seed", range(RUNS))
def test_every_records_epsilon_is_the_oracles(seed: int) -> None:
    ledger, charges = run_of(seed)
    rng = np.random.default_rng(1000 + seed)
    for _ in range(3):
        asked = sorted(rng.choice(15, size=rng.integers(1, 12), replace=False).tolist())
        budget = budget_of(ledger, asked)
        wanted = {expected(charges, record) for record in asked}
        pasts = budget.pasts()
        assert {(past.order, tuple(past.history)) for past in pasts} == wanted
        assert len(pasts) == len(wanted)
        worst = 0.0
        for past in pasts:
            if not past.history:
                assert past.spent(DELTA) == Cost(0.0, EXACT)
                continue
            assert past.order is not None
            right = oracle(past.history, [past.order], 0.1 * DELTA)
            assert past.epsilon(OF_FILTER) == pytest.approx(right, abs=1e-6, rel=1e-6)
            assert past.spent(DELTA) == Cost(past.epsilon(OF_FILTER), RDP)
            worst = max(worst, right)
        assert budget.spent(DELTA).epsilon == pytest.approx(worst, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("seed", range(0, RUNS, 5))
def test_spent_lies_above_the_tight_epsilon(seed: int) -> None:
    ledger, charges = run_of(seed)
    for records in {records for records, _, _ in charges}:
        spent = budget_of(ledger, sorted(records)).spent(DELTA).epsilon
        for record in records:
            assert spent >= tight_oracle(expected(charges, record)[1], DELTA) - 1e-3


@pytest.mark.parametrize("seed", range(RUNS))
def test_epsilon_over_whole_orders_is_the_oracles(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = [float(order) for order in range(2, 64)]
    monkeypatch.setattr(accounting, "ALPHAS", orders)
    rng = np.random.default_rng(seed)
    history = [mechanism(rng) for _ in range(rng.integers(1, 5))]
    for delta in (1e-3, 1e-5, 1e-9):
        assert accounting.epsilon(history, delta) == pytest.approx(
            oracle(history, orders, delta), abs=1e-6, rel=1e-6
        )


# Who inherits what


A, B = Mechanism(2.0, 0.25, 10), Mechanism(3.0, 0.5, 4)


@pytest.fixture
def ledger() -> PrivacyLedger:
    """Records 0 to 9 were charged A at order 5, then 5 to 14 B at order 9."""
    found = PrivacyLedger.in_memory("north")
    charge(found, lineage_of(range(10)), A, 5.0)
    charge(found, lineage_of(range(5, 15)), B, 9.0)
    return found


def budget_of(ledger: PrivacyLedger, *records: Any) -> Budget:
    return Budget(ledger, lineage_of(*records), "record")


def past_of(order: float, *charges: Mechanism) -> ChargeHistory:
    """Charges without a plan."""
    return ChargeHistory(order, list(charges), {None})


def pasts(
    ledger: PrivacyLedger, numbers: Sequence[int], basis: str = "basis"
) -> list[ChargeHistory]:
    return budget_of(ledger, numbers, basis).pasts()


def test_a_subset_inherits_exactly_what_it_took_part_in(ledger: PrivacyLedger) -> None:
    assert pasts(ledger, range(3)) == [past_of(5.0, A)]
    assert pasts(ledger, range(12, 14)) == [past_of(9.0, B)]


def test_a_record_in_both_files_is_accounted_at_its_first_charges_order(
    ledger: PrivacyLedger,
) -> None:
    assert pasts(ledger, [7]) == [past_of(5.0, A, B)]


def test_an_overlap_inherits_for_the_records_it_has(ledger: PrivacyLedger) -> None:
    found = pasts(ledger, [4, 5, 14, 20])
    assert len(found) == 4
    for past in (
        ChargeHistory(),
        past_of(5.0, A),
        past_of(9.0, B),
        past_of(5.0, A, B),
    ):
        assert past in found
    assert budget_of(ledger, [4, 5, 14, 20]).spent(DELTA) == past_of(5.0, A, B).spent(DELTA)


def test_fresh_records_have_spent_nothing(ledger: PrivacyLedger) -> None:
    assert pasts(ledger, range(20, 30)) == [ChargeHistory()]
    assert budget_of(ledger, range(20, 30)).spent(DELTA) == Cost(0.0, EXACT)


def test_a_fresh_record_in_the_file_frees_nobody(ledger: PrivacyLedger) -> None:
    alone = budget_of(ledger, [7]).spent(DELTA)
    assert budget_of(ledger, [7, *range(20, 90)]).spent(DELTA) == alone


def test_records_of_another_basis_inherit_all(ledger: PrivacyLedger) -> None:
    assert pasts(ledger, [50, 51], "another") == [past_of(5.0, A, B)]


def test_no_records_have_spent_nothing(ledger: PrivacyLedger) -> None:
    assert pasts(ledger, []) == [ChargeHistory()]


def test_a_budget_sees_the_charges_that_came_after_it(ledger: PrivacyLedger) -> None:
    budget = budget_of(ledger, [2, 20])
    before = budget.spent(DELTA)
    charge(ledger, lineage_of([2]), B)
    assert past_of(5.0, A, B) in budget.pasts()
    charge(ledger, lineage_of([20, 21]), B, 4.0)
    assert past_of(4.0, B) in budget.pasts()
    assert budget.spent(DELTA) > before


def test_a_charge_that_was_rolled_back_is_seen_no_more(ledger: PrivacyLedger) -> None:
    budget, fresh = budget_of(ledger, [2]), lineage_of([2, 99])

    def fails() -> None:
        with ledger.writing():
            ledger.charge(
                fresh,
                source="rows.csv",
                unit="record",
                contract="1" * 64,
                run="x",
                round=1,
                attempt=1,
                request="2" * 64,
                noise_multiplier=1.0,
                sampling_rate=1.0,
                steps=1,
                order=3.0,
            )
            assert len(budget.pasts()[0].history) == 2
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fails()
    assert budget.pasts() == [past_of(5.0, A)]


def test_any_mix_of_mechanisms_composes(ledger: PrivacyLedger) -> None:
    """Charges of another contract, run or time count as any other."""
    charge(ledger, lineage_of(range(10)), Mechanism(0.9, 0.01, 500), contract="9" * 64, run="x")
    (past,) = pasts(ledger, [0])
    assert past.history == [A, Mechanism(0.9, 0.01, 500)]
    assert past.epsilon(DELTA) == pytest.approx(oracle(past.history, [5.0], DELTA), abs=1e-6)


def test_a_round_without_noise_is_never_forgotten(ledger: PrivacyLedger) -> None:
    charge(ledger, lineage_of([3]), Mechanism(0.0, 1.0, 1))
    for numbers in ([3], [1, 2, 3], [3, 77]):
        budget = budget_of(ledger, numbers)
        assert budget.spent(DELTA).epsilon == math.inf
        assert budget.remaining_epsilon(Limit(100.0, DELTA)) == 0
        with pytest.raises(RefusalError):
            budget.check_plan([Mechanism(1e4, 0.001, 1)], 5.0, Limit(100.0, DELTA), "it")
        assert not budget.longest_that_fits([A], 5.0, Limit(100.0, DELTA))
    assert math.isfinite(budget_of(ledger, [1, 2]).spent(DELTA).epsilon)


# What fits


def test_check_passes_up_to_the_limit_and_not_beyond(ledger: PrivacyLedger) -> None:
    """By the filter for records with charges of no plan, else by exact composition."""
    for numbers, order in (([7], 30.0), ([3, 12], 2.0), ([20], 11.0)):
        budget = budget_of(ledger, numbers)
        after = budget.together([A], [A, B], order, DELTA)
        right = max(
            oracle([*past.history, A], [past.order or order], 0.1 * DELTA)
            if past.history
            else tight_oracle([A, B], 0.9 * DELTA)
            for past in budget.pasts()
        )
        assert after.accountant == (EXACT if numbers == [20] else RDP)
        assert after.epsilon == pytest.approx(right, abs=1e-3 if numbers == [20] else 1e-6)
        budget.check([A], [A, B], order, Limit(after.epsilon, DELTA), "it")
        with pytest.raises(RefusalError, match=r"^It exceeds the lifetime budget") as refusal:
            budget.check([A], [A, B], order, Limit(after.epsilon * (1 - 1e-6), DELTA), "It")
        assert refusal.value.code == "E210"
        whole = budget.with_plan([A, B], order, DELTA)
        budget.check_plan([A, B], order, Limit(whole.epsilon, DELTA), "it")
        with pytest.raises(RefusalError, match=r"^It exceeds the lifetime budget"):
            budget.check_plan([A, B], order, Limit(whole.epsilon * (1 - 1e-6), DELTA), "It")


def test_the_order_of_a_new_plan_counts_only_for_records_without_a_past(
    ledger: PrivacyLedger,
) -> None:
    old, new = budget_of(ledger, [7]), budget_of(ledger, [20])
    assert old.together([A], [A], 2.0, DELTA) == old.together([A], [A], 40.0, DELTA)
    assert new.together([B], [A], 2.0, DELTA) != new.together([B], [A], 40.0, DELTA)


def test_a_first_charge_without_noise_fixes_no_order() -> None:
    """It would be the order of all later plans on other records."""
    ledger = PrivacyLedger.in_memory("north")
    charge(ledger, lineage_of([1]), Mechanism(0.0, 1.0, 1), 2.0)
    assert ledger.order is None
    charge(ledger, lineage_of([2]), A, 7.0)
    charge(ledger, lineage_of([3]), A, 7.0)
    assert ledger.order == 7.0
    assert budget_of(ledger, [1]).spent(DELTA).epsilon == math.inf


@pytest.mark.parametrize("broken", [math.nan, 0.0, -1.0])
def test_nothing_fits_a_limit_that_is_no_number_or_nothing(
    ledger: PrivacyLedger, broken: float
) -> None:
    for numbers in ([7], [20]):
        with pytest.raises(RefusalError):
            budget_of(ledger, numbers).check([A], [A], 5.0, Limit(broken, DELTA), "it")


def test_a_cost_that_cannot_be_computed_lets_nothing_pass(
    ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "_rdp_of_step", lambda *_: math.nan)
    monkeypatch.setattr(accounting, "exact_epsilon", lambda *_: math.nan)
    assert accounting.epsilon_at(5.0, [A], DELTA) == accounting.epsilon([A], DELTA) == math.inf
    for numbers in ([7], [20]):
        budget = budget_of(ledger, numbers)
        with pytest.raises(RefusalError, match="lifetime budget") as refusal:
            budget.check([A], [A], 5.0, Limit(8.0, DELTA), "it")
        assert refusal.value.code == "E210"
        assert not budget.longest_that_fits([A], 5.0, Limit(8.0, DELTA))


def test_a_delta_that_is_no_number_lets_nothing_pass(ledger: PrivacyLedger) -> None:
    for numbers in ([7], [20]):
        with pytest.raises(RefusalError) as refusal:
            budget_of(ledger, numbers).check([A], [A], 5.0, Limit(8.0, math.nan), "it")
        assert refusal.value.code == "E210"


@pytest.mark.parametrize("seed", range(25))
def test_the_longest_that_fits_is_the_longest(seed: int) -> None:
    ledger, _ = run_of(seed)
    rng = np.random.default_rng(seed)
    budget = budget_of(ledger, rng.choice(15, size=5, replace=False).tolist())
    plan = [mechanism(rng) for _ in range(rng.integers(1, 4))]
    order = float(rng.integers(2, 41))
    before, whole = budget.spent(DELTA).epsilon, budget.with_plan(plan, order, DELTA).epsilon
    for share in (0.0, 0.3, 0.8, 1.5):
        limit = Limit(max(before + share * (whole - before), 1e-3), DELTA)
        kept = budget.longest_that_fits(plan, order, limit)
        if kept:
            budget.check_plan(kept, order, limit, "it")
        assert [m._replace(steps=0) for m in kept] == [
            m._replace(steps=0) for m in plan[: len(kept)]
        ]
        steps = sum(m.steps for m in kept)
        if steps < sum(m.steps for m in plan):
            longer = beginning(plan, steps + 1)
            with pytest.raises(RefusalError):
                budget.check_plan(longer, order, limit, "it")
        assert kept == beginning(plan, steps)


def beginning(plan: Sequence[Mechanism], steps: int) -> list[Mechanism]:
    """The first `steps` steps of a plan."""
    kept = []
    for m in plan:
        taken = min(m.steps, steps)
        if taken:
            kept.append(m._replace(steps=taken))
        steps -= taken
    return kept


def test_the_order_for_new_records_lets_a_plan_be_repeated_most_often() -> None:
    limit = Limit(8.0, DELTA)
    order = order_of([A, B], limit)

    def repeats(at: float) -> int:
        costs = (accounting.epsilon_at(at, [A, B] * n, OF_FILTER) for n in range(1, 30))
        return sum(cost <= limit.epsilon for cost in costs)

    assert repeats(order) == max(repeats(float(at)) for at in accounting.ALPHAS)


def test_a_plan_without_noise_has_an_order_too() -> None:
    assert order_of([Mechanism(0.0, 1.0, 1)], Limit(8.0, DELTA)) > 1
    assert order_of([A], Limit(math.inf, DELTA)) > 1


def test_a_charge_is_its_mechanism(ledger: PrivacyLedger) -> None:
    assert [mechanism_of(found) for found in ledger.charges.values()] == [A, B]


def test_a_second_charge_for_one_request_does_not_take_the_place_of_the_first(
    ledger: PrivacyLedger,
) -> None:
    """Charges are kept by request: a second one is refused, and what was spent stays spent."""
    with pytest.raises(RefusalError, match="charged already"):
        charge(ledger, lineage_of([3]), Mechanism(1e4, 0.001, 1), attempt=1)
    assert budget_of(ledger, [3]).pasts() == [past_of(5.0, A)]
    charge(ledger, lineage_of([3]), B, attempt=3)
    assert budget_of(ledger, [3]).pasts() == [past_of(5.0, A, B)]


def test_ten_thousand_charges_compose_fast() -> None:
    """The aim is a second; the bound leaves room for a busy machine."""
    rng = np.random.default_rng(0)
    mechanisms = [mechanism(rng) for _ in range(20)]
    files = [lineage_of(range(k, k + 6)) for k in range(3)]
    ledger = PrivacyLedger.in_memory("north")
    with ledger.writing():
        for i in range(10_000):
            m = mechanisms[i % 20]
            ledger.charge(
                files[i % 3],
                source="rows.csv",
                unit="record",
                contract="1" * 64,
                run="r",
                round=1,
                attempt=i + 1,
                request="2" * 64,
                order=8.0,
                noise_multiplier=m.noise_multiplier,
                sampling_rate=m.sampling_rate,
                steps=m.steps,
            )
    budget = budget_of(ledger, range(9))
    began = time.perf_counter()
    spent = budget.spent(DELTA).epsilon
    taken = time.perf_counter() - began
    print(f"10,000 charges compose in {taken:.3f} s")
    assert spent > 0
    assert taken < 3
