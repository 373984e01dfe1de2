"""Secure aggregation: it hides one update within one sum.

For each round the server learns one weighted sum of the sites' updates, and from that round's
messages nothing more about any of them. What it can compute from several sums, such as the
difference of two, is not hidden: see "What it does not hide".

Bonawitz et al. 2017 (doi:10.1145/3133956.3133982) on the complete graph, in its actively secure
form, with keys that are signed by the roster of the contract. Two stages agree on keys for several
rounds, two or three more make each sum:

  keys     each site signs fresh X25519 keys and commitments, for all rounds of the agreement
  shares   each checks every signature, and seals for every other its Shamir shares of two secrets
           a round: the key of its pairwise masks, and the seed of a mask of its own
  mask     each sends its update plus the own mask plus or minus a mask with every other member;
           that mask depends on what both were asked, so it cancels only if it was the same
  endorse  only if a member is missing: each survivor signs the set of survivors
  reveal   each gives, for a survivor, its share of the own mask's seed, for a missing member that
           of the pairwise key: never both for one member and round

The rounds of an agreement share nothing but the sealing keys, which are never revealed: each has
secrets, keys and shares of its own, drawn independently. So it is one instance of the protocol a
round, whose first two stages were sent early; what a round reveals bears on no other round.

Guarantee. Let n be the sites of the roster, t the threshold, and let the server and up to c sites
work together, send what they like and choose it adaptively, with 2 t > n + c and t >= c + 2 (what
`Terms` holds them to). Then for each round there is at most one set U of members, with |U| >= t,
such that what they see of the honest sites' updates can be computed from the weighted sum over the
honest sites of U, at least two. (A weighted sum tells its terms if each has few possible values, or
if one outweighs the rest: client/training/local_round.py and the contract see to that.)
Assumptions: Diffie-Hellman on X25519 with HKDF-SHA256 as a random oracle, Ed25519 unforgeable,
ChaCha20 pseudo-random, ChaCha20-Poly1305 secure, and a roster whose keys are the sites' own; who
put them into the contract is trusted for that, the server is not.

Why. (1) Whoever has no roster key is not in: each site checks all keys against the roster, and the
transcript (terms and all keys) salts every derived key, so members with different views share no
key at all; nothing of another run, attempt or agreement verifies or opens. (2) A site gives shares
of a round for one set only, the first it endorsed or revealed for, with |U| >= t. (3) For a set
that lacks members it wants t endorsements of that very set, so at least t - c honest sites hold it;
two such sets would need 2 (t - c) <= n - c, that is 2 t <= n + c. (4) For the full set it wants
none, which saves a stage. Suppose some honest sites revealed for the full set M, and others for a
smaller U: the first are at most (n - c) - (t - c) = n - t, and with c dishonest ones fewer than t.
So of a member outside U no own mask becomes known, and of a member of U no pairwise key, since for
that t - c honest sites must have held a set without it. (5) Hence the known secrets are the own
masks of U and the pairwise keys of the rest, for one U. Each pairwise mask between two honest
members of U stays unknown and is in both their vectors: only the sum over all of U is free of them,
and that only if all of U were asked to train from the same adapter. (Otherwise a server could give
all but one site an adapter whose updates it knows: Pasquini et al. 2022, arXiv 2111.07380, whose
remedy this is.) This is the hybrid argument of the first paper's Theorem 6.5, whose bounds are
those above.

What it does not hide: who takes part and when, sizes and timing, and the sums themselves. A server
chooses who survives, so it can get one sum with a site and one without it, in two rounds whose
updates hardly differ, and subtract them. The difference is that site's update plus the noise that
all the others added to both sums (So et al. 2023, "Securing Secure Aggregation: Mitigating
Multi-Round Privacy Leakage in Federated Learning", arXiv 2106.03328). What protects a site's
records from differences of sums, and from each sum, is the site's own differential privacy, which
holds for its single update: with less noise a difference shows more, and without differential
privacy all of it. How far one stands out of the noise: simulations/benchmarks/differences.py. It
does not stop a site from adding nonsense to the sum, or from ending a round by withholding or
spoiling shares; a sum that does not open is noticed and not used.

A caller's duty: values are masked once, and a round is masked once. Two agreements know nothing of
each other, and one update in two sums of different sets is laid open by their difference; so would
two updates of one round be, but for the noise. (client/worker/worker.py charges a round once,
whatever the attempt. client/privacy/site_sets.py refuses two sums of different sets from one
adapter, and counts how often the set changes within a run.)

Secrets live in memory only and go as soon as they have served: the sealing key when the shares are
opened, a round's own when it is masked, its shares when they are revealed or a later round is
masked. So who takes a site's memory opens no round that is over; and a site that was restarted has
no secrets, reveals nothing, and counts as missing until the next agreement.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from silotune.common.errors import ProtocolError
from silotune.common.secagg import fixed_point, shamir
from silotune.common.secagg.key_agreement import (
    Agreement,
    Terms,
    commitment,
    derive,
    exchange,
    keys_statement,
    masking_key,
    public_bytes,
    refused,
)
from silotune.common.signing import Sign

NONCE = bytes(12)  # each sealing key seals one message


@dataclass
class _Round:
    """A site's secrets of one round; each is forgotten as soon as it has served."""

    masking: X25519PrivateKey | None
    own_seed: int | None
    shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # of pairwise key, seed
    survivors: frozenset[str] | None = None
    revealed: dict[str, bytes] | None = None


class SecAggParticipant:
    """One site in one agreement. The methods are the stages, in order; any misfit is ProtocolError.

    sign: by the site's Ed25519 key in the roster.
    """

    def __init__(self, terms: Terms, name: str, sign: Sign) -> None:
        if name not in terms.roster:
            raise refused(f"{name} is not in the roster")
        self.terms, self.name, self._sign = terms, name, sign
        self.agreement: Agreement | None = None
        self.ready = False
        self._sealing: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._seeds = [(shamir.draw(), shamir.draw()) for _ in range(terms.rounds)]
        numbers = range(terms.first, terms.first + terms.rounds)
        self._rounds = {
            server_round: _Round(masking_key(terms, name, server_round, pair), own)
            for server_round, (pair, own) in zip(numbers, self._seeds, strict=True)
        }
        body = b"".join(
            (
                public_bytes(self._sealing),
                *(public_bytes(r.masking) for r in self._rounds.values() if r.masking),
                *(
                    commitment(terms, name, n, own)
                    for n, (_, own) in zip(numbers, self._seeds, strict=True)
                ),
            )
        )
        self.keys = body + sign(keys_statement(terms, name, body))
        self._sealed: dict[str, bytes] = {}

    def shares(self, keys: Mapping[str, bytes]) -> dict[str, bytes]:
        """Seal for every other member its shares of this site's secrets, once.

        keys: of all members. The same keys again give the same bytes; others are refused, as a
        second sharing would give the server two sets of shares of one secret.
        """
        found = Agreement(self.terms, keys)
        if keys.get(self.name) != self.keys:
            raise refused("this site's own keys are not among the members'")
        if self.agreement is not None:
            if self.agreement.transcript != found.transcript:
                raise refused("keys were shared with other members already")
            return self._sealed
        places = [found.place(name) for name in found.members]
        split = [
            [shamir.split(secret, self.terms.threshold, places) for secret in seeds]
            for seeds in self._seeds
        ]
        for at, name in enumerate(found.members):
            mine = [tuple(shamir.to_bytes(s[at]) for s in both) for both in split]
            if name == self.name:
                for each, (pairwise, own) in zip(self._rounds.values(), mine, strict=True):
                    each.shares[name] = pairwise, own
                continue
            key = self._seal_key(found, name, self.name, name)
            self._sealed[name] = ChaCha20Poly1305(key).encrypt(
                NONCE, b"".join(map(b"".join, mine)), found.transcript
            )
        self._seeds.clear()
        self.agreement = found
        return self._sealed

    def receive(self, sealed: Mapping[str, bytes]) -> None:
        """Open the shares that every other member sealed for this site. All must be there.

        Each is bound to its sender, receiver and agreement by its key, to its round by its place.
        """
        agreement = self._agreed()
        if self.ready:
            return
        if set(sealed) != set(agreement.members) - {self.name}:
            raise refused("the shares are not those of all other members")
        opened = {name: self._open(agreement, name, sealed[name]) for name in sealed}
        for name, data in opened.items():
            for at, each in enumerate(self._rounds.values()):
                start = 2 * shamir.SIZE * at
                each.shares[name] = (
                    data[start : start + shamir.SIZE],
                    data[start + shamir.SIZE : start + 2 * shamir.SIZE],
                )
        self._sealing = None  # it opens all that was sealed, of rounds that are over too
        self.ready = True

    def _open(self, agreement: Agreement, sender: str, sealed: bytes) -> bytes:
        key = self._seal_key(agreement, sender, sender, self.name)
        try:
            data = ChaCha20Poly1305(key).decrypt(NONCE, sealed, agreement.transcript)
        except InvalidTag:
            data = b""
        if len(data) != 2 * shamir.SIZE * self.terms.rounds:
            raise ProtocolError(
                f"Secure aggregation: what {sender} sealed for this site does not open.",
                code="E507",
            )
        return data

    def _seal_key(self, agreement: Agreement, peer: str, sender: str, receiver: str) -> bytes:
        assert self._sealing is not None
        shared = exchange(self._sealing, agreement.keys[peer].sealing)
        return derive(shared, agreement.transcript, "seal", sender, receiver)

    def check_can_mask(self, server_round: int) -> None:
        """ProtocolError E504 unless this round can be masked: neither it nor a later one was."""
        self._agreed()
        if not self.ready:
            raise refused("the members' shares are not here yet")
        if self._round(server_round).masking is None:
            raise refused(f"round {server_round} was masked before")

    def mask(
        self,
        server_round: int,
        values: NDArray[np.float32],
        factor: float,
        bound: float,
        request_digest: bytes,
    ) -> bytes:
        """The masked update: `values` [d], |v| <= bound, times `factor` in the ring [3 d bytes].

        asked: a digest of what this site was asked, equal at all members if they were asked alike.

        Once a round: two vectors under one mask would give away their difference. E502 if a value
        is not finite or beyond `bound`; the round is used up then too.
        """
        self.check_can_mask(server_round)
        agreement, mine = self._agreed(), self._round(server_round)
        assert mine.masking is not None
        assert mine.own_seed is not None
        masks: list[fixed_point.Mask] = [
            (
                agreement.mask_key(mine.masking, self.name, peer, server_round, request_digest),
                peer < self.name,
            )
            for peer in agreement.members
            if peer != self.name
        ]
        masks.append((agreement.own_mask_key(mine.own_seed, self.name, server_round), False))
        mine.masking = mine.own_seed = None
        for earlier in range(self.terms.first, server_round):
            self._rounds.pop(earlier, None)  # nothing more is revealed of it
        return fixed_point.encode(values, factor, bound, masks)

    @property
    def has_unopened_round(self) -> bool:
        """Whether this site sent a masked update whose sum it has not helped to open."""
        return any(r.masking is None and r.revealed is None for r in self._rounds.values())

    def endorse(self, server_round: int, survivors: Collection[str]) -> bytes:
        """A signature [64 bytes] of the round's set of survivors; only ever of one set."""
        self._settle(server_round, survivors)
        return self._sign(self._agreed().survivors_statement(server_round, survivors))

    def reveal(
        self, server_round: int, survivors: Collection[str], signatures: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """For each member a share [32 bytes]: of the own mask's seed if it survived, else of its
        pairwise key. signatures: the survivors' endorsements; none for the full set.
        """
        mine, agreement = self._settle(server_round, survivors), self._agreed()
        if set(survivors) != set(agreement.members):
            self._check_endorsed(server_round, survivors, signatures)
        if mine.revealed is None:
            mine.revealed = {
                name: mine.shares[name][name in survivors] for name in agreement.members
            }
            mine.shares.clear()
        return mine.revealed

    def _settle(self, server_round: int, survivors: Collection[str]) -> _Round:
        """Hold this round's set of survivors to be this one for good, if it can be one at all."""
        agreement, mine, chosen = self._agreed(), self._round(server_round), frozenset(survivors)
        if mine.masking is not None or self.name not in chosen:
            raise refused(f"this site sent no masked update that counts in round {server_round}")
        if len(chosen) != len(survivors) or not chosen <= set(agreement.members):
            raise refused("the survivors are not members, each once")
        if len(chosen) < self.terms.least:
            raise refused(f"{len(chosen)} sites survived, at least {self.terms.least} must")
        if mine.survivors not in (None, chosen):
            raise refused("another set of survivors was named before")
        mine.survivors = chosen
        return mine

    def _check_endorsed(
        self, server_round: int, survivors: Collection[str], signatures: Mapping[str, bytes]
    ) -> None:
        agreement = self._agreed()
        valid = [
            name
            for name in survivors
            if agreement.endorses(name, signatures.get(name, b""), server_round, survivors)
        ]
        if len(valid) < self.terms.threshold:
            raise refused(
                f"{len(valid)} sites endorsed this set of survivors, {self.terms.threshold} must"
            )

    def _agreed(self) -> Agreement:
        if self.agreement is None:
            raise refused("there is no agreement yet")
        return self.agreement

    def _round(self, server_round: int) -> _Round:
        self.terms.round_index(server_round)
        if server_round not in self._rounds:
            raise refused(f"round {server_round} is over")
        return self._rounds[server_round]
