"""What sites agree on before sums can be masked: terms, signed keys, and what follows from them.

Why it is enough: common/secagg/participant.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from silotune.common.errors import ProtocolError
from silotune.common.secagg import fixed_point, shamir
from silotune.common.signing import verifies

LEAST_SITES = 3
MOST_ROUNDS = 64  # of one agreement
KEY = 32
SIGNATURE = 64
_FIELD = 2**255 - 19
# The u-coordinates of Curve25519's points of low order (RFC 7748, section 7): an exchange with one
# gives what everybody knows.
_LOW_ORDER = {
    0,
    1,
    _FIELD - 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
}


def refused(why: str) -> ProtocolError:
    return ProtocolError(f"Secure aggregation: {why}.", code="E504")


def default_threshold(sites: int) -> int:
    """floor(2 n / 3) + 1: with 2 t > n + c, up to a third of the sites may collude."""
    return 2 * sites // 3 + 1


def problem_with(sites: int, threshold: int, max_colluding_sites: int) -> str:
    """Why these numbers give no guarantee; '' if they do."""
    if not LEAST_SITES <= sites <= fixed_point.MOST_SITES:
        return f"it needs {LEAST_SITES} to {fixed_point.MOST_SITES} sites, not {sites}"
    if max_colluding_sites < 0:
        return f"max_colluding_sites cannot be {max_colluding_sites}"
    if threshold > sites:
        return f"a threshold of {threshold} is more than the {sites} sites"
    if 2 * threshold <= sites + max_colluding_sites:
        return (
            f"2 × threshold must exceed sites + max_colluding_sites, and 2 × {threshold} does not "
            f"exceed {sites} + {max_colluding_sites}"
        )
    if threshold < max_colluding_sites + 2:
        return (
            f"a sum of {threshold} sites, of which {max_colluding_sites} may collude, does not "
            "hide one update among at least two"
        )
    return ""


@dataclass(frozen=True)
class Terms:
    """What one agreement on keys is for; every signature of it covers all of this.

    roster: name -> Ed25519 public key (hexadecimal). fewest: how many must survive a round, beside
    the threshold. first, rounds: the rounds it serves. ProtocolError E504 if they give no
    guarantee.
    """

    contract: str
    roster: Mapping[str, str]
    run: str
    attempt: int
    first: int
    rounds: int
    threshold: int
    max_colluding_sites: int = 0
    min_survivors: int = 0

    def __post_init__(self) -> None:
        why = problem_with(len(self.roster), self.threshold, self.max_colluding_sites)
        if len({key.lower() for key in self.roster.values()}) < len(self.roster):
            why = "a key stands twice in the roster"
        if not 1 <= self.rounds <= MOST_ROUNDS:
            why = f"an agreement serves 1 to {MOST_ROUNDS} rounds"
        if why:
            raise refused(why)

    @property
    def least(self) -> int:
        """How many members, and how many survivors of a round, there must be."""
        return max(self.threshold, self.min_survivors)

    def digest(self) -> bytes:
        facts = {**vars(self), "roster": sorted(self.roster.items())}
        return hashlib.sha256(b"silotune secagg 1\n" + _canonical(facts)).digest()

    @property
    def sealed_size(self) -> int:
        """Bytes of what a member seals for another: two shares a round, and the AEAD's tag."""
        return 2 * shamir.SIZE * self.rounds + 16

    def serves(self, server_round: int) -> bool:
        return self.first <= server_round < self.first + self.rounds

    def round_index(self, server_round: int) -> int:
        """The 0-based place of a round in the agreement; ProtocolError if it is not in it."""
        if not self.serves(server_round):
            raise refused(f"round {server_round} is not in this agreement")
        return server_round - self.first


class PublicKeys(NamedTuple):
    """What a site publishes: sealing key, and a masking key and a commitment for each round."""

    sealing: bytes
    masking: tuple[bytes, ...]
    commitments: tuple[bytes, ...]
    signature: bytes

    @classmethod
    def read(cls, data: bytes, rounds: int) -> Self:
        if len(data) != KEY * (1 + 2 * rounds) + SIGNATURE:
            raise refused("keys have another length than the agreement's rounds need")
        parts = [data[at : at + KEY] for at in range(0, len(data) - SIGNATURE, KEY)]
        return cls(
            parts[0], tuple(parts[1 : 1 + rounds]), tuple(parts[1 + rounds :]), data[-SIGNATURE:]
        )

    def body(self) -> bytes:
        return b"".join((self.sealing, *self.masking, *self.commitments))


class Agreement:
    """The members' verified keys, and the transcript that stands for all that was agreed.

    keys: name -> what that site published. Raises ProtocolError E504 unless every one is signed
    for these terms by its key in the roster, and there are enough of them.
    """

    def __init__(self, terms: Terms, keys: Mapping[str, bytes]) -> None:
        self.terms = terms
        self.members = tuple(sorted(keys))
        self.keys = {name: PublicKeys.read(keys[name], terms.rounds) for name in self.members}
        for name in self.members:
            check_keys(terms, name, keys[name])
        if len(self.members) < terms.least:
            raise refused(f"{len(self.members)} sites gave keys, at least {terms.least} must")
        facts = [(name, keys[name].hex()) for name in self.members]
        self.transcript = hashlib.sha256(terms.digest() + _canonical(facts)).digest()

    def place(self, name: str) -> int:
        """Where a member's shares lie."""
        return self.members.index(name) + 1

    def mask_key(
        self,
        secret: X25519PrivateKey,
        mine: str,
        peer: str,
        server_round: int,
        request_digest: bytes,
    ) -> bytes:
        """The seed of the two members' mask of a round, for what was asked of both."""
        shared = exchange(secret, self.keys[peer].masking[self.terms.round_index(server_round)])
        pair = sorted((mine, peer))
        return derive(shared, self.transcript, "mask", server_round, *pair, request_digest.hex())

    def own_mask_key(self, seed: int, name: str, server_round: int) -> bytes:
        return derive(shamir.to_bytes(seed), self.transcript, "own mask", server_round, name)

    def endorses(
        self, name: str, signature: bytes, server_round: int, survivors: Collection[str]
    ) -> bool:
        """Whether this is the member's signature of exactly these survivors of the round."""
        statement = self.survivors_statement(server_round, survivors)
        return verifies(self.terms.roster[name], signature.hex(), statement)

    def survivors_statement(self, server_round: int, survivors: Collection[str]) -> bytes:
        """What a site signs to say that these, and no others, survived the round."""
        facts = [self.transcript.hex(), server_round, sorted(survivors)]
        return b"silotune secagg survivors 1\n" + _canonical(facts)


def check_keys(terms: Terms, name: str, keys: bytes) -> None:
    """ProtocolError E504 unless the site's roster key signed its published keys for `terms`."""
    if name not in terms.roster:
        raise refused("keys came from a name that is not in the roster")
    found = PublicKeys.read(keys, terms.rounds)
    if any(_is_low(key) for key in (found.sealing, *found.masking)):
        raise refused(f"a key of {name} is one that hides nothing")
    statement = keys_statement(terms, name, found.body())
    if not verifies(terms.roster[name], found.signature.hex(), statement):
        raise refused(f"the keys of {name} are not signed by its key in the roster")


def keys_statement(terms: Terms, name: str, body: bytes) -> bytes:
    return b"silotune secagg keys 1\n" + terms.digest() + _canonical(name) + body


def masking_key(terms: Terms, name: str, server_round: int, seed: int) -> X25519PrivateKey:
    """The private key of a site's pairwise masks of a round, from the secret that is shared."""
    data = derive(shamir.to_bytes(seed), terms.digest(), "masking key", server_round, name)
    return X25519PrivateKey.from_private_bytes(data)


def commitment(terms: Terms, name: str, server_round: int, seed: int) -> bytes:
    """By which shares of an own mask's seed are checked; it says nothing about a uniform seed."""
    return derive(shamir.to_bytes(seed), terms.digest(), "commitment", server_round, name)


def derive(secret: bytes, salt: bytes, *what: str | int) -> bytes:
    """A key of 32 bytes for one purpose (RFC 5869)."""
    info = b"silotune secagg 1\n" + _canonical(what)
    return HKDF(algorithm=SHA256(), length=KEY, salt=salt, info=info).derive(secret)


def exchange(secret: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise refused("a public key is not one") from None


def _is_low(public: bytes) -> bool:
    # The highest bit does not count (RFC 7748, section 5).
    return (int.from_bytes(public, "little") & (2**255 - 1)) % _FIELD in _LOW_ORDER


def public_bytes(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _canonical(facts: object) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
