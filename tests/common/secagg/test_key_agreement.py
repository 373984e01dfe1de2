"""Terms that give a guarantee, and keys that hide something."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from silotune.common.errors import ProtocolError
from silotune.common.secagg import key_agreement
from silotune.common.secagg.aggregator import SecAggAggregator
from silotune.common.secagg.key_agreement import Terms, default_threshold, problem_with
from silotune.common.secagg.participant import SecAggParticipant
from tests.common.secagg.secagg_harness import ASKED, SIZE, Cast, terms

FIELD = 2**255 - 19


def encodings(u: int) -> list[bytes]:
    """All the ways in which 32 bytes can stand for this coordinate."""
    values = [v for v in (u, u + FIELD) if v < 2**255]
    return [(v + high).to_bytes(32, "little") for v in values for high in (0, 2**255)]


def test_the_points_that_are_refused_are_those_of_low_order() -> None:
    """By the library itself: an exchange with one of them is all zeros, which it refuses."""
    for u in key_agreement._LOW_ORDER:
        for public in encodings(u):
            assert key_agreement._is_low(public)
            with pytest.raises(ValueError, match="shared key"):
                X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    for _ in range(200):
        assert not key_agreement._is_low(os.urandom(32))
    near = {(v + step) % FIELD for v in key_agreement._LOW_ORDER for step in (-2, 2)}
    for u in near - key_agreement._LOW_ORDER:
        public = u.to_bytes(32, "little")
        assert not key_agreement._is_low(public)
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))


@pytest.mark.parametrize("at", [0, 1, 2])  # the sealing key, and the masking key of either round
def test_who_publishes_such_a_key_is_named_and_left_out(at: int) -> None:
    cast = Cast(terms(4, 3))
    site = cast.members["b"]
    body = bytearray(site.keys[: -key_agreement.SIGNATURE])
    body[32 * at : 32 * at + 32] = bytes(32)
    signed = site._sign(key_agreement.keys_statement(cast.terms, "b", bytes(body)))
    keys = {name: m.keys for name, m in cast.members.items()}
    bad = keys | {"b": bytes(body) + signed}
    with pytest.raises(ProtocolError, match="a key of b is one that hides nothing"):
        cast.members["a"].shares(bad)
    # Nothing was given away or used up: with the rest, or with an honest b, it goes on.
    assert set(cast.members["a"].shares(keys)) == {"b", "c", "d"}


@pytest.mark.parametrize(
    ("n", "t", "c", "why"),
    [
        (2, 2, 0, "3 to 128"),
        (129, 100, 0, "3 to 128"),
        (0, 0, 0, "3 to 128"),
        (3, 1, 0, "must exceed"),
        (4, 2, 0, "must exceed"),
        (4, 2, -1, "max_colluding_sites cannot be -1"),
        (5, 6, 0, "more than"),
        (6, 4, 2, "must exceed"),
        (4, 4, 3, "at least two"),
        (3, 3, 2, "at least two"),
        (3, 3, 1, ""),
        (5, 3, 0, ""),
        (6, 4, 1, ""),
        (128, 86, 43, ""),
    ],
)
def test_numbers_that_give_no_guarantee_are_refused(n: int, t: int, c: int, why: str) -> None:
    found = problem_with(n, t, c)
    assert (why in found) if why else not found


@pytest.mark.parametrize("n", range(3, 129))
def test_the_default_withstands_almost_a_third_and_loses_as_many(n: int) -> None:
    threshold = default_threshold(n)
    assert not problem_with(n, threshold, max(0, (n - 1) // 3 - 1))
    assert 2 * threshold > n + (n - 1) // 3


def test_a_key_that_stands_twice_is_one_key_in_either_case() -> None:
    key = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    roster = {"a": key, "b": key.upper(), "c": "0" * 64}
    with pytest.raises(ProtocolError, match="twice"):
        Terms("c" * 64, roster, "run-1", 1, 1, 1, threshold=3)


def test_terms_that_say_nothing_of_colluders_and_quorum_ask_for_no_more_than_the_threshold() -> (
    None
):
    roster = terms(3, 2).roster
    found = Terms("0" * 64, roster, "run", 1, 1, 1, 2)
    assert (found.least, found.max_colluding_sites) == (2, 0)


def test_every_fact_of_the_terms_is_signed() -> None:
    """Or a message of one agreement would do for another."""
    first = terms(4, 3)
    facts = vars(first)
    others = {
        "contract": "d" * 64,
        "run": "run-2",
        "attempt": 2,
        "first": 2,
        "rounds": 3,
        "threshold": 4,
        "max_colluding_sites": 1,
        "min_survivors": 4,
        "roster": dict(first.roster) | {"a": "0" * 64},
    }
    assert set(others) == set(facts)
    digests = {Terms(**{**facts, key: value}).digest() for key, value in others.items()}
    assert len(digests | {first.digest()}) == len(facts) + 1


def test_a_sum_is_opened_once() -> None:
    cast = Cast(terms(3, 3)).agree()
    masked = {name: cast.mask(name) for name in "abc"}
    total = SecAggAggregator(cast.agreement, 1, SIZE, ASKED)
    for name, sent in masked.items():
        total.add(name, sent)
    reveals = {name: m.reveal(1, "abc", {}) for name, m in cast.members.items()}
    total.open(reveals, 1.0)
    with pytest.raises(ProtocolError, match="opened before"):
        total.open(reveals, 1.0)


def test_a_name_that_is_not_in_the_roster_has_no_part() -> None:
    with pytest.raises(ProtocolError, match="not in the roster"):
        SecAggParticipant(terms(3, 3), "x", lambda statement: bytes(64))
