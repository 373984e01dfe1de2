"""The server's side of secure aggregation in one run, without a network.

Its stages are generators: they yield what to ask which site, and are sent what came back
(server/rounds/exchange.py). Nothing here can see an update by itself; why is in
common/secagg/participant.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any

from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.errors import ErrorCode, ProtocolError, RunError
from silotune.common.protocol import messages, packing
from silotune.common.protocol.messages import (
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
from silotune.common.protocol.tensors import Shapes
from silotune.common.secagg.aggregator import SecAggAggregator
from silotune.common.secagg.key_agreement import Agreement, check_keys
from silotune.server.rounds.exchange import RoundProtocol, RoundTraffic
from silotune.server.storage.stored_agreement import Agreed

# A member has nothing for this agreement: it was charged under another one, or started again.
NO_SECRETS = (
    ErrorCode.REPLY_LOST,
    ErrorCode.SECAGG_STEP_REFUSED,
    ErrorCode.SECAGG_SECRETS_LOST,
    ErrorCode.SEALED_SHARE_INVALID,
)
# A survivor will give no share of this round, ever.
LOST_AT_OPENING = (*NO_SECRETS, ErrorCode.SITE_SET_REFUSED)
ATTEMPTS = 900_000  # a run that is begun again must not repeat what its sites were asked before
LONGEST_WAIT = 16  # rounds until a site that was left out is asked again


class LostSumError(RunError):
    """A round's masked updates were charged, and too few sites can open their sum, now or ever."""


class ServerMasking:
    """The agreement on keys that is in force, and who has to wait for another one."""

    def __init__(self, contract: Contract, run_id: str, exchange: RoundTraffic) -> None:
        self.contract, self.run_id, self._exchange = contract, run_id, exchange
        self.agreement: Agreement | None = None
        self._attempt = secrets.randbelow(ATTEMPTS)
        self._published: Blobs = {}
        self._sealed: dict[str, Blobs] = {}  # by receiver
        self._answered: set[str] = set()
        self.lost: set[str] = set()  # members that have no secrets of this agreement
        self._waits: dict[str, tuple[int, int]] = {}  # left out: (not before this round, how long)
        self._just_restored = False

    def agree(
        self, sites: Collection[str], server_round: int, needed: Collection[str] = ()
    ) -> RoundProtocol[bool]:
        """Have the sites agree on keys for the rounds from `server_round` on, if that is needed:
        there is no agreement for this round, a site is left out that may be back, or one of the
        `needed` is no member. Whether they did.

        The first round after `restore` keeps the agreement where it can: its members may have been
        charged under it, and a site charges a round once. Who is new joins at the next round.

        Whoever fails a stage is left out and the rest start again; a site that keeps failing is
        waited for longer each time. RunError if too few agree and no earlier agreement serves.
        """
        serves = (
            self.agreement is not None
            and self.agreement.terms.serves(server_round)
            and not self.dead
            and set(needed) <= set(self.members)
        )
        keeps, self._just_restored = self._just_restored, False
        out = {s for s in sites if s not in self.members or s in self.lost}
        back = any(server_round >= self._waits.get(s, (0, 0))[0] for s in out)
        if serves and (keeps or not back):
            return False
        agreed, keys = None, dict[str, bytes]()
        there = list(sites)
        while agreed is None:
            self._attempt += 1
            step: dict[str, Any] = {
                "contract": self.contract.hash,
                "run": self.run_id,
                "round": server_round,
                "attempt": self._attempt,
            }
            terms = self.contract.terms(self.run_id, server_round, self._attempt)
            keys = yield from self._keys(there, step)
            if len(keys) < terms.least:
                break
            ask = messages.pack(Message(Share(**step), blobs=keys))
            shared = yield from self._exchange.ask(dict.fromkeys(keys, ask), Shares)
            for site, blobs in shared.items():
                if {s: len(b) for s, b in blobs.items()} == {
                    s: terms.sealed_size for s in keys if s != site
                }:
                    continue
                self._exchange.fail(site, ErrorCode.SECAGG_STEP_REFUSED)
            there = [s for s in shared if s not in self._exchange.failed]
            if len(there) == len(keys):
                agreed, self._published = Agreement(terms, keys), keys
                self._sealed = {
                    s: {peer: shared[peer][s] for peer in keys if peer != s} for s in keys
                }
        if agreed is not None:
            self.agreement, self.lost, self._answered = agreed, set(), set()
        elif not serves:
            raise RunError(
                f"{len(keys)} of {len(self.contract.sites)} sites agreed on keys "
                f"({self._exchange.reasons()}), secure aggregation needs {terms.least}.",
                code=ErrorCode.NO_ANSWER,
            )
        for site in out | (set(sites) - set(self.members)):
            wait = min(2 * self._waits.get(site, (0, 0))[1] or 1, LONGEST_WAIT)
            self._waits[site] = server_round + wait, wait
        return agreed is not None

    def agreed(self) -> Agreed:
        """What a run needs to go on under this agreement after the server was started again. All of
        it passed through the server: nothing in it is secret from it."""
        assert self.agreement is not None
        return Agreed(
            first=self.agreement.terms.first,
            attempt=self.agreement.terms.attempt,
            keys=self._published,
            sealed=self._sealed,
        )

    def restore(self, found: Agreed | None) -> None:
        if found is not None:
            terms = self.contract.terms(self.run_id, found.first, found.attempt)
            self.agreement = Agreement(terms, found.keys)
            self._published, self._sealed = found.keys, found.sealed
            self._just_restored = True

    def _keys(
        self, sites: Collection[str], step: dict[str, Any]
    ) -> RoundProtocol[dict[str, bytes]]:
        """The first stage: the keys that are signed by the roster's."""
        terms = self.contract.terms(self.run_id, step["round"], step["attempt"])
        ask = messages.pack(Message(Agree(**step)))
        offered = yield from self._exchange.ask(dict.fromkeys(sites, ask), Keys)
        keys = {}
        for site, blobs in offered.items():
            try:
                check_keys(terms, site, blobs.get(site, b""))
            except ProtocolError as error:
                self._exchange.fail(site, error.code)
            else:
                keys[site] = blobs[site]
        return keys

    @property
    def members(self) -> tuple[str, ...]:
        return self.agreement.members if self.agreement else ()

    @property
    def dead(self) -> bool:
        """Whether fewer members have their secrets than a sum needs: others were started again."""
        assert self.agreement is not None
        return len(set(self.members) - self.lost) < self.agreement.terms.least

    @property
    def transcript(self) -> str:
        assert self.agreement is not None
        return self.agreement.transcript.hex()

    def sealed(self, site: str) -> Blobs:
        """The other members' shares for a site, until it has shown that it has them."""
        return {} if site in self._answered else self._sealed.get(site, {})

    def has_answered(self, site: str) -> None:
        """A masked update came: the site has its shares, and needs no other agreement."""
        self._answered.add(site)
        self._waits.pop(site, None)

    def has_failed(self, site: str, code: ErrorCode) -> None:
        """A member that is there but has no secrets waits for another agreement."""
        if code in NO_SECRETS:
            self.lost.add(site)


class MaskedRound:
    """One round's masked updates: `take` each, then `open` their sum.

    shapes: of the tensors that the round trains. digest: messages.digest of what all are asked.
    """

    def __init__(
        self,
        contract: Contract,
        agreement: Agreement,
        server_round: int,
        shapes: Shapes,
        digest: str,
        exchange: RoundTraffic,
    ) -> None:
        self.contract, self.agreement, self.server_round = contract, agreement, server_round
        self._shapes, self._exchange = shapes, exchange
        self._sum = SecAggAggregator(
            agreement, server_round, packing.size(contract, shapes), bytes.fromhex(digest)
        )

    def take(self, site: str, masked: bytes) -> None:
        """Add a site's masked update. ProtocolError if it is none of this round."""
        self._sum.add(site, masked)

    def open(self) -> RoundProtocol[tuple[Arrays, dict[Metric, float]]]:
        """The weighted mean of the round's updates and metrics. RunError if it does not open;
        LostSumError if it never will, because survivors have lost their secrets or refuse."""
        survivors = tuple(sorted(self._sum.survivors))
        threshold = self.contract.threshold
        facts: dict[str, Any] = {
            "contract": self.contract.hash,
            "agreement": self.agreement.transcript.hex(),
            "round": self.server_round,
            "survivors": survivors,
        }
        signed, there = Blobs(), list(survivors)
        if len(survivors) < len(self.agreement.members):
            ask = messages.pack(Message(Endorse(**facts)))
            answered = yield from self._exchange.ask(
                dict.fromkeys(survivors, ask), Endorsement, enough=threshold
            )
            for site, blobs in answered.items():
                if self.agreement.endorses(
                    site, blobs.get(site, b""), self.server_round, survivors
                ):
                    signed[site] = blobs[site]
                else:
                    self._exchange.fail(site, ErrorCode.SECAGG_STEP_REFUSED)
            there = list(signed)
            if len(signed) < threshold:
                raise self._closed(f"{len(signed)} sites endorsed the survivors, {threshold} must")
        ask = messages.pack(Message(Reveal(**facts), blobs=signed))
        revealed = yield from self._exchange.ask(
            dict.fromkeys(there, ask), Revealed, enough=threshold
        )
        try:
            total = self._sum.open(revealed, packing.factor(self.contract, 1.0))
        except ProtocolError as error:
            raise self._closed(str(error).removesuffix("."), error.code) from None
        total /= sum(self.contract.weight_share(site) for site in survivors)
        return packing.split(self.contract, self._shapes, total)

    def _closed(self, why: str, code: ErrorCode = ErrorCode.NO_ANSWER) -> RunError:
        failed = self._exchange.failed
        left = [s for s in self._sum.survivors if failed.get(s) not in LOST_AT_OPENING]
        kind = LostSumError if len(left) < self.contract.threshold else RunError
        return kind(
            f"the masked sum of {len(self._sum.survivors)} sites does not open: {why} "
            f"({self._exchange.reasons()}).",
            code=code,
        )
