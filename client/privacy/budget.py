"""What a set of records has spent, and whether one more step fits: the ledger's arithmetic.

Unit: a record, or an entity with all its records; adjacency: add or remove one. For a unit r let
H(r) be the charges of the ledger whose record_set holds r, or a record that is the same one
(client/records/record_ids.py, client/records/record_identity.py), in order. Each is a
sequence of Poisson-subsampled Gaussian mechanisms with noise for that unit.

**The rule.** The limit is (epsilon, delta) with delta = d1 + d2 (accountant.split_delta). `check`
passes a charge only if for every unit r of the data set one of two holds:

(plan) all of H(r) and the charge belong to runs of one and the same plan P, a set of steps that
       each of these runs has named in the ledger at its first charge; together they are no more
       than the steps of P, kind by kind; and P as a whole is (epsilon, d1)-DP by exact composition.
(filter) the Rényi sum of H(r) and the charge, at the order a that the ledger's first charge with
       noise names, converted at d2, is at most epsilon.

**The guarantee.** All replies ever made of r together are (epsilon, delta)-DP for r, also when
servers choose each request after seeing every reply. Proof. Let the transcript be the ledger's
charges in order, each with the reply that was computed for it; without r, a charge "of r" is one on
the same file without r. What leaves is a part of the transcript: a charge may stand whose reply was
lost before it left. So it is enough to show the guarantee for the transcript, as if all of it were
seen. Each charge is a function of requests, plans and earlier charges, and so of the transcript
before it, alike with and without r. Nothing depends on r before its first charge, so let what came
before be given; P, if there is one, and a are then fixed. Let M be the law of the transcript with
r, M' without, and E the event that all charges of r are as (plan) says: it can be told from the
charges. (Where the owner let r be charged without DP, nothing is claimed for r, and nothing with
noise passes after that.)
1. Let M1 be M, but halted where it would grant a charge of r beyond (plan). It takes steps of P
   alone, each at most once, in an order and on inputs that may depend on every reply. So it is
   (epsilon, d1)-DP by exact composition (client/privacy/exact_composition.py), and it is M on E:
   M(S and E) <= e^epsilon M'(S and E) + d1.
2. Let M2 be M, but halted where it would grant a charge of r beyond (filter). It is a Rényi filter
   (Feldman and Zrnic 2021, arXiv 2008.11193, Theorem 4.5, and section 3 on individual accounting),
   so (epsilon, d2)-DP. It is M outside E: there some charge of r was the first one beyond (plan),
   and so were all after it, so (filter) held for each of them with all before it; and as Rényi sums
   only grow, for every charge of r. M(S and not E) <= e^epsilon M'(S and not E) + d2.
The two add up to M(S) <= e^epsilon M'(S) + d1 + d2; the same with M and M' exchanged.

What the proof needs, and what breaks it: P may not be changed or chosen again once r was charged
(two plans of which each fits are two bounds to choose from after the replies); no step may be taken
twice; delta must be split; and the exact bound is none for steps chosen as they go, for which
stopping at the exact epsilon of what was charged is no valid filter. A run that goes on after a
crash, or another run of the same contract, takes steps of P that are left; where there is none
left, or where another plan is charged, only the filter can let it pass, and then also for P's rest.

A charge made for another unit, or for entities by another key, bounds nothing for this one (a
person may have any number of records; a record less changes what its person adds by up to twice the
clip norm): it counts as infinite, so records are used with one unit only.

What this does not cover: the yes or no itself. It is a function of public requests and of which
records were used before; an owner who brings data that overlaps with older data lets a server
see that much less is left. The owner learns it first: `silotune site check`, and a worker does
not start on a contract whose whole plan does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from silotune.client.privacy import accountant
from silotune.client.privacy.accountant import EXACT, RDP, Mechanism
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged, Prepared
from silotune.client.records import record_identity
from silotune.client.records.record_identity import Links
from silotune.client.records.record_ids import RecordSet
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Target, Unit, epsilon_text
from silotune.common.errors import ErrorCode, RefusalError

UNBOUNDED = Mechanism(0.0, 1.0, 1)
ROUNDING = 1 + 1e-9  # what another machine's libraries may make of a plan's ε
Plan = tuple[Mechanism, ...]  # a set of steps, as `accountant.merged` has it


@dataclass(frozen=True)
class Limit:
    """The most that all charges together may cost a unit, over its lifetime."""

    epsilon: float
    delta: float


class Cost(NamedTuple):
    """What was or would be spent of a limit, and by which account."""

    epsilon: float
    accountant: str


@dataclass
class ChargeHistory:
    """The charges that a group of records has in common: H(r), and its order unless it is empty.

    Attributes:
        plans: The plans that the charges' runs have named; None for a charge without one.
    """

    order: float | None = None
    history: list[Mechanism] = field(default_factory=list)
    plans: set[Plan | None] = field(default_factory=set)

    def epsilon(self, delta: float, more: Sequence[Mechanism] = (), order: float = 2.0) -> float:
        """Epsilon of the past and `more` by RDP; `order` counts only where there is no past."""
        return accountant.epsilon_at(self.order or order, [*self.history, *more], delta)

    def left_of(self, plan: Plan) -> Plan | None:
        """The steps of `plan` that are left; None if this is not the past of that plan alone."""
        return accountant.left_of(plan, self.history) if self.plans <= {plan} else None

    def spent(self, delta: float) -> Cost:
        """What counts as spent: by exact composition as long as all is of one plan."""
        plan = next(iter(self.plans), ())
        if plan is not None and self.left_of(plan) is not None:
            return Cost(accountant.plan_epsilon(self.history, delta), EXACT)
        return Cost(self.epsilon(accountant.split_delta(delta)[1]), RDP)

    def cost(
        self,
        more: Sequence[Mechanism],
        plan: Plan,
        order: float,
        delta: float,
        then: Sequence[Mechanism] = (),
    ) -> Cost:
        """What is spent if `more`, of a run of `plan`, is charged: the whole plan as long as it is
        all of that plan, else all charges by the filter. The step that would leave the plan counts
        with `then`, what its run has yet to do: else it could take from a run its end."""
        left = self.left_of(plan)
        if left is not None and accountant.left_of(left, more) is not None:
            return Cost(accountant.plan_epsilon(plan, delta), EXACT)
        counted = more if left is None else [*more, *then]
        return Cost(self.epsilon(accountant.split_delta(delta)[1], counted, order), RDP)


class Budget:
    """The pasts of one file's records. Reads the ledger each time; keeps what overlaps."""

    def __init__(self, ledger: PrivacyLedger, record_set: RecordSet, unit: Unit) -> None:
        self.ledger, self.record_set, self.unit = ledger, record_set, unit
        self._known: tuple[int, list[str]] = (0, [])
        self._groups: list[frozenset[str]] = [frozenset()]

    def pasts(self) -> list[ChargeHistory]:
        """One for each group of records with equal charges; an empty one for records without."""
        charges = list(self.ledger.charges.values())
        known = len(self.ledger.preparations), list(self.ledger.record_sets())
        if known != self._known:
            self._known, self._groups = known, self._grouped()
        pasts = [ChargeHistory() for _ in self._groups]
        plans: dict[tuple[str, str], Plan] = {}
        for charge in charges:
            if charge.plan:
                plans.setdefault((charge.contract, charge.run), accountant.merged(plan_of(charge)))
            for group, past in zip(self._groups, pasts, strict=True):
                if charge.record_set in group:
                    past.order = past.order or charge.order
                    past.history.append(
                        mechanism_of(charge) if self._same_unit(charge) else UNBOUNDED
                    )
                    past.plans.add(plans.get((charge.contract, charge.run)))
        return pasts

    def _same_unit(self, charge: Charged) -> bool:
        return charge.unit == self.unit and (
            self.unit == "record" or charge.basis == self.record_set.basis
        )

    def _grouped(self) -> list[frozenset[str]]:
        """The sets of charged record_sets that some record here is in."""
        if not len(self.record_set.fingerprints):
            return [frozenset()]
        groups = [frozenset[str]()]
        number = np.zeros(
            len(self.record_set.fingerprints), dtype=np.int64
        )  # of each record's group
        for name, overlap in overlaps(self.ledger, self.record_set).items():
            found, number = np.unique(2 * number + overlap, return_inverse=True)
            groups = [groups[n // 2] | ({name} if n % 2 else frozenset()) for n in found]
        return groups

    def spent(self, delta: float) -> Cost:
        """That of the record that has spent most."""
        return max(past.spent(delta) for past in self.pasts())

    def remaining_epsilon(self, limit: Limit) -> float:
        """About the epsilon of the largest plan that fits beside what was charged; the limit where
        nothing was."""
        return min(
            accountant.remaining_epsilon(past.order, past.history, limit.epsilon, limit.delta)
            if past.order
            else limit.epsilon
            for past in self.pasts()
        )

    def together(
        self,
        more: Sequence[Mechanism],
        plan: Sequence[Mechanism],
        order: float,
        delta: float,
        then: Sequence[Mechanism] = (),
    ) -> Cost:
        """The cost for the record that will have spent most after `more`, steps of a run of `plan`
        that has `then` yet to do."""
        named = accountant.merged(plan)
        return max(past.cost(more, named, order, delta, then) for past in self.pasts())

    def with_plan(self, plan: Sequence[Mechanism], order: float, delta: float) -> Cost:
        """The same after a run of `plan`: of what earlier runs have left of it, if they have left
        anything and nothing else was charged."""
        named = accountant.merged(plan)
        return max(
            past.cost(past.left_of(named) or named, named, order, delta) for past in self.pasts()
        )

    def check(
        self,
        more: Sequence[Mechanism],
        plan: Sequence[Mechanism],
        order: float,
        limit: Limit,
        what: str,
        then: Sequence[Mechanism] = (),
    ) -> None:
        """RefusalError E210 unless `more`, steps of a run of `plan` with `then` yet to do, fits;
        `what` names it in the sentence."""
        self._check(self.together(more, plan, order, limit.delta, then), plan, order, limit, what)

    def check_plan(self, plan: Sequence[Mechanism], order: float, limit: Limit, what: str) -> None:
        """RefusalError E210 unless a run of `plan` fits. This spares a run that could not end; what
        may be charged is for `check` to say."""
        self._check(self.with_plan(plan, order, limit.delta), plan, order, limit, what)

    def ends_early(self, plan: Sequence[Mechanism], order: float, limit: Limit) -> bool:
        """Whether a further run of `plan` could only take the steps that earlier ones have left."""
        named, of_filter = accountant.merged(plan), accountant.split_delta(limit.delta)[1]
        return any(
            past.history
            and past.left_of(named)
            and past.epsilon(of_filter, plan, order) > limit.epsilon * ROUNDING
            for past in self.pasts()
        )

    def _check(
        self, after: Cost, plan: Sequence[Mechanism], order: float, limit: Limit, what: str
    ) -> None:
        if after.epsilon <= limit.epsilon * ROUNDING:
            return
        others = [c for c in self.ledger.charges.values() if not self._same_unit(c)]
        if others and UNBOUNDED in (m for past in self.pasts() for m in past.history):
            unit = others[0].unit
            by = f"the unit '{unit}'" if unit != self.unit else "entities of another key"
            raise RefusalError(
                f"These records were charged by {by} before; what that cost a unit "
                f"'{self.unit}' of this plan has no bound. Keep to one unit and one key.",
                code=ErrorCode.BUDGET_EXCEEDED,
            )
        raise RefusalError(
            f"{what} exceeds the lifetime budget of these records: "
            f"{self.figures(after, plan, order, limit)}.",
            code=ErrorCode.BUDGET_EXCEEDED,
        )

    def figures(self, after: Cost, plan: Sequence[Mechanism], order: float, limit: Limit) -> str:
        """What a plan costs, what was spent before and both together, all by one account."""
        if after.accountant == EXACT:
            costs = (past.spent(limit.delta) for past in self.pasts())
            before = max(cost.epsilon for cost in costs if cost.accountant == EXACT)
            own = accountant.plan_epsilon(plan, limit.delta)
            named, pasts = accountant.merged(plan), self.pasts()
            same = before and all(past.left_of(named) is not None for past in pasts)
            why = "; what was spent are steps of this plan" if same else ""
        else:
            of_filter = accountant.split_delta(limit.delta)[1]
            before = max(past.epsilon(of_filter) for past in self.pasts())
            own = accountant.epsilon_at(order, plan, of_filter)
            why = "; what goes beyond one plan is counted by RDP, more than by exact composition"
        terms = f"{after.accountant}, δ = {limit.delta:g} per {self.unit}"
        return (
            f"this plan {epsilon_text(own)} · spent before {epsilon_text(before)} · together "
            f"{epsilon_text(after.epsilon)} ({terms}) · limit {epsilon_text(limit.epsilon)}{why}"
        )

    def reasons(self) -> list[str]:
        """Why records that were never used can count as spent, for their owner; no counts."""
        other = dict.fromkeys(
            entry.source
            for entry in self.ledger.record_sets().values()
            if entry.basis != self.record_set.basis
        )
        found = []
        if other:
            found.append(
                f"records of other columns or of another key were charged ({', '.join(other)}), "
                "which cannot be compared and counts for all of these"
            )
        if untraceable(self.ledger, self.record_set).any():
            made = dict.fromkeys(e.source for e in _without_links(self.ledger, self.record_set))
            found.append(
                "some of these have a cell that `silotune site prepare` changed in "
                f"{', '.join(made)}, which was read by other columns or another key, so they may "
                "be its rows and count as spent"
            )
        return found

    def longest_that_fits(
        self, plan: Sequence[Mechanism], order: float, limit: Limit
    ) -> list[Mechanism]:
        """The longest beginning of `plan`, in steps, that fits; may be empty."""
        kept: list[Mechanism] = []
        for mechanism in plan:
            low, high = 0, mechanism.steps
            while low < high:
                middle = (low + high + 1) // 2
                trial = [*kept, mechanism._replace(steps=middle)]
                after = self.with_plan(trial, order, limit.delta)
                fits = after.epsilon <= limit.epsilon * ROUNDING
                low, high = (middle, high) if fits else (low, middle - 1)
            if low:
                kept.append(mechanism._replace(steps=low))
            if low < mechanism.steps:
                break
        return kept


def overlaps(
    ledger: PrivacyLedger, records: RecordSet, more: Mapping[str, Links] | None = None
) -> dict[str, NDArray[np.bool_]]:
    """For each set of records that was ever charged, by its record_set's name, which of `records`
    it holds [R]. All of them where the bases differ; and each holds those that cannot be traced
    (`untraceable`). more: links by basis that the ledger does not have yet.
    """
    charged = {name: ledger.record_set(entry) for name, entry in ledger.record_sets().items()}
    everything = np.ones(len(records.fingerprints), dtype=bool)
    lost = untraceable(ledger, records) if charged else ~everything
    if lost.all():
        return dict.fromkeys(charged, everything)
    alike = {name: other for name, other in charged.items() if other.basis == records.basis}
    links = ledger.links(records.basis)
    if more and records.basis in more:
        links.append(more[records.basis])
    own, *others = record_identity.components([records, *alike.values()], links)
    found = dict(zip(alike, (np.isin(own, other) for other in others), strict=True))
    return {name: found.get(name, everything) | lost for name in charged}


def rows_of_one_record(ledger: PrivacyLedger | None, records: RecordSet) -> list[list[int]]:
    """The rows of one file that are the same record (with a key of entities: the same entity) in
    different forms: `site prepare` made one of the other, or they are written in two ways. All of
    them are charged as one unit, which could then move a step by several times the clip norm.

    Args:
        ledger: The site's, which has the links of its preparations; None if there is none yet.
        records: Of a file that was read, so that their rows are known.

    Returns:
        For each such record the numbers of its rows, one for each form, in order.
    """
    links = ledger.links(records.basis) if ledger else []
    if not links and not len(records.decodings.codes):
        return []
    (component,) = record_identity.components([records], links)
    order = np.argsort(component, kind="stable")
    ends = np.flatnonzero(np.diff(component[order])) + 1
    groups = np.split(records.lines[order], ends)
    return sorted(sorted(rows.tolist()) for rows in groups if len(rows) > 1)


def untraceable(ledger: PrivacyLedger, records: RecordSet) -> NDArray[np.bool_]:
    """[R] which of `records` may have been made by a preparation that has no links for their basis,
    or be what it was made of: those with a cell that it changed, as it was or as it is. The names
    of columns prove nothing: they may be other ones since."""
    lost = np.zeros(len(records.fingerprints), dtype=bool)
    for entry in _without_links(ledger, records):
        cells = ledger.changed_cells(entry)
        if cells is not None and records.holding is not None:
            lost |= records.holding(cells)
        elif not records.names or not records.names <= set(entry.columns) - set(entry.changed):
            lost[:] = True
    return lost


def _without_links(ledger: PrivacyLedger, records: RecordSet) -> list[Prepared]:
    """The preparations that changed a cell and have no links for the basis of `records`."""
    return [
        entry for entry in ledger.preparations if entry.changed and records.basis not in entry.bases
    ]


def mechanism_of(charge: Charged) -> Mechanism:
    return Mechanism(charge.noise_multiplier, charge.sampling_rate, charge.steps)


def plan_of(charge: Charged) -> list[Mechanism]:
    """The plan that a run's first charge names, in order."""
    return [Mechanism(m.noise_multiplier, m.sampling_rate, m.steps) for m in charge.plan]


def planned(ledger: PrivacyLedger, contract: Contract, target: Target) -> list[Mechanism]:
    """The plan of a contract; if a run of it has named the same but for the last digits, which
    another version of a library may have computed, the plan that it has named."""
    plan = accountant.plan(contract, target)
    for charge in ledger.charges.values():
        if charge.contract == contract.hash and accountant.are_close(plan_of(charge), plan):
            return plan_of(charge)
    return plan


def order_of(plan: Sequence[Mechanism], limit: Limit) -> float:
    """The order for a ledger without charges that have noise: the one by which the filter lets this
    plan pass most often. For a plan without noise any: it fixes none (`PrivacyLedger.order`)."""
    if any(m.noise_multiplier <= 0 for m in plan):
        return 2.0
    of_filter = accountant.split_delta(limit.delta)[1]
    return accountant.best_repeating_order(plan, limit.epsilon, of_filter)
