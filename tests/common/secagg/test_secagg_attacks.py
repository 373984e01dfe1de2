"""A malicious server and its colluding sites against sites that keep to the protocol.

Each attack is played twice: against the real sites, where it must come to nothing, and against
sites that lack one defence, where it must recover the numbers that were to stay hidden.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from silotune.common.errors import ProtocolError
from silotune.common.secagg import fixed_point, participant, shamir
from silotune.common.secagg import key_agreement as agreements
from silotune.common.secagg.aggregator import SecAggAggregator
from silotune.common.secagg.key_agreement import PublicKeys, Terms, derive, keys_statement
from silotune.common.secagg.participant import SecAggParticipant
from tests.common.secagg import secagg_harness as weak
from tests.common.secagg.secagg_harness import (
    ASKED,
    SIZE,
    Cast,
    Eavesdropper,
    centred,
    factor_of,
    names,
    signing_key,
    terms,
    units,
    update,
)

Found = tuple[Any, Any]  # what was recovered, if anything, and what it should be
Attack = Callable[[type[SecAggParticipant]], Found]
Patch = weak.Patch
Weakness = Callable[[Patch], type[SecAggParticipant]]
LOW_ORDER = (
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
)


def everyone_masks(cast: Cast, server_round: int = 1) -> None:
    for name in cast.members:
        cast.mask(name, server_round)


def alone(spy: Eavesdropper, victims: str = "a") -> Found:
    cast, server_round = spy.cast, spy.server_round
    return spy.sum_of(victims), sum(cast.truth(name, server_round) for name in victims)


# --- (a) shares of both kinds ----------------------------------------------------------------


def asks_for_both_kinds(member: type[SecAggParticipant]) -> Found:
    cast = Cast(terms(4, 3), member=member).agree()
    everyone_masks(cast)
    spy = Eavesdropper(cast)
    for name, site in cast.members.items():
        spy.hear(name, "abcd", site.reveal(1, "abcd", {}))
    signatures = cast.endorsed("bcd", "bcd")
    for name in "bcd":
        spy.hear(name, "bcd", cast.members[name].reveal(1, "bcd", signatures))
    return alone(spy)


# --- (b), (c) keys that are not the sites' ---------------------------------------------------


def plays_the_others(member: type[SecAggParticipant], others: str = "bcd") -> Found:
    """All others of the victim's agreement are the server: Sybils, or it sits in between."""
    cast = Cast(terms(4, 3), "a", member=member)
    own = signing_key("the server's")
    forged = Terms(
        **{
            **vars(cast.terms),
            "roster": {
                m: (own if m == others[0] else signing_key(m * 2))
                .public_key()
                .public_bytes_raw()
                .hex()
                for m in others
            },
        }
    )
    for name in others:
        fake = SecAggParticipant(forged, name, own.sign)
        cast.secrets[name], fake.terms = list(fake._seeds), cast.terms
        cast.members[name], cast.keys[name] = fake, fake.keys
    cast.agree()
    cast.mask("a")
    return alone(Eavesdropper(cast, colluding=others))


# --- (d) shares that went elsewhere ----------------------------------------------------------


def sends_shares_back(member: type[SecAggParticipant]) -> Found:
    """The victim holds its own shares for another's, and gives the kind it must not give."""
    cast = Cast(terms(4, 3), member=member)
    cast.sealed = {name: dict(site.shares(cast.keys)) for name, site in cast.members.items()}
    for name, site in cast.members.items():
        got = {m: sent[name] for m, sent in cast.sealed.items() if m != name}
        if name == "a":
            got["d"] = cast.sealed["a"]["d"]
        site.receive(got)
    truth = cast.members["d"]._rounds[1].shares["a"][0]  # of the pairwise key of a survivor
    for name in "abc":
        cast.mask(name)
    revealed = cast.members["a"].reveal(1, "abc", cast.endorsed("abc", "abc"))
    return revealed["d"], truth


# --- (e) terms without a guarantee -----------------------------------------------------------


def uses_weak_terms(
    member: type[SecAggParticipant], n: int, threshold: int, max_colluding_sites: int, told_all: int
) -> Found:
    """`told_all` honest sites hear that all survived, the others that the first did not."""
    cast = Cast(terms(n, threshold, max_colluding_sites), member=member).agree()
    return tells_two_tales(cast, max(max_colluding_sites, 0), told_all)


def tells_two_tales(cast: Cast, max_colluding_sites: int, told_all: int) -> Found:
    n = len(cast.members)
    honest, colluding = names(n)[: n - max_colluding_sites], names(n)[n - max_colluding_sites :]
    everyone_masks(cast)
    spy = Eavesdropper(cast, colluding=colluding)
    for name in honest[:told_all]:
        spy.hear(name, names(n), cast.members[name].reveal(1, names(n), {}))
    less, told_less = names(n)[1:], honest[max(1, told_all) :]
    statement = cast.agreement.survivors_statement(1, less)
    signatures = {name: signing_key(name).sign(statement) for name in colluding}
    signatures |= cast.endorsed(told_less, less)
    for name in told_less:
        spy.hear(name, less, cast.members[name].reveal(1, less, signatures))
    return alone(spy)


# --- (f), (g) each site hears of another set -------------------------------------------------

VIEWS = {"a": "abc", "b": "abd", "c": "abc", "d": "abd", "e": "abe"}


def collects(spy: Eavesdropper, signed: Callable[[str], tuple[Any, Mapping[str, bytes]]]) -> Found:
    """No set has more than two sites behind it, and yet c, d and e are missing for three each: a
    sum of two where three are the least. signed: the survivors a site hears of, and who signed.
    """
    cast, server_round = spy.cast, spy.server_round
    everyone_masks(cast, server_round)
    for name in VIEWS:
        survivors, signatures = signed(name)
        spy.hear(name, survivors, cast.members[name].reveal(server_round, survivors, signatures))
    return alone(spy, "ab")


def tells_each_another_set(member: type[SecAggParticipant]) -> Found:
    cast = Cast(terms(5, 3), member=member).agree()
    return collects(
        Eavesdropper(cast), lambda name: (VIEWS[name], cast.endorsed(VIEWS[name], VIEWS[name]))
    )


def shows_each_its_own_signature(member: type[SecAggParticipant]) -> Found:
    cast = Cast(terms(5, 3), member=member).agree()
    return collects(
        Eavesdropper(cast), lambda name: (VIEWS[name], cast.endorsed(name, VIEWS[name]))
    )


def names_each_three_times(member: type[SecAggParticipant]) -> Found:
    cast = Cast(terms(5, 3), member=member).agree()

    def signed(name: str) -> tuple[list[str], dict[str, bytes]]:
        among = [*VIEWS[name], name, name]
        return among, cast.endorsed(name, among)

    return collects(Eavesdropper(cast), signed)


def replays_endorsements(member: type[SecAggParticipant], per_attempt: bool) -> Found:
    """Three rounds, or three attempts at one, lost another two sites each: no lie so far."""
    sets, old = dict.fromkeys(VIEWS.values()), {}
    cast = Cast(terms(5, 3, rounds=4), member=member).agree()
    for server_round, among in enumerate(sets, start=1):
        if per_attempt:
            earlier = Cast(terms(5, 3, rounds=4, attempt=1 + server_round), member=member).agree()
            everyone_masks(earlier, 4)
            old[among] = earlier.endorsed(among, among, 4)
        else:
            everyone_masks(cast, server_round)
            old[among] = cast.endorsed(among, among, server_round)
    return collects(Eavesdropper(cast, 4), lambda name: (VIEWS[name], old[VIEWS[name]]))


# --- (h), (j) too few, too late --------------------------------------------------------------


def sums_fewer_than_agreed(member: type[SecAggParticipant]) -> Found:
    cast = Cast(terms(4, 3, min_survivors=4), member=member).agree()
    everyone_masks(cast)
    spy, signatures = Eavesdropper(cast), cast.endorsed("bcd", "bcd")
    for name in "bcd":
        spy.hear(name, "bcd", cast.members[name].reveal(1, "bcd", signatures))
    return alone(spy, "bcd")


def calls_a_slow_site_missing(member: type[SecAggParticipant]) -> Found:
    cast = Cast(terms(4, 3), member=member).agree()
    for name in "bcd":
        cast.mask(name)
    spy, signatures = Eavesdropper(cast), cast.endorsed("bcd", "bcd")
    for name in "bcd":
        spy.hear(name, "bcd", cast.members[name].reveal(1, "bcd", signatures))
    pairwise = spy.secret("a", own=False)
    assert pairwise is not None
    key, view = agreements.masking_key(cast.terms, "a", 1, pairwise), cast.agreement
    total = fixed_point.Total(SIZE)
    total.add(cast.mask("a"))
    total.mask([(view.mask_key(key, "a", peer, 1, ASKED), peer > "a") for peer in "bcd"])
    total.mask([(view.own_mask_key(0, "a", 1), True)])  # right only if every seed gives one mask
    found = centred(total.words)
    return found if np.abs(found).max() <= fixed_point.LARGEST_SUM else None, cast.truth("a")


# --- (k), (l) values beyond the bound, and asking twice --------------------------------------


def hides_a_huge_value(member: type[SecAggParticipant]) -> Found:
    """A site that turns once around the ring: the sum opens as if it had kept to the bound."""
    cast = Cast(terms(3, 3), member=member).agree()
    factor = factor_of(3)
    huge = np.full(SIZE, np.float32((1 << fixed_point.BITS) / factor))
    masked = {"a": cast.mask("a", 1, huge), "b": cast.mask("b"), "c": cast.mask("c")}
    wrapped = units(huge, factor) % (1 << fixed_point.BITS)
    return cast.finish(1, masked), wrapped + cast.truth("b") + cast.truth("c")


def asks_all_others_for_what_it_knows(member: type[SecAggParticipant]) -> Found:
    """Pasquini et al. 2022: an adapter whose update the server can work out goes to the others."""
    cast = Cast(terms(4, 3), member=member).agree()
    known = {name: update(name, 9) for name in "bcd"}
    masked = {name: cast.mask(name, 1, known[name], request_digest=b"trap") for name in "bcd"}
    masked["a"] = cast.mask("a")
    total = cast.finish(1, masked)
    return total - sum(units(known[name], factor_of(4)) for name in "bcd"), cast.truth("a")


def has_a_round_masked_twice(member: type[SecAggParticipant]) -> Found:
    cast = Cast(terms(3, 3), member=member).agree()
    first = fixed_point._unpack(cast.mask("a"))
    second = fixed_point._unpack(cast.mask("a", 1, update("a", 2)))
    return centred(first - second), cast.truth("a") - cast.truth("a", 2)


def has_secrets_shared_twice(member: type[SecAggParticipant]) -> Found:
    """The one colluding site signs other keys, so that all start over with the secrets they had:
    first the victim survives, then it is missing."""
    cast = Cast(terms(5, 4, 1), member=member).agree()
    everyone_masks(cast)
    first = Eavesdropper(cast)
    for name, site in cast.members.items():
        first.hear(name, "abcde", site.reveal(1, "abcde", {}))
    seed, sent, view = first.secret("a", own=True), cast.masked["a", 1], cast.agreement
    cast.members["e"] = SecAggParticipant(cast.terms, "e", signing_key("e").sign)
    cast.keys = {name: site.keys for name, site in cast.members.items()}
    cast.agree()
    for name in "bcde":
        cast.mask(name)
    second, signatures = Eavesdropper(cast), cast.endorsed("bcde", "bcde")
    for name in "bcde":
        second.hear(name, "bcde", cast.members[name].reveal(1, "bcde", signatures))
    pairwise = second.secret("a", own=False)
    assert seed is not None
    assert pairwise is not None
    key = agreements.masking_key(cast.terms, "a", 1, pairwise)
    total = fixed_point.Total(SIZE)
    total.add(sent)
    total.mask([(view.mask_key(key, "a", peer, 1, ASKED), peer > "a") for peer in "bcde"])
    total.mask([(view.own_mask_key(seed, "a", 1), True)])
    return centred(total.words), cast.truth("a")


# --- (m), (n) malicious sites ----------------------------------------------------------------


def spoils_a_share(_: type[SecAggParticipant]) -> Found:
    """Of one element a left mask is beyond every honest sum only in half of the cases."""
    opened = []
    for _attempt in range(64):
        cast = Cast(terms(3, 3)).agree()
        total = SecAggAggregator(cast.agreement, 1, 1, ASKED)
        for name in "abc":
            total.add(name, cast.mask(name, 1, update(name, 1, 1)))
        reveals = {m: dict(site.reveal(1, "abc", {})) for m, site in cast.members.items()}
        reveals["b"]["a"] = shamir.to_bytes(shamir.draw())
        try:
            opened.append(int(total.open(reveals, 1.0)[0]))
        except ProtocolError as error:
            if error.code != "E505":
                raise
    honest = sum(units(update(m, 1, 1), factor_of(3))[0] for m in "abc")
    return any(value != honest for value in opened), True


def publishes_low_order_points(
    member: type[SecAggParticipant], point: bytes, masking: bool = False
) -> Found:
    """Whoever listens, with no secret of any site, opens what was sealed for such a key, or takes
    such a pairwise mask off."""
    cast = Cast(terms(4, 3), member=member)
    for name in "bcd":
        keys = PublicKeys.read(cast.keys[name], 2)
        changed = {"masking": (point, point)} if masking else {"sealing": point}
        body = keys._replace(**changed).body()  # type: ignore[arg-type]
        cast.keys[name] = body + signing_key(name).sign(keys_statement(cast.terms, name, body))
    victim, view = cast.members["a"], cast.agreement
    sealed = victim.shares(cast.keys)
    if not masking:
        shares = {}
        for name in "bcd":
            key = derive(bytes(32), view.transcript, "seal", "a", name)
            opened = ChaCha20Poly1305(key).decrypt(participant.NONCE, sealed[name], view.transcript)
            shares[view.place(name)] = shamir.from_bytes(opened[: shamir.SIZE])
        return shamir.join(shares), cast.secrets["a"][0][0]
    victim.ready = True
    seed = cast.secrets["a"][0][1]
    total = fixed_point.Total(SIZE)
    total.add(cast.mask("a"))
    total.mask(
        [(derive(bytes(32), view.transcript, "mask", 1, "a", p, ASKED.hex()), True) for p in "bcd"]
    )
    total.mask([(view.own_mask_key(seed, "a", 1), True)])
    return centred(total.words), cast.truth("a")


# --- each attack, and the defence it needs gone ----------------------------------------------

WEAK = {  # sites, threshold, colluding, and how many honest sites hear that all survived
    "two-t-is-n-plus-c": (6, 4, 2, 2),
    "two-t-is-n": (4, 2, 0, 2),
    "one-share": (3, 1, 1, 0),
    "two-sites": (2, 2, 1, 1),
    "all-but-one-collude": (3, 3, 2, 1),
}
CASES: dict[str, tuple[Attack, Weakness]] = {
    "both-kinds": (asks_for_both_kinds, weak.no_set_is_for_good),
    "sybils": (partial(plays_the_others, others="xyz"), weak.names_are_not_looked_up),
    "in-between": (plays_the_others, weak.signatures_of_keys_are_not_checked),
    "reflection": (sends_shares_back, weak.sealing_keys_have_no_direction),
    "split-views": (tells_each_another_set, weak.sites_endorse_many_sets),
    "split-views-unendorsed": (shows_each_its_own_signature, weak.endorsements_are_not_counted),
    "split-views-repeated-name": (names_each_three_times, weak.a_name_may_count_twice),
    "old-rounds-endorsements": (
        partial(replays_endorsements, per_attempt=False),
        weak.endorsements_name_no_round,
    ),
    "old-attempts-endorsements": (
        partial(replays_endorsements, per_attempt=True),
        weak.endorsements_name_no_agreement,
    ),
    "unverified-endorsements": (
        partial(replays_endorsements, per_attempt=True),
        weak.endorsements_are_not_verified,
    ),
    "too-few": (sums_fewer_than_agreed, weak.too_few_are_enough),
    "late": (calls_a_slow_site_missing, weak.there_is_no_own_mask),
    "huge": (hides_a_huge_value, weak.values_are_not_checked),
    "other-adapters": (asks_all_others_for_what_it_knows, weak.masks_are_for_whatever_was_asked),
    "masked-twice": (has_a_round_masked_twice, weak.masks_are_used_again),
    "shared-twice": (has_secrets_shared_twice, weak.secrets_are_shared_with_whoever_asks),
    "spoilt-share": (spoils_a_share, weak.seeds_are_not_compared),
    **{
        f"terms-{what}": (
            partial(uses_weak_terms, n=n, threshold=t, max_colluding_sites=c, told_all=k),
            weak.terms_are_not_checked,
        )
        for what, (n, t, c, k) in WEAK.items()
    },
    **{
        f"low-order-{kind}-{at}": (
            partial(publishes_low_order_points, point=point, masking=kind == "masking"),
            weak.any_point_is_a_key,
        )
        for at, point in enumerate(LOW_ORDER)
        for kind in ("sealing", "masking")
    },
}
CODES = {"huge": "E502", "reflection": "E507", "other-adapters": "E505"}
UNNOTICED = {"late"}  # the site cannot know that it was called missing; its own mask protects it


@pytest.mark.parametrize("case", CASES)
def test_the_attack_fails(case: str) -> None:
    attack, _ = CASES[case]
    if case in UNNOTICED:
        assert attack(SecAggParticipant)[0] is None
        return
    with pytest.raises(ProtocolError) as caught:
        attack(SecAggParticipant)
    assert caught.value.code == CODES.get(case, "E504")


@pytest.mark.parametrize("case", CASES)
def test_the_attack_recovers_what_was_hidden_once_its_defence_is_gone(
    case: str, monkeypatch: Patch
) -> None:
    attack, weaken = CASES[case]
    found, truth = attack(weaken(monkeypatch))
    assert found is not None
    assert np.array_equal(found, truth)


@pytest.mark.parametrize(
    ("n", "t", "c"),
    [
        (n, t, c)
        for n in range(3, 8)
        for t in range(n + 1)
        for c in range(n)
        if not agreements.problem_with(n, t, c)
    ],
)
def test_two_tales_are_never_enough_under_terms_that_are_allowed(n: int, t: int, c: int) -> None:
    for told_all in range(n - c + 1):
        with contextlib.suppress(ProtocolError):
            assert tells_two_tales(Cast(terms(n, t, c)).agree(), c, told_all)[0] is None


def test_a_key_replaced_for_some_members_is_noticed_by_each_of_them() -> None:
    cast = Cast(terms(4, 3))
    forged = SecAggParticipant(cast.terms, "b", signing_key("the server's").sign).keys
    for name in "acd":
        with pytest.raises(ProtocolError, match="keys of b are not signed"):
            cast.members[name].shares(cast.keys | {"b": forged})


def test_members_who_saw_other_keys_of_a_colluding_site_share_nothing() -> None:
    cast = Cast(terms(4, 3, 1))
    other = cast.keys | {"d": SecAggParticipant(cast.terms, "d", signing_key("d").sign).keys}
    sealed = {m: dict(cast.members[m].shares(cast.keys if m == "a" else other)) for m in "abc"}
    for sender, receiver in itertools.permutations("abc", 2):
        view = cast.members[receiver].agreement
        assert view is not None
        if "a" in (sender, receiver):
            with pytest.raises(ProtocolError, match=f"what {sender} sealed for this"):
                cast.members[receiver]._open(view, sender, sealed[sender][receiver])
        else:
            assert cast.members[receiver]._open(view, sender, sealed[sender][receiver])


def deliveries() -> dict[str, Callable[[dict[str, dict[str, bytes]], bytes], dict[str, bytes]]]:
    """What reaches the first of four sites instead of what was sealed for it."""
    return {
        "for another": lambda s, _: {"b": s["b"]["c"]},
        "by another": lambda s, _: {"b": s["c"]["a"], "c": s["b"]["a"]},
        "its own": lambda s, _: {"b": s["a"]["b"]},
        "of another agreement": lambda _, old: {"b": old},
        "cut": lambda s, _: {"b": s["b"]["a"][:-1]},
        "emptied": lambda *_: {"b": b""},
        "rounds exchanged": lambda s, _: {
            "b": s["b"]["a"][64:128] + s["b"]["a"][:64] + s["b"]["a"][128:]
        },
        "one bit": lambda s, _: {"b": bytes([s["b"]["a"][0] ^ 1]) + s["b"]["a"][1:]},
        "from a stranger": lambda s, _: {"x": s["b"]["a"]},
        "its own kept": lambda s, _: {"a": s["b"]["a"]},
    }


@pytest.mark.parametrize("what", deliveries())
@pytest.mark.parametrize("attempt", [1, 2])
def test_shares_that_were_not_sealed_for_this_are_refused_and_none_is_kept(
    what: str, attempt: int
) -> None:
    cast, before = Cast(terms(4, 3)), Cast(terms(4, 3, attempt=attempt))
    sealed = {name: dict(site.shares(cast.keys)) for name, site in cast.members.items()}
    old = before.members["b"].shares(before.keys)["a"]
    right = {name: sealed[name]["a"] for name in "bcd"}
    site = cast.members["a"]
    with pytest.raises(ProtocolError) as caught:
        site.receive(right | deliveries()[what](sealed, old))
    others = what in ("from a stranger", "its own kept", "one is missing")
    assert caught.value.code == ("E504" if others else "E507")
    assert not site.ready
    assert set(site._rounds[1].shares) == {"a"}
    with pytest.raises(ProtocolError, match="not those of all"):
        site.receive({name: sealed[name]["a"] for name in "bc"})
    site.receive(right)
    assert site.ready


def test_the_rounds_shares_are_in_their_places() -> None:
    """Two rounds exchanged would give one secret's two kinds in two rounds."""
    cast = Cast(terms(4, 3, rounds=3)).agree()
    for at, server_round in enumerate((1, 2, 3)):
        for own, name in itertools.product((False, True), "abcd"):
            held = {
                cast.agreement.place(giver): shamir.from_bytes(
                    site._rounds[server_round].shares[name][own]
                )
                for giver, site in cast.members.items()
                if giver in "acd"
            }
            assert shamir.join(held) == cast.secrets[name][at][own]


@pytest.mark.parametrize(("present", "name"), [("abcd", "a"), ("bcd", "a"), ("bcd", "c")])
def test_a_spoilt_share_of_either_kind_is_noticed_and_other_shares_still_do(
    present: str, name: str
) -> None:
    cast = Cast(terms(4, 3)).agree()
    total = SecAggAggregator(cast.agreement, 1, SIZE, ASKED)
    for each in present:
        total.add(each, cast.mask(each))
    signatures = cast.endorsed(present, present) if present != "abcd" else {}
    reveals = {m: cast.members[m].reveal(1, present, signatures) for m in present}
    spoilt = reveals | {"b": reveals["b"] | {name: shamir.to_bytes(7)}}
    expected = sum(cast.truth(m) for m in present)
    if len(present) > 3:  # three others suffice
        assert np.array_equal(total.open(spoilt, 1.0), expected)
        return
    with pytest.raises(ProtocolError, match=f"share of {name} that does not fit") as caught:
        total.open(spoilt, 1.0)
    assert caught.value.code == "E504"
    assert np.array_equal(total.open(reveals, 1.0), expected)


# --- what the protocol itself cannot hold ----------------------------------------------------


def test_one_update_masked_in_two_agreements_is_given_away() -> None:
    """Each sum is right, their difference is one update: so a site masks an update only once."""
    sums = []
    for attempt, present in ((1, "abcd"), (2, "bcd")):
        cast = Cast(terms(4, 3, attempt=attempt)).agree()
        sums.append(cast.finish(1, {name: cast.mask(name) for name in present}))
    assert np.array_equal(sums[0] - sums[1], cast.truth("a"))


def test_a_stolen_memory_does_not_open_rounds_that_are_over() -> None:
    cast = Cast(terms(4, 3)).agree()
    everyone_masks(cast)
    cast.finish(1, {name: cast.masked[name, 1] for name in "abcd"})
    everyone_masks(cast, 2)
    stolen, view = cast.members["a"], cast.agreement  # with what the server relayed:
    found = None
    if getattr(stolen, "_sealing", None) is not None:
        shares: tuple[dict[int, int], dict[int, int]] = {}, {}
        for name in "bcd":
            key = stolen._seal_key(view, name, "a", name)
            opened = ChaCha20Poly1305(key).decrypt(
                participant.NONCE, cast.sealed["a"][name], view.transcript
            )
            for own, held in enumerate(shares):
                part = opened[shamir.SIZE * own : shamir.SIZE * (own + 1)]
                held[view.place(name)] = shamir.from_bytes(part)
        spy = Eavesdropper(cast)
        spy.shares = {("a", False): shares[0], ("a", True): shares[1]}
        found = spy.sum_of("a")
    assert found is None or not np.array_equal(found, cast.truth("a"))
