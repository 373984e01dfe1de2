"""What a set of records has spent, and whether one more step fits: the ledger's arithmetic.

Unit: a record, or an entity with all its records; adjacency: add or remove one. For a unit r let
H(r) be the charges of the ledger whose record_set holds r, or a record that is the same one
(client/records/record_ids.py, client/records/record_identity.py), in order. Each is a
sequence of Poisson-subsampled Gaussian mechanisms with noise for that unit. The order a by which
all records are accounted is named in the ledger's first charge, before anything was released.
`check` passes a charge only if for every unit of the data set the Rényi sum of H(r) and the charge,
converted at a, is within the limit. So all replies ever made of r together are (epsilon, delta)-DP
for r, also when servers choose each request after seeing every reply (Rényi filter and individual
accounting: Feldman and Zrnic 2021, arXiv 2008.11193, Theorem 4.5 and section 3).

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

import numpy as np
from numpy.typing import NDArray

from silotune.client.privacy import accountant
from silotune.client.privacy.accountant import Mechanism
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged, Prepared
from silotune.client.records import record_identity
from silotune.client.records.record_identity import Links
from silotune.client.records.record_ids import RecordSet
from silotune.common.contract.privacy import Unit, epsilon_text
from silotune.common.errors import ErrorCode, RefusalError

UNBOUNDED = Mechanism(0.0, 1.0, 1)


@dataclass(frozen=True)
class Limit:
    """The most that all charges together may cost a unit, over its lifetime."""

    epsilon: float
    delta: float


@dataclass
class ChargeHistory:
    """The charges that a group of records has in common: H(r), and its order unless it is empty."""

    order: float | None = None
    history: list[Mechanism] = field(default_factory=list)

    def epsilon(self, delta: float, more: Sequence[Mechanism] = (), order: float = 2.0) -> float:
        """Epsilon of the past and `more`; `order` counts only where there is no past."""
        return accountant.epsilon_at(self.order or order, [*self.history, *more], delta)


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
        for charge in charges:
            for group, past in zip(self._groups, pasts, strict=True):
                if charge.record_set in group:
                    past.order = past.order or charge.order
                    past.history.append(
                        mechanism_of(charge) if self._same_unit(charge) else UNBOUNDED
                    )
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

    def spent(self, delta: float) -> float:
        """Epsilon of the record that has spent most, at its own order."""
        return max(past.epsilon(delta) for past in self.pasts())

    def remaining_epsilon(self, limit: Limit) -> float:
        """About the epsilon of the largest further plan that fits: more than limit - spent, as
        epsilons add up to more than they compose to."""
        return min(
            accountant.remaining_epsilon(past.order, past.history, limit.epsilon, limit.delta)
            if past.order
            else limit.epsilon
            for past in self.pasts()
        )

    def tight(self, delta: float) -> float:
        """The same by PRV composition, for reports."""
        return max(accountant.tight_epsilon(past.history, delta) for past in self.pasts())

    def together(self, more: Sequence[Mechanism], order: float, delta: float) -> float:
        """Epsilon after `more`, of the record that will have spent most."""
        return max(past.epsilon(delta, more, order) for past in self.pasts())

    def check(self, more: Sequence[Mechanism], order: float, limit: Limit, what: str) -> None:
        """RefusalError E210 unless `more` fits; `what` names it in the sentence."""
        after = self.together(more, order, limit.delta)
        if not after <= limit.epsilon * (1 + 1e-9):
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
                f"{what} exceeds the lifetime budget of these records: spent before "
                f"{epsilon_text(self.spent(limit.delta))} · together {epsilon_text(after)} "
                f"(RDP, δ = {limit.delta:g}) · limit {epsilon_text(limit.epsilon)}.",
                code=ErrorCode.BUDGET_EXCEEDED,
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
                fits = self.together(trial, order, limit.delta) <= limit.epsilon * (1 + 1e-9)
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


def order_of(plan: Sequence[Mechanism], limit: Limit) -> float:
    """The order for a ledger without charges: the one by which this plan fits most often."""
    if any(m.noise_multiplier <= 0 for m in plan):
        return 4.0
    return accountant.best_repeating_order(plan, limit.epsilon, limit.delta)
