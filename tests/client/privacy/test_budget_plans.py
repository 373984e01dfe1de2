"""The lifetime budget where runs name their plans: exact composition for one plan, and a filter for
all that goes beyond it. Each property has a mutation of the rule that it must see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from silotune.client.privacy import accountant
from silotune.client.privacy.accountant import EXACT, RDP, Mechanism, epsilon_at, plan_epsilon
from silotune.client.privacy.budget import (
    Budget,
    ChargeHistory,
    Cost,
    Limit,
    mechanism_of,
    order_of,
)
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import PlannedSteps
from silotune.client.records.record_ids import RecordSet
from silotune.common.errors import RefusalError

DELTA = 1e-5
WHOLE = Mechanism(6.0, 1.0, 1)
SAMPLED = Mechanism(1.2, 0.2, 1)
PLAN = (WHOLE._replace(steps=4), SAMPLED._replace(steps=6))
OTHER = (Mechanism(9.0, 1.0, 3),)
SPENT = plan_epsilon(PLAN, DELTA)


def records_of(*numbers: int) -> RecordSet:
    found = b"".join(number.to_bytes(16, "little") for number in sorted(numbers))
    return RecordSet.of_bytes("basis", found, len(numbers))


class Site:
    """A ledger whose charges are checked as a worker's are."""

    def __init__(self, epsilon: float = SPENT, *records: int) -> None:
        self.ledger = PrivacyLedger.in_memory("north")
        self.limit, self.records = Limit(epsilon, DELTA), records or (1, 2, 3)

    def budget(self, *records: int) -> Budget:
        return Budget(self.ledger, records_of(*(records or self.records)), "record")

    @property
    def order(self) -> float:
        return self.ledger.order or order_of(PLAN, self.limit)

    def charge(
        self,
        step: Mechanism,
        plan: Sequence[Mechanism] = PLAN,
        run: str = "r",
        records: Sequence[int] = (),
        *,
        named: bool = True,
    ) -> None:
        """One round on the records. RefusalError E210 if it does not fit."""
        budget = self.budget(*records)
        charges = [charge for charge in self.ledger.charges.values() if charge.run == run]
        before = [mechanism_of(charge) for charge in charges]
        then = accountant.left_of(plan, [*before, step]) or accountant.left_of(plan, before) or ()
        budget.check([step], plan, self.order, self.limit, "This round", then)
        with self.ledger.writing():
            self.ledger.charge(
                budget.record_set,
                source="rows.csv",
                unit="record",
                contract="1" * 64,
                run=run,
                round=len(self.ledger.charges) + 1,
                attempt=1,
                request="2" * 64,
                noise_multiplier=step.noise_multiplier,
                sampling_rate=step.sampling_rate,
                steps=step.steps,
                order=self.order,
                plan=tuple(PlannedSteps(**m._asdict()) for m in plan)
                if named and not charges
                else (),
            )

    def passes(
        self,
        step: Mechanism,
        plan: Sequence[Mechanism] = PLAN,
        run: str = "r",
        records: Sequence[int] = (),
    ) -> bool:
        """Whether it fits; then it is charged."""
        try:
            self.charge(step, plan, run, records)
        except RefusalError:
            return False
        return True

    def spent(self) -> Cost:
        return self.budget().spent(DELTA)


# --- properties that a mutation below must break ---------------------------------------------


def a_plan_that_costs_the_limit_passes_in_any_order_and_no_step_more() -> None:
    steps = [WHOLE] * 4 + [SAMPLED] * 6
    for seed in range(4):
        site = Site()
        for number in np.random.default_rng(seed).permutation(len(steps)):
            site.charge(steps[number])
        assert site.spent() == Cost(pytest.approx(SPENT), EXACT)
        assert not site.passes(WHOLE)
        assert not site.passes(SAMPLED)


def a_step_is_not_taken_twice() -> None:
    """Also while others are left, whose place it would take."""
    site = Site()
    assert [site.passes(SAMPLED) for _ in range(7)] == [True] * 6 + [False]
    assert not site.passes(SAMPLED._replace(steps=2))
    assert site.passes(WHOLE._replace(steps=3))
    assert not site.passes(WHOLE._replace(steps=2))
    assert site.passes(WHOLE)


def a_plan_is_not_changed_after_its_first_output() -> None:
    """Of two plans that each fit and have the first step in common only the first one counts; and
    the run that has begun keeps its own."""
    loud = Mechanism(2.0, 1.0, 1)
    first, second = [SAMPLED._replace(steps=5)], [SAMPLED, loud._replace(steps=4)]
    assert plan_epsilon(first, DELTA) < plan_epsilon(second, DELTA)
    for run in ("r", "other"):
        site = Site(plan_epsilon(second, DELTA))
        site.charge(SAMPLED, first)
        passed = sum(site.passes(loud, second, run) for _ in range(4))
        assert passed < 4
        costs = [
            epsilon_at(site.order, [SAMPLED, *[loud] * n], 0.1 * DELTA)
            for n in (passed, passed + 1)
        ]
        assert costs[0] <= site.limit.epsilon < costs[1]


def a_second_plan_is_not_counted_by_exact_composition() -> None:
    """Whatever is left of the exact bound: it is for the first plan."""
    both = plan_epsilon([*PLAN, *OTHER], DELTA)
    site = Site(both * 1.02)
    for step in (WHOLE, SAMPLED):
        for _ in range(4):
            site.charge(step)
    site.charge(SAMPLED._replace(steps=2))
    assert site.spent() == Cost(pytest.approx(SPENT), EXACT)
    filtered = epsilon_at(site.order, [*PLAN, *OTHER], 0.1 * DELTA)
    assert both < site.limit.epsilon < filtered
    with pytest.raises(RefusalError):
        site.budget().check_plan(OTHER, site.order, site.limit, "it")
    while len(site.ledger.charges) < 13 and site.passes(OTHER[0]._replace(steps=1), OTHER, "other"):
        assert site.spent().accountant == RDP
    assert site.spent().epsilon <= site.limit.epsilon * (1 + 1e-9)
    assert len(site.ledger.charges) < 9 + 3


def the_filter_has_its_own_part_of_delta() -> None:
    site = Site()
    site.charge(WHOLE)
    between = [epsilon_at(site.order, [WHOLE, *OTHER], share * DELTA) for share in (0.1, 1.0)]
    assert between[1] < between[0]
    site.limit = Limit(math.sqrt(between[0] * between[1]), DELTA)
    assert not site.passes(OTHER[0], OTHER, "other")
    site.limit = Limit(between[0] * (1 + 1e-9), DELTA)
    assert site.passes(OTHER[0], OTHER, "other")


def the_first_plan_has_no_more_than_its_part_of_delta() -> None:
    site = Site(accountant.exact_epsilon(PLAN, DELTA))
    with pytest.raises(RefusalError):
        site.budget().check_plan(PLAN, site.order, site.limit, "it")
    assert not site.passes(WHOLE)


def after_a_second_plan_the_first_one_is_filtered_too() -> None:
    site = Site(8.0)
    site.charge(WHOLE)
    assert site.passes(OTHER[0], OTHER, "other")
    history = [WHOLE, *OTHER, *[SAMPLED] * 3]
    costs = [epsilon_at(site.order, more, 0.1 * DELTA) for more in (history, [*history, SAMPLED])]
    site.limit = Limit(sum(costs) / 2, DELTA)
    assert [site.passes(SAMPLED) for _ in range(5)] == [True] * 3 + [False] * 2
    assert site.spent() == Cost(pytest.approx(costs[0]), RDP)


def every_record_counts_by_its_own_plan() -> None:
    """Of a file with charged and fresh records both must fit."""
    site = Site(SPENT, 1, 2)
    loud = Mechanism(accountant.noise_for(0.95 * SPENT, DELTA, 1.0, 1), 1.0, 1)
    site.charge(WHOLE)
    assert site.passes(loud, [loud], "other", records=(3, 4))
    assert not site.passes(WHOLE._replace(steps=3), records=(1, 3))  # 3 began by another plan
    assert site.passes(WHOLE._replace(steps=3), records=(1, 5))
    assert site.budget(5).spent(DELTA).accountant == EXACT


PROPERTIES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        a_plan_that_costs_the_limit_passes_in_any_order_and_no_step_more,
        a_step_is_not_taken_twice,
        a_plan_is_not_changed_after_its_first_output,
        a_second_plan_is_not_counted_by_exact_composition,
        the_filter_has_its_own_part_of_delta,
        the_first_plan_has_no_more_than_its_part_of_delta,
        after_a_second_plan_the_first_one_is_filtered_too,
        every_record_counts_by_its_own_plan,
    )
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str) -> None:
    PROPERTIES[name]()


# --- mutations: the rule broken on purpose ---------------------------------------------------

_left_of, _cost = accountant.left_of, ChargeHistory.cost


def plans_are_filtered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChargeHistory, "left_of", lambda self, plan: None)


def any_plan_with_these_steps_will_do(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChargeHistory, "left_of", lambda self, plan: _left_of(plan, self.history))


def all_charges_are_counted_by_exact_composition(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        ChargeHistory,
        "cost",
        lambda self, more, plan, order, delta, then=(): Cost(
            plan_epsilon([*self.history, *more], delta), EXACT
        ),
    )


def steps_are_taken_again(patch: pytest.MonkeyPatch) -> None:
    def left(plan: Sequence[Mechanism], taken: Sequence[Mechanism]) -> tuple[Mechanism, ...] | None:
        kinds = {m[:2] for m in plan}
        return tuple(plan) if all(m[:2] in kinds for m in taken) else None

    patch.setattr(accountant, "left_of", left)


def delta_is_not_split(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accountant, "split_delta", lambda delta: (delta, delta))


def the_record_that_has_spent_least_stands_for_all(patch: pytest.MonkeyPatch) -> None:
    pasts = Budget.pasts
    patch.setattr(
        Budget, "pasts", lambda self: [min(pasts(self), key=lambda past: past.spent(DELTA))]
    )


def once_filtered_a_plan_is_exact_again(patch: pytest.MonkeyPatch) -> None:
    """What a run of it has taken alone is compared with the plan."""

    def cost(
        self: ChargeHistory,
        more: Sequence[Mechanism],
        plan: tuple[Mechanism, ...],
        order: float,
        delta: float,
        then: Sequence[Mechanism] = (),
    ) -> Cost:
        if plan in self.plans:
            return Cost(plan_epsilon(plan, delta), EXACT)
        return _cost(self, more, plan, order, delta, then)

    patch.setattr(ChargeHistory, "cost", cost)


MUTATIONS: dict[Callable[[pytest.MonkeyPatch], None], tuple[Callable[[], None], ...]] = {
    plans_are_filtered: (a_plan_that_costs_the_limit_passes_in_any_order_and_no_step_more,),
    any_plan_with_these_steps_will_do: (a_plan_is_not_changed_after_its_first_output,),
    all_charges_are_counted_by_exact_composition: (
        a_second_plan_is_not_counted_by_exact_composition,
        a_plan_is_not_changed_after_its_first_output,
    ),
    steps_are_taken_again: (a_step_is_not_taken_twice,),
    delta_is_not_split: (
        the_filter_has_its_own_part_of_delta,
        the_first_plan_has_no_more_than_its_part_of_delta,
    ),
    the_record_that_has_spent_least_stands_for_all: (every_record_counts_by_its_own_plan,),
    once_filtered_a_plan_is_exact_again: (after_a_second_plan_the_first_one_is_filtered_too,),
}


@pytest.mark.parametrize(
    ("mutation", "seen_by"),
    [
        pytest.param(m, p, id=f"{m.__name__}-{p.__name__}")
        for m, properties in MUTATIONS.items()
        for p in properties
    ],
)
def test_a_broken_rule_is_caught(
    mutation: Callable[[pytest.MonkeyPatch], None],
    seen_by: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutation(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, RefusalError)):
        seen_by()


def test_every_property_has_a_mutation_that_it_sees() -> None:
    assert {p.__name__ for seen in MUTATIONS.values() for p in seen} == set(PROPERTIES)


# --- what an owner meets -----------------------------------------------------------------------


def test_a_run_that_died_in_its_first_round_leaves_room_for_another_plan() -> None:
    site = Site(8.0)
    site.charge(WHOLE)
    site.budget().check_plan(OTHER, site.order, site.limit, "it")
    assert not site.budget().ends_early(PLAN, site.order, Limit(60.0, DELTA))
    assert site.passes(OTHER[0], OTHER, "other")


def test_another_run_of_the_same_contract_takes_what_is_left() -> None:
    """With a limit of just the plan's ε: nothing is locked, and the run ends early."""
    site = Site()
    site.charge(WHOLE)
    budget = site.budget()
    budget.check_plan(PLAN, site.order, site.limit, "it")
    assert budget.ends_early(PLAN, site.order, site.limit)
    after = budget.with_plan(PLAN, site.order, DELTA)
    assert budget.figures(after, PLAN, site.order, site.limit).endswith(
        f"together {SPENT:.2f} (exact composition, δ = 1e-05 per record) · limit {SPENT:.2f}; "
        "what was spent are steps of this plan"
    )
    assert [site.passes(WHOLE, run="second") for _ in range(4)] == [True] * 3 + [False]
    assert [site.passes(SAMPLED, run="second") for _ in range(7)] == [True] * 6 + [False]
    assert site.spent() == Cost(pytest.approx(SPENT), EXACT)
    with pytest.raises(RefusalError, match="lifetime budget"):
        site.budget().check_plan(PLAN, site.order, site.limit, "it")


def test_a_step_that_leaves_the_plan_waits_for_the_runs_end() -> None:
    """It costs little by itself; but by the filter the rest of the run would not fit any more."""
    site = Site()
    site.charge(WHOLE)
    alone = epsilon_at(site.order, [WHOLE] * 5, 0.1 * DELTA)
    assert alone < site.limit.epsilon
    assert [site.passes(WHOLE, run="second") for _ in range(4)] == [True] * 3 + [False]
    assert all(site.passes(SAMPLED, run="second") for _ in range(6))


def test_charges_that_name_no_plan_are_filtered() -> None:
    site = Site(8.0)
    site.charge(WHOLE, named=False)
    assert site.spent().accountant == RDP
    site.charge(WHOLE)
    assert site.spent().accountant == RDP


def test_a_plan_beyond_the_limit_does_not_begin_and_is_told_by_one_account() -> None:
    site = Site(SPENT / 2)
    with pytest.raises(RefusalError) as refusal:
        site.budget().check_plan(PLAN, site.order, site.limit, "This run's plan")
    assert str(refusal.value) == (
        f"This run's plan exceeds the lifetime budget of these records: this plan {SPENT:.2f} · "
        f"spent before 0.00 · together {SPENT:.2f} (exact composition, δ = 1e-05 per record) · "
        f"limit {SPENT / 2:.2f}."
    )


def test_a_second_plan_is_told_by_one_account_and_why() -> None:
    site = Site()
    site.charge(WHOLE)
    with pytest.raises(RefusalError) as refusal:
        site.budget().check_plan(OTHER * 40, site.order, site.limit, "This run's plan")
    costs = [
        epsilon_at(site.order, history, 0.1 * DELTA)
        for history in (OTHER * 40, [WHOLE], [*OTHER * 40, WHOLE])
    ]
    assert str(refusal.value).endswith(
        f"this plan {costs[0]:.2f} · spent before {costs[1]:.2f} · together {costs[2]:.2f} (RDP, "
        f"δ = 1e-05 per record) · limit {SPENT:.2f}; what goes beyond one plan is counted by RDP, "
        "more than by exact composition."
    )


def test_a_plan_is_that_of_the_runs_first_charge() -> None:
    """A later charge of the run on other records is of the same plan."""
    site = Site(SPENT, 1, 2)
    site.charge(WHOLE)
    site.charge(WHOLE, records=(7, 8))
    (past,) = site.budget(7).pasts()
    assert past.plans == {accountant.merged(PLAN)}
    assert site.budget(7).spent(DELTA).accountant == EXACT


def test_a_limit_that_was_lowered_below_the_plan_stops_it() -> None:
    """Stopping at the exact ε of what was charged would be no valid filter."""
    site = Site()
    site.charge(WHOLE)
    site.limit = Limit(SPENT * 0.99, DELTA)
    assert not site.passes(WHOLE)
