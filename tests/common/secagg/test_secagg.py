"""The protocol among honest sites: an exact sum, or a refusal, whoever drops out and when."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.errors import ProtocolError
from silotune.common.secagg import fixed_point, participant, shamir
from silotune.common.secagg import key_agreement as agreements
from silotune.common.secagg.aggregator import SecAggAggregator
from silotune.common.secagg.key_agreement import Agreement, PublicKeys, Terms
from silotune.common.secagg.participant import SecAggParticipant
from tests.common.secagg.secagg_harness import (
    ASKED,
    BOUND,
    SIZE,
    Cast,
    Ints,
    factor_of,
    names,
    outcome,
    signing_key,
    terms,
    units,
    update,
)

FUZZ = settings(deadline=None, max_examples=150, derandomize=True, database=None)


def refused(call: Callable[[], object], why: str | None = None, code: str = "E504") -> None:
    with pytest.raises(ProtocolError, match=why) as caught:
        call()
    assert caught.value.code == code


def everyone(cast: Cast, server_round: int = 1) -> dict[str, bytes]:
    return {name: cast.mask(name, server_round) for name in cast.members}


def truth(cast: Cast, among: list[str] | dict[str, bytes], server_round: int = 1) -> Ints:
    return np.sum([cast.truth(name, server_round) for name in among], axis=0)


# --- any drops, any numbers ------------------------------------------------------------------


@st.composite
def plays(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(3, 8))
    max_colluding_sites = draw(st.integers(0, n // 3))
    threshold = draw(
        st.integers(max((n + max_colluding_sites) // 2 + 1, max_colluding_sites + 2), n)
    )
    some = st.sets(st.sampled_from(names(n)), max_size=draw(st.integers(0, n)))
    few = st.sets(st.sampled_from(names(n)), max_size=2)
    return {
        "n": n,
        "threshold": threshold,
        "max_colluding_sites": max_colluding_sites,
        "min_survivors": draw(st.integers(0, n)),
        "size": draw(st.integers(1, 50)),
        "seed": draw(st.integers(0, 999)),
        **{
            stage: draw(st.one_of(few, few, some))
            for stage in ("keys", "shares", "mask", "endorse", "reveal")
        },
    }


@FUZZ
@given(plays())
def test_a_round_gives_the_exact_sum_or_a_refusal_and_that_only_when_too_few_remain(
    play: dict[str, Any],
) -> None:
    n, size, rng = play["n"], play["size"], np.random.default_rng(play["seed"])
    asked = terms(
        n, play["threshold"], play["max_colluding_sites"], min_survivors=play["min_survivors"]
    )
    least = max(play["threshold"], play["min_survivors"])
    assert asked.least == least

    def agree(who: list[str], attempt: int) -> Cast | None:
        again = terms(
            n,
            play["threshold"],
            play["max_colluding_sites"],
            min_survivors=play["min_survivors"],
            attempt=attempt,
        )
        cast = Cast(again, who)
        if len(who) < least:
            refused(cast.agree, "gave keys")
            return None
        return cast

    who = [name for name in names(n) if name not in play["keys"]]
    cast = agree(who, 1) if who else None
    if cast is None:
        return
    if play["shares"] & set(who):
        # Whoever has given keys and no shares is in this agreement for good: it takes another.
        refused(lambda: cast.agree(stop=play["shares"]) and cast.mask(who[0]))
        who = [name for name in who if name not in play["shares"]]
        cast = agree(who, 2) if who else None
        if cast is None:
            return
    cast.agree()
    updates = {m: rng.uniform(-BOUND, BOUND, size).astype(np.float32) for m in who}
    weights = dict(zip(who, rng.dirichlet(np.ones(len(who))), strict=True))
    factors = {m: fixed_point.factor(BOUND, weights[m], n) for m in who}
    masked = {
        m: cast.members[m].mask(1, updates[m], factors[m], BOUND, ASKED)
        for m in who
        if m not in play["mask"]
    }
    got = outcome(cast, 1, masked, size, silent=play["endorse"], mute=play["reveal"])
    endorsing = set(masked) - play["endorse"]
    enough = len(masked) >= least and len(endorsing - play["reveal"]) >= play["threshold"]
    if enough:
        expected = np.sum([units(updates[m], factors[m]) for m in masked], axis=0)
        assert np.array_equal(got, expected)
    else:
        assert isinstance(got, ProtocolError)
        assert got.code == "E504"


def test_the_sum_comes_back_as_values() -> None:
    cast = Cast(terms(3, 3)).agree()
    total = SecAggAggregator(cast.agreement, 1, SIZE, ASKED)
    for name, sent in everyone(cast).items():
        total.add(name, sent)
    reveals = {m: site.reveal(1, names(3), {}) for m, site in cast.members.items()}
    mean = total.open(reveals, fixed_point.factor(BOUND, 1.0, 3))
    exact = np.mean([update(m) for m in names(3)], axis=0, dtype=np.float64)
    assert mean.dtype == np.float32
    assert np.abs(mean - exact).max() <= BOUND * 3 / 2**22


@pytest.mark.parametrize("size", [0, fixed_point._CHUNK + 1])
def test_updates_of_any_length_add_up(size: int) -> None:
    cast = Cast(terms(4, 3)).agree()
    values = {m: update(m, 1, size) for m in names(4)}
    masked = {m: cast.mask(m, 1, values[m]) for m in "abd"}
    got = cast.finish(1, masked, size)
    assert np.array_equal(got, np.sum([units(values[m], factor_of(4)) for m in "abd"], axis=0))


# --- several rounds --------------------------------------------------------------------------


def test_a_site_that_misses_a_round_is_back_in_the_next_and_rounds_may_be_left_out() -> None:
    cast = Cast(terms(5, 4, 1, rounds=6, first=7)).agree()
    for server_round, present in (
        (7, "abcde"),
        (8, "abce"),
        (10, "abcde"),
        (11, "bcde"),
        (12, "abcd"),
    ):
        masked = {name: cast.mask(name, server_round) for name in present}
        assert np.array_equal(cast.finish(server_round, masked), truth(cast, masked, server_round))


def test_a_round_that_failed_leaves_the_next_as_it_was() -> None:
    cast = Cast(terms(5, 4)).agree()
    masked = {name: cast.mask(name, 1) for name in "abc"}
    assert isinstance(outcome(cast, 1, masked), ProtocolError)
    masked = everyone(cast, 2)
    assert np.array_equal(cast.finish(2, masked), truth(cast, masked, 2))


def test_an_update_that_comes_late_finds_its_site_missing() -> None:
    cast = Cast(terms(4, 3)).agree()
    early = {name: cast.mask(name) for name in "bcd"}
    cast.endorsed("bcd", "bcd")
    late = cast.mask("a")
    assert np.array_equal(cast.finish(1, early), truth(cast, early))
    refused(lambda: cast.members["b"].endorse(1, names(4)), "another set")
    refused(lambda: cast.finish(1, early | {"a": late}), "another set")
    refused(lambda: cast.members["a"].reveal(1, "bcd", {}), "sent no masked update")
    masked = everyone(cast, 2)
    assert np.array_equal(cast.finish(2, masked), truth(cast, masked, 2))


def test_vectors_of_one_update_and_two_rounds_or_agreements_have_nothing_in_common() -> None:
    values = np.zeros(3000, np.float32)
    first, second = (Cast(terms(3, 3)).agree() for _ in range(2))
    sent = [
        first.mask("a", 1, values),
        first.mask("a", 2, values),
        second.mask("a", 1, values),
        first.mask("b", 1, values),
    ]
    drawn = [fixed_point._unpack(each) & fixed_point._LOW for each in sent]
    for i, one in enumerate(drawn):
        assert 0.4 < np.mean(one < 1 << 23) < 0.6
        assert all(np.mean(one == other) < 0.01 for other in drawn[:i])


# --- the same question again -----------------------------------------------------------------


def test_each_stage_asked_again_gives_the_same_bytes() -> None:
    cast = Cast(terms(4, 3))
    first = {m: dict(site.shares(cast.keys)) for m, site in cast.members.items()}
    cast.agree()
    assert {m: site.shares(cast.keys) for m, site in cast.members.items()} == first
    for name, site in cast.members.items():
        site.receive({})  # has them already
        assert site.keys == cast.keys[name]
    for name in "abc":
        cast.mask(name)
        refused(lambda asked=name: cast.mask(asked), "masked before")
    signatures, again = (cast.endorsed("abc", "abc") for _ in range(2))
    assert signatures == again
    for name in "abc":
        site = cast.members[name]
        revealed = dict(site.reveal(1, "abc", signatures))
        assert site.reveal(1, ["c", "b", "a"], signatures) == revealed
        assert site.endorse(1, {"c", "a", "b"}) == signatures[name]


def test_refused_updates_and_updates_of_others_leave_a_sum_as_it_was() -> None:
    cast = Cast(terms(4, 3)).agree()
    masked = everyone(cast)
    total = SecAggAggregator(cast.agreement, 1, SIZE, ASKED)
    for name, sent in masked.items():
        refused(lambda m=name, s=sent: total.add(m, s + b"\0"), code="E502")
        refused(lambda m=name, s=sent: total.add(m, s[:-3]), code="E502")
        refused(lambda s=sent: total.add("nobody", s), "of no member")
        total.add(name, sent)
        refused(lambda m=name, s=sent: total.add(m, s), "its second")
    reveals = {m: site.reveal(1, names(4), {}) for m, site in cast.members.items()}
    few = dict(list(reveals.items())[:2])
    refused(lambda: total.open(few, 1.0), "2 sites revealed")
    outsiders = few | {"nobody": reveals["c"]}
    refused(lambda: total.open(outsiders, 1.0), "2 sites revealed")
    short = {g: {m: s for m, s in reveals[g].items() if m != "d"} for g in "ab"}
    refused(lambda: total.open(reveals | short, 1.0), "2 sites revealed")
    for wrong in (b"", bytes(31), b"\xff" * 32):
        spoilt = {m: reveals[m] | {"b": wrong} for m in "ac"}  # the other two are too few
        refused(lambda s=spoilt: total.open(reveals | s, 1.0), "share of b that does not fit")
    assert np.array_equal(total.open(reveals, 1.0), truth(cast, masked))


def test_shares_of_those_who_did_not_survive_are_not_used() -> None:
    cast = Cast(terms(5, 4)).agree()
    masked = {name: cast.mask(name) for name in "bcde"}
    signatures = cast.endorsed("bcde", "bcde")
    total = SecAggAggregator(cast.agreement, 1, SIZE, ASKED)
    for name, sent in masked.items():
        total.add(name, sent)
    reveals = {m: cast.members[m].reveal(1, "bcde", signatures) for m in "bcde"}
    noise = {m: bytes(32) for m in names(5)}
    assert np.array_equal(total.open({"a": noise} | reveals, 1.0), truth(cast, masked))


# --- what does not come in its order ---------------------------------------------------------


def test_no_stage_comes_before_the_one_it_rests_on() -> None:
    cast = Cast(terms(3, 3))
    site = cast.members["a"]
    for early in (
        lambda: cast.mask("a"),
        lambda: site.receive({}),
        lambda: site.endorse(1, "abc"),
        lambda: site.reveal(1, "abc", {}),
    ):
        refused(early, "no agreement yet")
    site.shares(cast.keys)
    refused(lambda: cast.mask("a"), "not here yet")
    refused(lambda: site.check_can_mask(1), "not here yet")
    cast.agree()
    refused(lambda: site.endorse(1, "abc"), "sent no masked update")
    refused(lambda: site.reveal(1, "abc", {}), "sent no masked update")
    site.check_can_mask(1)
    cast.mask("a")
    refused(lambda: site.check_can_mask(1), "masked before")
    site.check_can_mask(2)


@pytest.mark.parametrize("server_round", [-1, 0, 3, 9])
def test_rounds_of_another_agreement_are_refused(server_round: int) -> None:
    cast = Cast(terms(3, 3)).agree()
    site = cast.members["a"]
    for ask in (
        lambda: site.mask(server_round, update("a"), 1.0, BOUND, ASKED),
        lambda: site.endorse(server_round, "abc"),
        lambda: site.reveal(server_round, "abc", {}),
        lambda: site.check_can_mask(server_round),
    ):
        refused(ask, f"round {server_round} is not in this agreement")


def test_no_earlier_round_is_masked_or_revealed_any_more() -> None:
    cast = Cast(terms(3, 3, rounds=3)).agree()
    everyone(cast, 1)
    everyone(cast, 2)
    for site in cast.members.values():
        refused(lambda s=site: s.reveal(1, "abc", {}), "round 1 is over")
        refused(lambda s=site: s.endorse(1, "abc"), "round 1 is over")
        refused(lambda s=site: s.check_can_mask(1), "round 1 is over")


@pytest.mark.parametrize(
    "survivors",
    [
        ["a", "b", "c", "c"],
        ["a", "b", "x"],
        ["a", "b", "c", "x"],
        ["b", "c", "d"],
        [],
        ["a", "b"],
        "a",
    ],
)
def test_a_set_of_survivors_that_cannot_be_is_refused_and_binds_nobody(
    survivors: list[str],
) -> None:
    cast = Cast(terms(4, 3)).agree()
    for name in "abc":
        cast.mask(name)
    site = cast.members["a"]
    refused(lambda: site.endorse(1, survivors))
    refused(lambda: site.reveal(1, survivors, {}))
    signatures = cast.endorsed("abc", "abc")
    assert set(site.reveal(1, "abc", signatures)) == set("abcd")


def test_a_missing_members_site_endorses_nothing_though_it_masked() -> None:
    cast = Cast(terms(4, 3)).agree()
    everyone(cast)
    refused(lambda: cast.members["d"].endorse(1, "abc"), "sent no masked update that counts")


def test_an_update_beyond_the_bound_uses_the_round_up() -> None:
    cast = Cast(terms(3, 3)).agree()
    values = update("a").copy()
    values[-1] = np.nan
    refused(lambda: cast.mask("a", 1, values), code="E502")
    refused(lambda: cast.mask("a", 1), "masked before")
    masked = everyone(cast, 2)
    assert np.array_equal(cast.finish(2, masked), truth(cast, masked, 2))


# --- terms and keys --------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(3, fixed_point.MOST_SITES + 1))
def test_the_default_threshold_holds_with_a_third_of_the_sites_colluding(n: int) -> None:
    threshold = agreements.default_threshold(n)
    assert agreements.problem_with(n, threshold, n // 3) == ""
    assert agreements.problem_with(n, threshold - 1, n // 3) != "" or n % 3 == 2
    assert n - threshold >= (n - 1) // 3  # and a third may drop out


@pytest.mark.parametrize(
    ("n", "threshold", "max_colluding_sites"),
    [
        (1, 1, 0),
        (2, 2, 0),
        (129, 128, 0),
        (3, 4, 0),
        (3, 1, 0),
        (4, 2, 0),
        (4, 3, 2),
        (5, 3, 1),
        (6, 4, 2),
        (7, 5, 3),
        (3, 3, 2),
        (3, 0, 0),
        (3, -1, 0),
        (4, 4, 3),
    ],
)
def test_numbers_without_a_guarantee_are_refused(
    n: int, threshold: int, max_colluding_sites: int
) -> None:
    assert agreements.problem_with(n, threshold, max_colluding_sites)
    if n < 27:  # names are letters
        refused(lambda: terms(n, threshold, max_colluding_sites))


@pytest.mark.parametrize("rounds", [-1, 0, 65])
def test_an_agreement_serves_one_to_64_rounds(rounds: int) -> None:
    refused(lambda: terms(3, 3, rounds=rounds), "1 to 64 rounds")
    assert terms(3, 3, rounds=64).rounds == 64


def test_a_roster_with_one_key_twice_is_refused() -> None:
    facts = vars(terms(3, 3))
    roster = dict(facts["roster"])
    refused(lambda: Terms(**{**facts, "roster": roster | {"c": roster["a"]}}), "twice")


@pytest.mark.parametrize(
    "change",
    [
        {"contract": "d" * 64},
        {"run": "run-2"},
        {"attempt": 2},
        {"first": 2},
        {"rounds": 1},
        {"threshold": 4},
        {"max_colluding_sites": 1},
        {"min_survivors": 4},
        {"roster": {**terms(4, 3).roster, "d": terms(5, 4).roster["e"]}},
    ],
)
def test_no_key_serves_other_terms_than_it_was_signed_for(change: dict[str, Any]) -> None:
    base = {**vars(terms(4, 3)), "max_colluding_sites": 0}
    other = Terms(**{**base, **change})
    assert other.digest() != Terms(**base).digest()
    keys = {**Cast(Terms(**base)).keys}
    if "roster" in change:
        keys.pop("d")  # the changed site itself could not have signed in any case
    if "rounds" not in change:  # another number of rounds has another length already
        refused(lambda: Agreement(other, keys), "not signed")
    else:
        refused(lambda: Agreement(other, keys), "another length")


def test_every_byte_of_a_sites_keys_is_under_its_signature() -> None:
    cast = Cast(terms(3, 3, rounds=1))
    for at in range(len(cast.keys["b"])):
        bad = bytearray(cast.keys["b"])
        bad[at] ^= 1
        refused(lambda b=bytes(bad): Agreement(cast.terms, cast.keys | {"b": b}), "not signed")
    for other in (b"", cast.keys["b"][:-1], cast.keys["b"] + b"\0"):
        refused(lambda o=other: Agreement(cast.terms, cast.keys | {"b": o}), "another length")
    refused(lambda: Agreement(cast.terms, cast.keys | {"b": cast.keys["c"]}), "not signed")
    refused(lambda: Agreement(cast.terms, {m: cast.keys[m] for m in "ab"}), "2 sites gave keys")
    read = PublicKeys.read(cast.keys["b"], 1)
    assert read.body() + read.signature == cast.keys["b"]


def test_only_sites_of_the_roster_take_part() -> None:
    refused(lambda: SecAggParticipant(terms(3, 3), "x", signing_key("x").sign), "not in the roster")
    cast = Cast(terms(3, 3))
    refused(lambda: cast.members["a"].shares({m: cast.keys[m] for m in "bc"} | {"a": b""}))
    other = SecAggParticipant(cast.terms, "a", signing_key("a").sign)
    refused(lambda: cast.members["a"].shares(cast.keys | {"a": other.keys}), "own keys")


def test_both_members_derive_one_mask() -> None:
    cast = Cast(terms(3, 3)).agree()
    one, other = (cast.members[m]._rounds[1].masking for m in "ab")
    assert one is not None
    assert other is not None
    view = cast.agreement
    assert view.mask_key(one, "a", "b", 1, ASKED) == view.mask_key(other, "b", "a", 1, ASKED)


def test_keys_are_shared_with_one_set_of_members_only() -> None:
    cast = Cast(terms(4, 3))
    site = cast.members["a"]
    sealed = dict(site.shares(cast.keys))
    renewed = SecAggParticipant(cast.terms, "d", signing_key("d").sign).keys
    for others in ({m: cast.keys[m] for m in "abc"}, cast.keys | {"d": renewed}):
        refused(lambda keys=others: site.shares(keys), "shared with other members already")
    assert site.shares(cast.keys) == sealed


def test_shares_of_another_length_are_refused_though_a_member_sealed_them() -> None:
    cast = Cast(terms(3, 3))
    sealed = {m: dict(site.shares(cast.keys)) for m, site in cast.members.items()}
    view = cast.agreement
    key = cast.members["b"]._seal_key(view, "a", "b", "a")
    for length in (0, 1, 64, 127, 129, 192):
        bad = ChaCha20Poly1305(key).encrypt(bytes(12), bytes(length), view.transcript)
        refused(
            lambda b=bad: cast.members["a"].receive({"b": b, "c": sealed["c"]["a"]}),
            "what b sealed for this site does not open",
            "E507",
        )


@pytest.mark.parametrize("greater", [False, True])
def test_a_site_that_was_started_again_takes_no_keys_of_before(greater: bool) -> None:
    """They are signed by it, for the same terms. Greater or smaller, as bytes are compared."""
    agreed = terms(3, 3)
    cast = Cast(agreed)
    before = next(
        other.keys
        for other in iter(lambda: SecAggParticipant(agreed, "a", signing_key("a").sign), None)
        if (other.keys > cast.keys["a"]) == greater
    )
    refused(lambda: cast.members["a"].shares(cast.keys | {"a": before}), "own keys are not among")


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_is_sealed_has_the_size_that_the_server_asks_for(rounds: int) -> None:
    cast = Cast(replace(terms(3, 3), rounds=rounds)).agree()
    assert {len(shares) for sealed in cast.sealed.values() for shares in sealed.values()} == {
        cast.terms.sealed_size
    }


def test_as_many_endorsements_as_the_threshold_are_needed_and_only_survivors_count() -> None:
    cast = Cast(terms(6, 4)).agree()
    everyone(cast)
    signed = cast.endorsed("abcde", "abcde")
    statement = cast.agreement.survivors_statement(1, "abcde")
    outsider = {"f": signing_key("f").sign(statement)}
    few = {m: signed[m] for m in "abc"}
    for signatures in (
        {},
        few,
        few | outsider,
        few | {"d": signed["e"]},
        few | {"d": bytes(64)},
        few | {"d": b""},
        few | {"x": signed["d"]},
    ):
        refused(
            lambda s=signatures: cast.members["a"].reveal(1, "abcde", s), "sites endorsed this set"
        )
    assert cast.members["a"].reveal(1, "abcde", few | {"e": signed["e"]})


def reachable(thing: object) -> set[bytes]:
    """Every secret that is found from here, as 32 bytes."""
    if isinstance(thing, X25519PrivateKey):
        return {thing.private_bytes_raw()}
    if isinstance(thing, bytes):
        return {thing[at : at + 32] for at in range(0, len(thing), 32)}
    if isinstance(thing, int):
        return {thing.to_bytes(32, "little")} if 0 <= thing < 1 << 255 else set()
    if isinstance(thing, dict):
        return reachable(list(thing.values()))
    if isinstance(thing, list | tuple):
        return set().union(*map(reachable, thing))
    return (
        reachable(vars(thing))
        if isinstance(thing, SecAggParticipant | participant._Round)
        else set()
    )


def test_a_secret_goes_as_soon_as_its_round_allows() -> None:
    cast = Cast(terms(4, 3))
    site = cast.members["a"]
    pair, own = (shamir.to_bytes(secret) for secret in cast.secrets["a"][0])
    private = agreements.masking_key(cast.terms, "a", 1, cast.secrets["a"][0][0])
    masking = private.private_bytes_raw()
    assert {pair, own, masking} <= reachable(site)
    cast.agree()
    assert pair not in reachable(site)
    assert {own, masking} <= reachable(site)
    everyone(cast)
    assert not {pair, own, masking} & reachable(site)
    held = dict(site._rounds[1].shares)
    for member in cast.members.values():
        member.reveal(1, "abcd", {})
    assert not {pairwise for pairwise, _ in held.values()} & reachable(site)
    everyone(cast, 2)
    assert not {share for both in held.values() for share in both} & reachable(site)


def test_every_derived_key_is_for_one_purpose() -> None:
    cast = Cast(terms(4, 3)).agree()
    view, seed, place = cast.agreement, shamir.draw(), cast.terms
    keys = [view.own_mask_key(seed, name, server_round) for name in "ab" for server_round in (1, 2)]
    keys += [
        agreements.commitment(place, name, server_round, seed)
        for name in "ab"
        for server_round in (1, 2)
    ]
    keys += [
        agreements.masking_key(place, name, server_round, seed).private_bytes_raw()
        for name in "ab"
        for server_round in (1, 2)
    ]
    secret = agreements.masking_key(place, "a", 1, seed)
    keys += [
        view.mask_key(secret, "a", peer, server_round, asked)
        for peer in "bc"
        for server_round in (1, 2)
        for asked in (b"", ASKED)
    ]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}


# --- point 4 of the argument, by counting ----------------------------------------------------


def readable(n: int, t: int, c: int, needs_endorsing: bool = True) -> set[frozenset[int]]:
    """The sets of honest sites whose sum some server can read, over all that it can tell them, one
    round long: the first n - c are honest and each holds to one set; all have masked. Where two
    sets can be read in one and the same round, the empty set stands for it."""
    honest, everyone = range(n - c), frozenset(range(n))
    sets = [frozenset(s) for k in range(t, n) for s in itertools.combinations(range(n), k)]
    choices = [[None, everyone, *(s for s in sets if site in s)] for site in honest]
    found: set[frozenset[int]] = set()
    for told in itertools.product(*choices):
        held = Counter(told)
        given = {
            s: k
            for s, k in held.items()
            if s is not None
            and (
                s == everyone
                or not needs_endorsing
                or k + sum(x >= n - c for x in s) >= t  # colluding sites sign whatever helps
            )
        }
        revealing = sum(given.values()) + c  # colluding sites have shares of both kinds
        if revealing < t:
            continue
        own, pairwise = set(), set()
        for site in honest:
            outside = sum(k for s, k in given.items() if site not in s)
            if revealing - outside >= t:
                own.add(site)
            if outside + c >= t:
                pairwise.add(site)
        if not own | pairwise >= set(honest):
            continue  # a mask is left on every sum
        if own & pairwise:
            found.add(frozenset())
        elif own:
            found.add(frozenset(own))
    return found


ALLOWED = [
    (n, t, c)
    for n in range(3, 6)
    for t in range(2, n + 1)
    for c in range(n)
    if not agreements.problem_with(n, t, c)
]


@pytest.mark.parametrize(("n", "t", "c"), [*ALLOWED, (6, 5, 2), (6, 5, 3), (7, 6, 4)])
def test_whatever_sites_are_told_one_sum_at_most_can_be_read(n: int, t: int, c: int) -> None:
    assert not agreements.problem_with(n, t, c)
    found = readable(n, t, c)
    assert frozenset(range(n - c)) in found
    assert frozenset() not in found
    assert min(map(len, found)) == t - c >= 2


@pytest.mark.parametrize(
    ("n", "t", "c", "endorsed"),
    [
        (4, 2, 0, True),
        (4, 3, 2, True),
        (5, 3, 1, True),
        (5, 4, 3, True),
        (5, 3, 0, False),
    ],
)
def test_without_the_bound_or_the_endorsements_the_count_finds_a_break(
    n: int, t: int, c: int, endorsed: bool
) -> None:
    found = readable(n, t, c, endorsed)
    assert frozenset() in found or min(map(len, found)) < t - c
