"""Two sums and their difference: what a server gets that wants one site's update out of sums."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged, Settled, verify_export
from silotune.client.privacy.site_sets import SiteSets
from silotune.client.site.policy import Permits
from silotune.common.contract.contract import Contract
from silotune.common.errors import RefusalError, RunError
from silotune.common.models.factory import build
from silotune.common.protocol import messages, tensors
from silotune.common.protocol.messages import Agree, Arrays, Message, Refusal
from silotune.server.rounds.exchange import Reply, RoundProtocol, drive_round
from silotune.server.rounds.run import FederatedRun, RoundRecord
from silotune.server.rounds.secagg import LostSumError, ServerMasking
from silotune.server.storage.run_store import RunStore
from tests.client.worker.test_secagg import SITES, Answer, Federation, gone_from

ALL = frozenset(SITES)
THREE = ALL - {"west"}


@pytest.fixture
def federation(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> Federation:
    return Federation(table_contract, tmp_path, write_rows)


class CheatingRun(FederatedRun):
    """A server that asks for `attempt`, and keeps no rule by itself that the sites should keep."""

    attempt = 1

    def request(self, site: str, attempt: int = 1) -> bytes:
        return super().request(site, self.attempt)

    def digest(self, attempt: int = 1) -> str:
        return super().digest(self.attempt)

    def accept(self, site: str, sent: int, reply: Reply, attempt: int = 1) -> None:
        super().accept(site, sent, reply, self.attempt)


def cheating(
    federation: Federation,
    name: str,
    attempt: int = 1,
    masking: type[ServerMasking] = ServerMasking,
) -> CheatingRun:
    registry = RunStore.create(federation.folder / name, federation.contract)
    registry.survivors = lambda _: None  # type: ignore[method-assign]
    run = CheatingRun(
        federation.contract,
        registry,
        "run-1",
        build(federation.contract, None).initial_arrays(),
        masking=masking,
    )
    run.attempt = attempt
    return run


def opened(
    run: FederatedRun, federation: Federation, sites: Collection[str], **handles: Answer
) -> bool:
    """Whether the round's sum was opened for these sites."""
    facts = drive_round(run.stages(sorted(sites)), federation.handles() | handles)
    assert facts.sites in ((), tuple(sorted(sites)))
    return bool(facts.sites)


def codes(federation: Federation, seen: list[tuple[str, str]]) -> dict[str, Answer]:
    """Handles that note who refused, and with which code."""

    def answer(site: str, wire: bytes) -> bytes:
        reply = federation.workers[site].handle(wire)
        header = messages.unpack(reply).header
        if isinstance(header, Refusal):
            seen.append((site, header.code))
        return reply

    return {site: lambda wire, s=site: answer(s, wire) for site in SITES}


def charged(federation: Federation, site: str = "north") -> list[tuple[int, int]]:
    return [(c.round, c.attempt) for c in federation.ledgers[site].charges.values()]


# The same round twice


def test_a_round_that_is_asked_for_twice_with_other_sites_gives_one_sum(
    federation: Federation,
) -> None:
    assert opened(cheating(federation, "four"), federation, ALL)
    seen: list[tuple[str, str]] = []
    again = cheating(federation, "three", attempt=2)
    assert not opened(again, federation, THREE, **codes(federation, seen))
    assert set(seen) == {(site, "E204") for site in THREE}
    assert {tuple(charged(federation, site)) for site in SITES} == {((1, 1),)}


def test_a_round_whose_reply_was_lost_is_not_charged_again_under_other_keys(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise OSError("no room")

    for site in SITES:
        monkeypatch.setattr(federation.workers[site].replies, "release", lost)
    run = cheating(federation, "lost")
    assert not opened(run, federation, ALL)
    monkeypatch.undo()
    for attempt in (1, 2):
        seen: list[tuple[str, str]] = []
        again = cheating(federation, f"again-{attempt}", attempt)
        assert not opened(again, federation, ALL, **codes(federation, seen))
        assert {code for _, code in seen} == {"E204"}
    assert charged(federation) == [(1, 1)]


# Two rounds from one adapter


def standing_still(run: FederatedRun) -> FederatedRun:
    """The same run, whose server takes no step: each round begins with the same adapter."""
    run.server_state.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return run


class RekeyingMasking(ServerMasking):
    """A server that has the sites agree on other keys for each round."""

    def agree(
        self, sites: Collection[str], number: int, needed: Collection[str] = ()
    ) -> RoundProtocol[bool]:
        self.agreement = None
        return super().agree(sites, number, needed)


def test_a_second_sum_from_one_adapter_without_a_site_is_refused_before_it_is_charged(
    federation: Federation,
) -> None:
    run = standing_still(cheating(federation, "run", masking=RekeyingMasking))
    assert opened(run, federation, ALL)
    seen: list[tuple[str, str]] = []
    with pytest.raises(RunError, match="E220"):
        opened(run, federation, THREE, **codes(federation, seen))
    assert set(seen) == {(site, "E220") for site in THREE}
    assert charged(federation) == [(1, 1)]


def test_a_second_sum_from_one_adapter_is_not_opened_when_a_site_drops_out(
    federation: Federation,
) -> None:
    run = standing_still(cheating(federation, "run"))
    assert opened(run, federation, ALL)
    seen: list[tuple[str, str]] = []
    handles = gone_from(codes(federation, seen), "west", "train")
    assert not opened(run, federation, ALL, **handles)
    assert set(seen) == {(site, "E220") for site in THREE}


def test_a_second_sum_from_one_adapter_with_one_site_more_is_not_opened(
    federation: Federation,
) -> None:
    run = standing_still(cheating(federation, "run", masking=RekeyingMasking))
    assert opened(run, federation, THREE)
    assert not opened(run, federation, ALL)
    assert run.server_round == 3


def test_sums_of_the_same_sites_from_one_adapter_are_opened(federation: Federation) -> None:
    run = standing_still(cheating(federation, "run"))
    for _ in range(3):
        assert opened(run, federation, ALL)


def test_what_was_settled_is_known_after_a_restart(federation: Federation) -> None:
    run = standing_still(cheating(federation, "run", masking=RekeyingMasking))
    assert opened(run, federation, ALL)
    for site in SITES:
        federation.restart(site)
    with pytest.raises(RunError, match="E220"):
        opened(run, federation, THREE)
    for site in SITES:
        assert charged(federation, site) == [(1, 1)]
    assert opened(run, federation, ALL)


def test_another_control_does_not_make_an_adapter_another(federation: Federation) -> None:
    arrays = build(federation.contract, None).initial_arrays()
    name, array = next(iter(arrays.items()))
    controlled = arrays | {tensors.CONTROL + name: array + 1}
    assert tensors.digest(controlled) == tensors.digest(arrays)
    moved: Arrays = arrays | {name: np.nextafter(array, np.float32(1))}
    assert tensors.digest(moved) != tensors.digest(arrays)
    assert tensors.digest({"other": array}) != tensors.digest({name: array})


# Sets that change


def with_absences(
    federation: Federation, absent: dict[int, str]
) -> Iterator[tuple[int, RoundRecord]]:
    """Rounds in which a site answers nothing readable to the request to train."""
    run = federation.run()
    while not run.done:
        number, handles = run.server_round, federation.handles()
        if number in absent:
            handles = gone_from(handles, absent[number], "train")
        yield number, drive_round(run.stages(SITES), handles)


@pytest.fixture
def long(table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]) -> Federation:
    contract = table_contract.changed(
        phases=[{"trains": "head", "rounds": 12, "sampling_rate": 0.5, "head_lr": 0.5}]
    )
    return Federation(contract, tmp_path, write_rows)


def test_ordinary_absences_and_returns_pass_under_the_default(long: Federation) -> None:
    long.permits = {"set_changes": Permits.model_fields["set_changes"].default}
    for site in SITES:
        long.restart(site)
    absent = {2: "west", 4: "west", 6: "south", 8: "east", 10: "north"}
    sites = [len(facts.sites) for _, facts in with_absences(long, absent)]
    assert sites == [4, 3] * 5 + [4, 4]
    assert long.workers["north"].site_sets.changes("run-1") == 9


def test_the_set_changes_as_often_as_the_owner_permits_and_no_more(long: Federation) -> None:
    long.permits = {"set_changes": 3}
    for site in SITES:
        long.restart(site)
    seen: list[int] = []
    playing = with_absences(long, {2: "west", 4: "west", 5: "west", 6: "south"})
    with pytest.raises(RunError, match="E220"):
        seen.extend(len(facts.sites) for _, facts in playing)
    # Round 5 is as round 4. West's return in round 6, without south, would be the fourth change;
    # it is charged, not opened, and in round 7 refused before it is charged.
    assert seen == [4, 3, 4, 3, 3, 0]
    assert max(charged(long, "east"))[0] == 6
    assert long.workers["east"].site_sets.changes("run-1") == 3


def sets_of(changes: int) -> tuple[SiteSets, Callable[..., None], PrivacyLedger]:
    """The sets of one site by themselves, with charges that are made up."""
    ledger = PrivacyLedger.in_memory("north", Keys.in_memory())
    sets = SiteSets(ledger, "a" * 64, changes)

    def settle(number: int, sites: Collection[str], begins: str = "", run: str = "r") -> None:
        key = ("a" * 64, run, number, 1)
        if key not in ledger.charges:
            with ledger.writing():
                ledger.append(
                    Charged,
                    record_set="b" * 64,
                    basis="",
                    source="",
                    rows=1,
                    unit="record",
                    contract="a" * 64,
                    run=run,
                    round=number,
                    attempt=1,
                    request="c" * 64,
                    noise_multiplier=1.0,
                    sampling_rate=0.5,
                    steps=1,
                    order=3.0,
                    adapter=(begins or f"{run}{number}").encode().hex().zfill(64),
                )
        sets.settle(run, number, sites)

    return sets, settle, ledger


@pytest.mark.parametrize(
    ("rounds", "changes"),
    [
        ([(1, "abc")], 0),
        ([(1, "abc"), (2, "cab")], 0),
        ([(1, "abc"), (2, "ab")], 1),
        ([(1, "abc"), (2, "ab"), (3, "ab"), (4, "abc")], 2),
        ([(2, "abc")], 1),
        ([(1, "abc"), (3, "abc")], 1),
        ([(1, "abc"), (3, "ab"), (5, "ab")], 2),
        ([(2, "abc"), (1, "abc")], 2),
    ],
)
def test_a_change_is_a_sum_that_does_not_follow_on_one_of_the_same_sites(
    rounds: list[tuple[int, str]], changes: int
) -> None:
    sets, settle, _ = sets_of(changes)
    for number, sites in rounds:
        settle(number, sites)
    assert sets.changes("r") == changes
    settle(1, "xyz", run="another")
    assert (sets.changes("r"), sets.changes("another")) == (changes, 0)
    if changes:
        _, settle, _ = sets_of(changes - 1)
        for number, sites in rounds[:-1]:
            settle(number, sites)
        with pytest.raises(RefusalError, match=r"has changed \d times") as caught:
            settle(*rounds[-1])
        assert caught.value.code == "E220"


def test_a_round_is_settled_for_one_set_and_asked_again_costs_no_entry() -> None:
    _, settle, ledger = sets_of(9)
    settle(1, "abc")
    before = len(ledger.entries)
    settle(1, "cba")
    assert len(ledger.entries) == before
    with pytest.raises(RefusalError, match="settled for other sites"):
        settle(1, "ab")
    with pytest.raises(RefusalError, match="was not charged here"):
        SiteSets(ledger, "a" * 64, 9).settle("r", 2, "abc")
    with pytest.raises(RefusalError, match="was not charged here"):
        SiteSets(ledger, "d" * 64, 9).settle("r", 1, "abc")


def test_members_of_which_no_permitted_sum_can_be_made_are_refused_before_the_charge() -> None:
    sets, settle, _ = sets_of(1)
    digest = b"adapter".hex().zfill(64)
    sets.check_members("r", 1, digest, "abcd", 9)
    settle(1, "abc", "adapter")
    for members, allowed in (("abc", True), ("abcd", True), ("ab", False), ("bcde", False)):
        if allowed:
            sets.check_members("r", 2, digest, members, 9)
        else:
            with pytest.raises(RefusalError, match=r"that of round 1, whose sum was of a, b, c"):
                sets.check_members("r", 2, digest, members, 9)
    settle(2, "abcd", "other")  # the one change
    sets.check_members("r", 3, "0" * 64, "abcde", 9)  # d may be in it again, and e not
    for number, members in ((3, "abc"), (4, "abcd")):
        with pytest.raises(RefusalError, match=r"permits.set_changes = 1 in site.toml"):
            sets.check_members("r", number, "0" * 64, members, 9)


def test_fewer_changes_by_a_policy_that_was_signed_later_hold_from_the_next_charge_on() -> None:
    """And more do not: what was permitted when the worker started bounds it, too."""
    sets, settle, _ = sets_of(2)
    settle(1, "abc", "one")
    settle(2, "abcd", "two")  # the first change
    sets.check_members("r", 3, "0" * 64, "abce", 9)
    with pytest.raises(RefusalError, match=r"permits.set_changes = 1 in site.toml"):
        sets.check_members("r", 3, "0" * 64, "abce", 1)
    with pytest.raises(RefusalError, match=r"permits.set_changes = 1 in site.toml"):
        sets.check_members("r", 3, "0" * 64, "abce", 9)


def test_a_refused_set_leaves_nothing_in_the_ledger_and_a_settled_one_is_authenticated() -> None:
    _, settle, ledger = sets_of(9)
    settle(1, "abc", "same")
    with pytest.raises(RefusalError, match="refused"):
        settle(2, "abcd", "same")
    assert [entry.sites for entry in ledger.settled.values()] == [("a", "b", "c")]
    entries = verify_export(list(ledger.export()))
    assert [entry.sites for entry in entries if isinstance(entry, Settled)] == [("a", "b", "c")]
    lines = [
        line.replace('\\"sites\\":[\\"a\\",\\"b\\",\\"c\\"]', '\\"sites\\":[\\"a\\",\\"b\\"]')
        for line in ledger.export()
    ]
    with pytest.raises(RefusalError) as caught:
        verify_export(lines)
    assert caught.value.code == "E212"


def test_a_set_that_is_rolled_back_with_its_transaction_is_not_remembered() -> None:
    _, settle, ledger = sets_of(9)
    settle(1, "abc")

    def interrupted() -> None:
        with ledger.writing():
            ledger.append(Settled, charge=1, sites=("a",))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert list(ledger.settled) == [2]


def test_nothing_leaves_before_the_set_is_kept(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that cannot write to its ledger gives no share."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    run = cheating(federation, "run")
    for site in SITES:
        monkeypatch.setattr(federation.workers[site].site_sets, "settle", full)
    with pytest.raises(RunError, match="0 sites revealed") as caught:
        opened(run, federation, ALL)
    assert not isinstance(caught.value, LostSumError)
    monkeypatch.undo()
    assert not federation.ledgers["north"].settled


def test_keys_for_a_round_cost_no_entry(federation: Federation) -> None:
    before = len(federation.ledgers["north"].entries)
    ask = Agree(contract=federation.contract.hash, run="run-1", round=1, attempt=1)
    federation.workers["north"].handle(messages.pack(Message(ask)))
    assert len(federation.ledgers["north"].entries) == before
