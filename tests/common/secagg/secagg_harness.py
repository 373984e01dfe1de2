"""Sites that agree on keys, an honest server that adds up, and all that an eavesdropper can know.

Secrets are drawn from the operating system, as in earnest: no test may depend on their values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from numpy.typing import NDArray

from silotune.common.errors import ProtocolError
from silotune.common.secagg import fixed_point, participant, shamir
from silotune.common.secagg import key_agreement as agreements
from silotune.common.secagg.aggregator import SecAggAggregator
from silotune.common.secagg.key_agreement import (
    Agreement,
    Terms,
    commitment,
    masking_key,
    public_bytes,
    refused,
)
from silotune.common.secagg.participant import SecAggParticipant

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
BOUND = 0.5
ASKED = bytes(31) + b"a"  # the digest of what all sites are asked
SIZE = 40  # a wrong mask goes unnoticed with probability 2^-40


def names(n: int) -> list[str]:
    return [chr(ord("a") + i) for i in range(n)]


def signing_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def terms(n: int, threshold: int, max_colluding_sites: int = 0, **more: Any) -> Terms:
    roster = {m: signing_key(m).public_key().public_bytes_raw().hex() for m in names(n)}
    facts: dict[str, Any] = {
        "contract": "c" * 64,
        "run": "run-1",
        "attempt": 1,
        "first": 1,
        "rounds": 2,
    }
    return Terms(
        roster=roster,
        threshold=threshold,
        max_colluding_sites=max_colluding_sites,
        **(facts | more),
    )


def update(name: str, server_round: int = 1, size: int = SIZE) -> Floats:
    seed = int.from_bytes(hashlib.sha256(f"{name} {server_round}".encode()).digest()[:8], "big")
    drawn = np.random.default_rng(seed).uniform(-BOUND, BOUND, size)
    return drawn.astype(np.float32).clip(-BOUND, BOUND)


def factor_of(n: int) -> float:
    return fixed_point.factor(BOUND, 1 / n, n)


def units(values: Floats, factor: float) -> Ints:
    """What a site's update is in the ring, computed without the ring."""
    return np.array([round(float(v) * factor) for v in values], np.int64)


def centred(words: NDArray[np.uint32]) -> Ints:
    low = words.astype(np.int64) % (1 << fixed_point.BITS)
    return np.where(low >= 1 << (fixed_point.BITS - 1), low - (1 << fixed_point.BITS), low)


class Cast:
    """The sites of one agreement, and what passed between them and the server."""

    def __init__(
        self,
        agreed: Terms,
        who: Iterable[str] | None = None,
        member: type[SecAggParticipant] = SecAggParticipant,
    ) -> None:
        self.terms = agreed
        self.members = {
            m: member(agreed, m, signing_key(m).sign) for m in who or sorted(agreed.roster)
        }
        self.secrets = {m: list(site._seeds) for m, site in self.members.items()}
        self.keys = {m: site.keys for m, site in self.members.items()}
        self.sealed: dict[str, dict[str, bytes]] = {}
        self.masked: dict[tuple[str, int], bytes] = {}

    def agree(self, stop: Collection[str] = ()) -> Cast:
        """Both stages; those in `stop` give keys, and no shares."""
        for name, site in self.members.items():
            if name not in stop:
                self.sealed[name] = dict(site.shares(self.keys))
        for name, site in self.members.items():
            if name not in stop:
                site.receive({m: s[name] for m, s in self.sealed.items() if m != name})
        return self

    @property
    def agreement(self) -> Agreement:
        return Agreement(self.terms, self.keys)

    def mask(
        self,
        name: str,
        server_round: int = 1,
        values: Floats | None = None,
        request_digest: bytes = ASKED,
    ) -> bytes:
        given, factor = update(name, server_round), factor_of(len(self.terms.roster))
        sent = self.members[name].mask(
            server_round, given if values is None else values, factor, BOUND, request_digest
        )
        self.masked[name, server_round] = sent
        return sent

    def truth(self, name: str, server_round: int = 1) -> Ints:
        return units(update(name, server_round), factor_of(len(self.terms.roster)))

    def endorsed(
        self, by: Iterable[str], among: Collection[str], server_round: int = 1
    ) -> dict[str, bytes]:
        return {name: self.members[name].endorse(server_round, among) for name in by}

    def finish(
        self,
        server_round: int,
        masked: Mapping[str, bytes],
        size: int = SIZE,
        silent: Collection[str] = (),
        mute: Collection[str] = (),
    ) -> Ints:
        """What an honest server does with these updates. `silent` endorse nothing, `mute` reveal
        nothing."""
        total = SecAggAggregator(self.agreement, server_round, size, ASKED)
        for name, sent in masked.items():
            total.add(name, sent)
        survivors = sorted(masked)
        signatures = {}
        if set(survivors) != set(self.members):
            signatures = self.endorsed(
                [m for m in survivors if m not in silent], survivors, server_round
            )
        reveals = {
            name: self.members[name].reveal(server_round, survivors, signatures)
            for name in survivors
            if name not in mute and name not in silent
        }
        # Sums are below 2^24: float32 holds each exactly.
        return np.asarray(total.open(reveals, 1.0).astype(np.int64))


class Eavesdropper:
    """A server with its colluding sites: collects shares of one round, opens what they open."""

    def __init__(self, cast: Cast, server_round: int = 1, colluding: Iterable[str] = ()) -> None:
        self.cast, self.server_round, self.agreement = cast, server_round, cast.agreement
        self.shares: dict[tuple[str, bool], dict[int, int]] = {}  # (whose, own mask?): by place
        self.colluding = set(colluding)
        for giver in self.colluding:
            for name, both in cast.members[giver]._rounds[server_round].shares.items():
                for own in (False, True):
                    self._hold(giver, name, own, both[own])

    def _hold(self, giver: str, name: str, own: bool, share: bytes) -> None:
        held = self.shares.setdefault((name, own), {})
        held[self.agreement.place(giver)] = shamir.from_bytes(share)

    def hear(self, giver: str, survivors: Collection[str], revealed: Mapping[str, bytes]) -> None:
        for name, share in revealed.items():
            self._hold(giver, name, name in survivors, share)

    def secret(self, name: str, own: bool) -> int | None:
        """The seed of a member's own mask, or of its pairwise key, if enough shares give it."""
        place = self.cast.terms.round_index(self.server_round)
        if name in self.colluding:
            return self.cast.secrets[name][place][own]
        held = self.shares.get((name, own), {})
        if len(held) < self.cast.terms.threshold:
            return None
        found = shamir.join(dict(sorted(held.items())[: self.cast.terms.threshold]))
        return found if self._published(name, own, found, place) else None

    def _published(self, name: str, own: bool, found: int, place: int) -> bool:
        keys, facts = self.agreement.keys[name], (self.cast.terms, name, self.server_round, found)
        if own:
            return commitment(*facts) == keys.commitments[place]
        return public_bytes(masking_key(*facts)) == keys.masking[place]

    def sum_of(self, among: Collection[str]) -> Ints | None:
        """The sum of these members' updates, if every mask that is left on it is known."""
        sent = [self.cast.masked.get((name, self.server_round)) for name in among]
        total = fixed_point.Total(len(sent[0] or b"") // fixed_point.WIDTH)
        for each in sent:
            if each is None:
                return None
            total.add(each)
        masks: list[fixed_point.Mask] = []
        for name in among:
            seed = self.secret(name, own=True)
            if seed is None:
                return None
            masks.append((self.agreement.own_mask_key(seed, name, self.server_round), True))
            for peer in set(self.agreement.members) - set(among):
                key = self._mask_key(name, peer)
                if key is None:
                    return None
                masks.append((key, name < peer))
        total.mask(masks)
        return centred(total.words)

    def _mask_key(self, name: str, peer: str) -> bytes | None:
        for mine, other in ((name, peer), (peer, name)):
            seed = self.secret(mine, own=False)
            if seed is not None:
                key = masking_key(self.cast.terms, mine, self.server_round, seed)
                return self.agreement.mask_key(key, mine, other, self.server_round, ASKED)
        return None


def outcome(cast: Cast, *arguments: Any, **more: Any) -> Ints | ProtocolError:
    try:
        return cast.finish(*arguments, **more)
    except ProtocolError as error:
        return error


# --- sites that lack one defence --------------------------------------------------------------

Patch = pytest.MonkeyPatch


def settling(without: str) -> type[SecAggParticipant]:
    """A site that leaves out one check of a set of survivors."""

    class Settling(SecAggParticipant):
        def _settle(self, server_round: int, survivors: Collection[str]) -> participant._Round:
            agreed, mine, chosen = self._agreed(), self._round(server_round), frozenset(survivors)
            checks = {
                "it counts": mine.masking is None and self.name in chosen,
                "each once": len(chosen) == len(survivors),
                "members": chosen <= set(agreed.members),
                "enough": len(chosen) >= self.terms.least,
                "one set": mine.survivors in (None, chosen),
            }
            assert without in checks
            if not all(ok for check, ok in checks.items() if check != without):
                raise refused("this was not left out")
            mine.survivors = chosen
            return mine

    return Settling


def no_set_is_for_good(_: Patch) -> type[SecAggParticipant]:
    """The check, and what follows from it: shares that are gone when one set had them."""

    class Forgetful(settling("one set")):  # type: ignore[misc]
        def reveal(
            self, server_round: int, survivors: Collection[str], signatures: Mapping[str, bytes]
        ) -> dict[str, bytes]:
            mine = self._round(server_round)
            kept, mine.revealed = dict(mine.shares), None
            found = dict(super().reveal(server_round, survivors, signatures))
            mine.shares.update(kept)
            return found

    return Forgetful


def names_are_not_looked_up(patch: Patch) -> type[SecAggParticipant]:
    real = agreements.check_keys
    patch.setattr(
        agreements,
        "check_keys",
        lambda agreed, name, keys: name in agreed.roster and real(agreed, name, keys),
    )
    return SecAggParticipant


def signatures_of_keys_are_not_checked(patch: Patch) -> type[SecAggParticipant]:
    patch.setattr(agreements, "verifies", lambda *_: True)
    return SecAggParticipant


def sealing_keys_have_no_direction(_: Patch) -> type[SecAggParticipant]:
    class Symmetric(SecAggParticipant):
        def _seal_key(self, agreement: Agreement, peer: str, sender: str, receiver: str) -> bytes:
            first, second = sorted((sender, receiver))
            return super()._seal_key(agreement, peer, first, second)

    return Symmetric


def terms_are_not_checked(patch: Patch) -> type[SecAggParticipant]:
    patch.setattr(agreements, "problem_with", lambda *_: "")
    return SecAggParticipant


def sites_endorse_many_sets(_: Patch) -> type[SecAggParticipant]:
    class Agreeable(SecAggParticipant):
        def endorse(self, server_round: int, survivors: Collection[str]) -> bytes:
            return self._sign(self._agreed().survivors_statement(server_round, survivors))

    return Agreeable


def endorsements_are_not_counted(_: Patch) -> type[SecAggParticipant]:
    class Trusting(SecAggParticipant):
        def _check_endorsed(self, *_: object) -> None:
            pass

    return Trusting


def endorsements_are_not_verified(patch: Patch) -> type[SecAggParticipant]:
    patch.setattr(Agreement, "endorses", lambda *_: True)
    return SecAggParticipant


def a_name_may_count_twice(_: Patch) -> type[SecAggParticipant]:
    return settling("each once")


def endorsements_name_no_round(patch: Patch) -> type[SecAggParticipant]:
    real = Agreement.survivors_statement
    patch.setattr(Agreement, "survivors_statement", lambda self, _, who: real(self, 0, who))
    return SecAggParticipant


def endorsements_name_no_agreement(patch: Patch) -> type[SecAggParticipant]:
    def statement(_: Agreement, server_round: int, who: Iterable[str]) -> bytes:
        return f"{server_round} {sorted(who)}".encode()

    patch.setattr(Agreement, "survivors_statement", statement)
    return SecAggParticipant


def too_few_are_enough(_: Patch) -> type[SecAggParticipant]:
    return settling("enough")


def there_is_no_own_mask(patch: Patch) -> type[SecAggParticipant]:
    patch.setattr(Agreement, "own_mask_key", lambda *_: bytes(32))
    return SecAggParticipant


def values_are_not_checked(patch: Patch) -> type[SecAggParticipant]:
    real = fixed_point.quantise
    patch.setattr(fixed_point, "quantise", lambda values, factor, _: real(values, factor, np.inf))
    return SecAggParticipant


def masks_are_used_again(_: Patch) -> type[SecAggParticipant]:
    class Repeating(SecAggParticipant):
        def mask(self, server_round: int, *arguments: Any) -> bytes:
            mine = self._rounds[server_round]
            kept = mine.masking, mine.own_seed
            sent = super().mask(server_round, *arguments)
            mine.masking, mine.own_seed = kept
            return sent

    return Repeating


def secrets_are_shared_with_whoever_asks(_: Patch) -> type[SecAggParticipant]:
    class Resharing(SecAggParticipant):
        def shares(self, keys: Mapping[str, bytes]) -> dict[str, bytes]:
            if self.agreement is None:
                self.kept, self.key = list(self._seeds), self._sealing
            else:
                self.agreement, self.ready, self._sealing, self._sealed = None, False, self.key, {}
                self._seeds = list(self.kept)
                self._rounds = {
                    server_round: participant._Round(
                        agreements.masking_key(self.terms, self.name, server_round, pair), own
                    )
                    for server_round, (pair, own) in enumerate(self.kept, start=1)
                }
            return super().shares(keys)

    return Resharing


def seeds_are_not_compared(patch: Patch) -> type[SecAggParticipant]:
    patch.setattr(
        SecAggAggregator,
        "_own",
        lambda self, name, seed: [
            (self.agreement.own_mask_key(seed, name, self.server_round), True)
        ],
    )
    return SecAggParticipant


def any_point_is_a_key(patch: Patch) -> type[SecAggParticipant]:
    def exchange(secret: X25519PrivateKey, public: bytes) -> bytes:
        try:
            return secret.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            return bytes(32)  # what X25519 gives without the check that RFC 7748 leaves open

    for module in (agreements, participant):
        patch.setattr(module, "exchange", exchange)
    patch.setattr(agreements, "_is_low", lambda public: False)
    return SecAggParticipant


def masks_are_for_whatever_was_asked(patch: Patch) -> type[SecAggParticipant]:
    real = Agreement.mask_key

    def mask_key(
        self: Agreement, secret: X25519PrivateKey, mine: str, peer: str, server_round: int, _: bytes
    ) -> bytes:
        return real(self, secret, mine, peer, server_round, b"")

    patch.setattr(Agreement, "mask_key", mask_key)
    return SecAggParticipant
