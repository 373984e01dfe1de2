"""Which sites the sums of a run are of, and how often that set changes: what a server can subtract.

Secure aggregation hides one update within one sum. A server that gets a sum with a site and a sum
without it from nearly the same adapter can subtract them, and has that site's update plus the noise
of all the others twice (So et al. 2023, arXiv 2106.03328, "Securing Secure Aggregation"). What
protects the site's records from that is its own differential privacy; what is here makes it rarer.

Guarantee. Assume the ledger is not rolled back and the assumptions of common/secagg/participant.py,
with up to c sites that work with the server and 2 t > n + c. Then of the rounds of one run that
began with the same adapter, all sums that open are of one set of sites; and of the sums of one run
for which an honest site reveals, at most `permits.set_changes` are of another set than the round
before. Why: a sum opens only if t sites reveal, of which t - c are honest; two sums therefore have
an honest site in common among those that revealed for both, and that site keeps each set durably
before it reveals anything for it (an entry of the ledger), and refuses the second.

Not covered: adapters that differ by however little, rounds that are far apart, and different runs.
For the first the count and the noise are left, for the others the noise alone.
"""

from __future__ import annotations

from collections.abc import Collection

from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged, Settled
from silotune.common.errors import ErrorCode, RefusalError


class SiteSets:
    """The sets of sites that one site has given shares for, under one contract, by its ledger.

    most_changes: how often the set may change within a run (permits.set_changes).
    """

    def __init__(self, ledger: PrivacyLedger, contract: str, most_changes: int) -> None:
        self._ledger, self._contract, self._most_changes = ledger, contract, most_changes

    def changes(self, run: str) -> int:
        """How many sums of the run were of another set than that of the round before. A sum that
        follows on a round without one counts as well: that round may have had a sum without this
        site."""
        settled = self._settled(run)
        before: list[tuple[Charged, Settled] | None] = [None, *settled]
        return sum(
            self._is_change(earlier, charge.round, entry.sites)
            for earlier, (charge, entry) in zip(before, settled, strict=False)
        )

    def check_members(
        self, run: str, number: int, adapter: str, members: Collection[str], most_changes: int
    ) -> None:
        """RefusalError E220 if no sum of these members can be one that `settle` accepts. To be
        called before a charge, within `PrivacyLedger.writing`.

        adapter: its digest (common/protocol/tensors.py). most_changes: permits.set_changes of the
        policy that was signed last; the smaller of the two holds.
        """
        self._most_changes = min(self._most_changes, most_changes)
        settled = self._settled(run)
        self._check_same_adapter(settled, adapter, members, exactly=False)
        last = settled[-1] if settled else None
        sites = last[1].sites if last and set(last[1].sites) <= set(members) else members
        self._check_changes(run, number, sites)

    def settle(self, run: str, number: int, sites: Collection[str]) -> None:
        """Keep durably that a round may be opened in a sum of these sites.

        RefusalError E220 if an earlier round of the run that began with the same adapter was
        settled for others, or if the set has changed too often; E202 if the round was settled for
        others, or was not charged.
        """
        with self._ledger.writing():
            charge = next((c for c in self._charges(run) if c.round == number), None)
            if charge is None:
                raise RefusalError(f"Round {number} of run {run} was not charged here.")
            if (entry := self._ledger.settled.get(charge.sequence)) is not None:
                if set(entry.sites) != set(sites):
                    raise RefusalError(f"Round {number} was settled for other sites before.")
                return
            self._check_same_adapter(self._settled(run), charge.adapter, sites, exactly=True)
            self._check_changes(run, number, sites)
            self._ledger.append(Settled, charge=charge.sequence, sites=tuple(sorted(sites)))

    def _check_same_adapter(
        self,
        settled: list[tuple[Charged, Settled]],
        adapter: str | None,
        sites: Collection[str],
        *,
        exactly: bool,
    ) -> None:
        for charge, entry in settled:
            if charge.adapter != adapter or set(entry.sites) == set(sites):
                continue
            if exactly or not set(entry.sites) <= set(sites):
                raise RefusalError(
                    f"The adapter is that of round {charge.round}, whose sum was of "
                    f"{', '.join(entry.sites)}. The difference of two sums from one adapter shows "
                    "the update of a site that is in one of them only: a sum of other sites is "
                    "refused. The run goes on when the same sites take part.",
                    code=ErrorCode.SITE_SET_REFUSED,
                )

    def _check_changes(self, run: str, number: int, sites: Collection[str]) -> None:
        settled = self._settled(run)
        last = settled[-1] if settled else None
        if self._is_change(last, number, sites) and self.changes(run) >= self._most_changes:
            raise RefusalError(
                f"The set of sites in the sums of run {run} has changed {self.changes(run)} times, "
                f"which is all that permits.set_changes = {self._most_changes} in site.toml "
                "allows. Another run begins at zero.",
                code=ErrorCode.SITE_SET_REFUSED,
            )

    @staticmethod
    def _is_change(
        last: tuple[Charged, Settled] | None, number: int, sites: Collection[str]
    ) -> bool:
        if last is None:
            return number > 1
        charge, entry = last
        return charge.round != number - 1 or set(entry.sites) != set(sites)

    def _settled(self, run: str) -> list[tuple[Charged, Settled]]:
        """The rounds of a run with the sets they were settled for, in the order of settling."""
        found = [
            (charge, self._ledger.settled[charge.sequence])
            for charge in self._charges(run)
            if charge.sequence in self._ledger.settled
        ]
        return sorted(found, key=lambda pair: pair[1].sequence)

    def _charges(self, run: str) -> list[Charged]:
        return [
            charge
            for charge in self._ledger.charges.values()
            if (charge.contract, charge.run) == (self._contract, run)
        ]
