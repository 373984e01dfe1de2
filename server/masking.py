"""The server's side of secure aggregation in one run, without a network.

Its stages are generators: they yield what to ask which site, and are sent what came back (Stages).
Nothing here can see an update by itself; why is in common/secagg.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

from silotune.common import messages, vector
from silotune.common.adapter import Shapes
from silotune.common.agreement import Agreement, check_keys
from silotune.common.contract import Contract
from silotune.common.errors import ProtocolError, RunError
from silotune.common.messages import (
    Agree,
    Arrays,
    Blobs,
    Endorse,
    Endorsement,
    Keys,
    Message,
    Reveal,
    Revealed,
    Share,
    Shares,
)
from silotune.common.plan import Metric
from silotune.common.secagg import Sum
from silotune.server import replies

Said = type[Keys] | type[Shares] | type[Endorsement] | type[Revealed]


class Masking:
    """The agreement on keys that is in force, and the open round's sum.

    fail: is told of each site that falls out, with the code of the reason. traffic: bytes up and
    down, added to.
    """

    def __init__(
        self, contract: Contract, run_id: str, fail: Callable[[str, str], None], traffic: list[int]
    ) -> None:
        self.contract, self.run_id, self._fail, self._traffic = contract, run_id, fail, traffic
        self.agreement: Agreement | None = None
        self._attempt = 0
        self._sealed: dict[str, Blobs] = {}  # by receiver, until it has answered
        self._stale = False
        self._sum: Sum | None = None

    def agree(self, sites: Collection[str], number: int) -> replies.Stages[None]:
        """Make the sites agree on keys for the rounds from `number` on, unless they have.

        Whoever fails a stage is left out and the rest start anew. RunError below the threshold.
        """
        if self.agreement and not self._stale and self.agreement.terms.serves(number):
            return
        self.agreement = None
        while self.agreement is None:
            self._attempt += 1
            step: dict[str, Any] = {"run": self.run_id, "round": number, "attempt": self._attempt}
            terms = self.contract.terms(self.run_id, number, self._attempt)
            ask = messages.pack(Message(Agree(contract=self.contract.hash, **step)))
            offered = yield from self._ask(dict.fromkeys(sites, ask), Keys)
            keys = {}
            for site, blobs in offered.items():
                try:
                    keys[site] = blobs.get(site, b"")
                    check_keys(terms, site, keys[site])
                except ProtocolError as error:
                    del keys[site]
                    self._fail(site, error.code)
            if len(keys) < terms.least:
                raise RunError(
                    f"Run stopped at round {number}: {len(keys)} of {len(self.contract.sites)} "
                    f"sites agreed on keys, secure aggregation needs {terms.least}. Nothing was "
                    "trained in this round.", code="E402",
                )
            ask = messages.pack(Message(Share(contract=self.contract.hash, **step), blobs=keys))
            shared = yield from self._ask(dict.fromkeys(keys, ask), Shares)
            sites = [s for s, blobs in shared.items() if set(blobs) == set(keys) - {s}]
            for site in set(shared) - set(sites):
                self._fail(site, "E504")
            if len(sites) == len(keys):
                self.agreement = Agreement(terms, keys)
                self._sealed = {
                    s: {peer: shared[peer][s] for peer in keys if peer != s} for s in keys
                }
        self._stale = False

    @property
    def members(self) -> tuple[str, ...]:
        return self.agreement.members if self.agreement else ()

    @property
    def transcript(self) -> str:
        assert self.agreement is not None
        return self.agreement.transcript.hex()

    def sealed(self, site: str) -> Blobs:
        """The other members' shares for a site, as long as it has not shown that it has them."""
        return self._sealed.get(site, {})

    def begin(self, number: int, shapes: Shapes, digest: str) -> None:
        """Open a round's sum. shapes: of the tensors that it trains; digest: messages.digest of
        what all members are asked."""
        assert self.agreement is not None
        self._shapes = shapes
        size = vector.size(self.contract, shapes)
        self._sum = Sum(self.agreement, number, size, bytes.fromhex(digest))

    def take(self, site: str, masked: bytes) -> None:
        """Add a site's masked update. ProtocolError if it is none of this round."""
        assert self._sum is not None
        self._sum.add(site, masked)
        self._sealed.pop(site, None)

    def missing(self, code: str) -> None:
        """A member fell out with this code: one that is there but lost its secrets needs new ones.
        """
        self._stale |= code in ("E504", "E506")

    def open(self) -> replies.Stages[tuple[Arrays, dict[Metric, float]]]:
        """The weighted mean of the round's updates and metrics. RunError if it does not open."""
        found, agreement = self._sum, self.agreement
        assert found is not None
        assert agreement is not None
        survivors, blobs = tuple(sorted(found.survivors)), Blobs()
        facts: dict[str, Any] = {
            "contract": self.contract.hash, "agreement": self.transcript, "round": found.number,
            "survivors": survivors,
        }
        there: Collection[str] = survivors
        if len(survivors) < len(agreement.members):
            ask = messages.pack(Message(Endorse(**facts)))
            endorsed = yield from self._ask(dict.fromkeys(survivors, ask), Endorsement)
            blobs = {s: b[s] for s, b in endorsed.items() if s in b}
            there = blobs
        ask = messages.pack(Message(Reveal(**facts), blobs=blobs))
        revealed = yield from self._ask(dict.fromkeys(there, ask), Revealed)
        try:
            total = found.open(revealed, vector.factor(self.contract, 1.0))
        except ProtocolError as error:
            raise RunError(
                f"Run stopped at round {found.number}: {error} No adapter released; ε counted for "
                "what was computed.", code=error.code,
            ) from None
        total /= sum(self.contract.weight_share(site) for site in survivors)
        return vector.split(self.contract, self._shapes, total)

    def _ask(
        self, requests: Mapping[str, bytes], kind: Said
    ) -> Generator[Mapping[str, bytes], Mapping[str, replies.Reply], dict[str, Blobs]]:
        """One stage: the blobs of each site that answered as it should; the others fail."""
        came = yield requests
        found: dict[str, Blobs] = {}
        for site, wire in requests.items():
            reply = came.get(site, replies.SILENT)
            self._traffic[1] += len(wire)
            try:
                message = replies.read(self.contract, reply)
                if not isinstance(message.header, kind) or message.header.site != site:
                    raise ProtocolError("The reply is not this site's to this stage.", code="E503")
            except ProtocolError as error:
                self.missing(error.code)
                self._fail(site, error.code)
            else:
                self._traffic[0] += len(reply)
                found[site] = message.blobs
        return found
