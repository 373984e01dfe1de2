"""A server that dies anywhere and is started again: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from silotune.common.contract.contract import Contract
from silotune.common.errors import ErrorCode, RunError
from silotune.common.models.factory import build
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Arrays
from silotune.server.rounds.exchange import SILENT, NoReply, drive_round
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore
from tests.client.worker.test_secagg import SITES, Answer, Federation, gone_from, released_contract

Fresh = Callable[[str], Federation]


@pytest.fixture(params=["masked", "plain"])
def fresh(
    request: pytest.FixtureRequest,
    table_contract: Contract,
    tmp_path: Path,
    write_rows: Callable[..., Path],
) -> Fresh:
    """fresh(name) -> four sites with seeded noise, the same each time."""

    def new(name: str) -> Federation:
        contract = released_contract(table_contract).changed(
            phases=[
                {
                    "trains": "head",
                    "rounds": 2,
                    "sampling_rate": 0.5,
                    "budget_share": 0.5,
                    "head_lr": 0.5,
                },
                {
                    "trains": "head",
                    "rounds": 2,
                    "sampling_rate": 0.3,
                    "budget_share": 0.5,
                    "head_lr": 0.2,
                },
            ]
        )
        federation = Federation(contract, tmp_path / name, write_rows)
        if request.param == "plain":
            federation.contract = federation.contract.changed(secure_aggregation=None)
            for site in SITES:
                federation.restart(site)
        return federation

    return new


def server(federation: Federation, *, resume: bool = False) -> FederatedRun:
    """A server process's run: begun, or taken up again."""
    folder, contract = federation.folder / "run", federation.contract
    registry = RunStore.open(folder, contract) if resume else RunStore.create(folder, contract)
    run = FederatedRun(contract, registry, "run-1", build(contract, None).initial_arrays())
    if resume:
        run.restore()
    return run


def play(
    run: FederatedRun, handles: dict[str, Answer], stages: int = -1, *, answered: bool = True
) -> bool:
    """Carry the run out; or only so many stages, and die before or after the sites' answers to
    the next one. True when it ran to its end."""
    while not run.done:
        round_ = run.stages(SITES)
        asked = next(round_)
        while True:
            if stages == 0:
                for site, wire in asked.items() if answered else ():
                    handles[site](wire)
                run.registry.close()
                return False
            stages -= 1
            try:
                asked = round_.send({site: handles[site](wire) for site, wire in asked.items()})
            except StopIteration:
                break
    run.registry.close()
    return True


def skipped(run: FederatedRun) -> list[str]:
    """Why rounds were left out."""
    lines = (run.registry.folder / "events.jsonl").read_text().splitlines()
    return [event["why"] for event in map(json.loads, lines) if event["event"] == "skipped"]


def same(found: Arrays, expected: Arrays) -> bool:
    return all(np.array_equal(found[name], array) for name, array in expected.items())


def test_a_server_that_dies_at_any_stage_goes_on_to_the_same_adapter(fresh: Fresh) -> None:
    whole = fresh("whole")
    assert play(server(whole), whole.handles())
    expected = RunStore(whole.folder / "run").adapter()
    facts = RunStore(whole.folder / "run").rounds()
    for answered in (False, True):
        for stages in range(100):
            federation = fresh(f"{stages}-{answered}")
            if play(server(federation), federation.handles(), stages, answered=answered):
                break
            assert play(server(federation, resume=True), federation.handles())
            registry = RunStore(federation.folder / "run")
            assert same(registry.adapter(), expected), (stages, answered)
            for before, after in zip(facts, registry.rounds(), strict=True):
                assert before["sites"] == after["sites"]
                assert before["clip_norm"] == after["clip_norm"]
            for ledger in federation.ledgers.values():
                assert len(ledger.charges) == len(ledger.releases) == 4  # nothing was paid twice
        assert stages >= federation.contract.rounds


def test_a_run_that_dies_before_its_release_is_released_when_it_is_taken_up(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = fresh("unreleased")
    run = server(federation)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.registry, "release", dies)
    with pytest.raises(KeyboardInterrupt):
        play(run, federation.handles())
    run.registry.close()
    with pytest.raises(RunError, match="has no released adapter"):
        run.registry.adapter()
    again = server(federation, resume=True)
    assert again.done
    assert same(again.registry.adapter(), again.server_state.adapter)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "adapter.safetensors").write_bytes(b"x"),
        lambda folder: (folder / "state.safetensors").unlink(),
        lambda folder: (folder / "round.json").write_text("{"),
        lambda folder: (folder / "round.json").write_text("{}"),
        lambda folder: (folder / "round.json").write_text("[1]"),
        lambda folder: os.truncate(folder / "adapter.safetensors", 100),
    ],
    ids=["other bytes", "no state", "half JSON", "no facts", "a list", "cut short"],
)
def test_a_damaged_round_is_said_and_the_one_before_is_used(
    fresh: Fresh, damage: Callable[[Path], Any]
) -> None:
    whole = fresh("whole")
    play(server(whole), whole.handles())
    federation = fresh("damaged")
    stages = 2 + 2 * 2 if federation.contract.secure_aggregation else 2  # of two rounds
    play(server(federation), federation.handles(), stages, answered=False)
    damage(federation.folder / "run" / "rounds" / "0002")
    run = server(federation, resume=True)
    assert run.server_round == 2
    events = [
        json.loads(e) for e in (run.registry.folder / "events.jsonl").read_text().split("\n") if e
    ]
    assert [e["round"] for e in events if e["event"] == "damaged"] == [2]
    assert any((run.registry.folder / "rounds").glob(".damaged-0002-*"))
    # The sites answer what is asked again with their stored bytes; nothing is paid twice.
    assert play(run, federation.handles())
    assert same(run.registry.adapter(), RunStore(whole.folder / "run").adapter())
    assert all(len(ledger.charges) == 4 for ledger in federation.ledgers.values())


def test_a_run_that_lost_its_quorum_goes_on_when_the_sites_are_back(fresh: Fresh) -> None:
    federation = fresh("quorum")
    handles = federation.handles()
    for site in ("west", "south"):
        handles = gone_from(handles, site, "train")
    run = server(federation)
    with pytest.raises(RunError, match="Run stopped at round 1"):
        play(run, handles)
    run.registry.close()
    run = server(federation, resume=True)
    assert play(run, federation.handles())
    assert [f["sites"] for f in run.registry.rounds()] == [sorted(SITES)] * 4


def test_a_round_that_cannot_be_opened_any_more_is_given_up_and_the_run_goes_on(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    """All sites lost their secrets after their masked updates: those are lost, the run is not."""
    federation = Federation(table_contract, tmp_path, write_rows)
    run = server(federation)
    assert not play(run, federation.handles(), 2)
    for site in SITES:
        federation.restart(site)
    run = server(federation, resume=True)
    assert play(run, federation.handles())
    (why,) = skipped(run)
    assert "does not open: Secure aggregation: 0 sites revealed" in why
    assert [len(f["sites"]) for f in run.registry.rounds()] == [0, 4, 4]
    charged = {c.round for ledger in federation.ledgers.values() for c in ledger.charges.values()}
    assert charged == {1, 2, 3}


def test_a_site_that_comes_back_is_in_no_sum_that_was_asked_for_without_it(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    """The sites endorse one set of survivors a round: another one would lay the difference open."""
    federation = Federation(table_contract, tmp_path, write_rows)
    run = server(federation)
    handles = gone_from(federation.handles(), "west", "train")
    assert not play(run, handles, 3)  # the others have endorsed the three
    run = server(federation, resume=True)
    assert play(run, federation.handles())
    assert [f["sites"] for f in run.registry.rounds()] == [
        sorted(set(SITES) - {"west"}),
        sorted(SITES),
        sorted(SITES),
    ]


def test_a_damaged_agreement_is_made_anew(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    federation = Federation(table_contract, tmp_path, write_rows)
    run = server(federation)
    assert not play(run, federation.handles(), 4, answered=False)  # round 2 is not asked yet
    path = run.registry.folder / "agreement.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run = server(federation, resume=True)
    assert play(run, federation.handles())
    assert [len(f["sites"]) for f in run.registry.rounds()] == [4, 4, 4]


def test_a_run_is_carried_out_by_one_server_at_a_time(fresh: Fresh) -> None:
    federation = fresh("two")
    run = server(federation)
    with pytest.raises(RunError) as caught:
        server(federation, resume=True)
    assert caught.value.code == "E602"
    code = (
        "import sys; from pathlib import Path\n"
        "from silotune.common.contract.contract import load\n"
        "from silotune.server.storage.run_store import Registry\n"
        "folder = Path(sys.argv[1])\n"
        "Registry.open(folder, load(folder / 'contract.json')); print('opened')"
    )
    words = [sys.executable, "-c", code, str(run.registry.folder)]
    other = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "Another server is carrying out the run" in other.stderr
    run.registry.close()
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "opened\n"


def test_a_run_of_another_contract_is_not_gone_on_with(fresh: Fresh) -> None:
    federation = fresh("other")
    server(federation).registry.close()
    federation.contract = federation.contract.changed(deadline_seconds=5.0)
    with pytest.raises(RunError, match="is a run of the contract"):
        server(federation, resume=True)
    with pytest.raises(RunError, match="holds no run"):
        RunStore.open(federation.folder / "nothing", federation.contract)


def test_the_stored_agreement_holds_what_passed_through_the_server_and_no_more(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    federation = Federation(table_contract, tmp_path, write_rows)
    sent: set[bytes] = set()
    handles = federation.handles()

    def noted(site: str, wire: bytes) -> bytes:
        reply = handles[site](wire)
        sent.update(messages.unpack(reply).blobs.values())
        return reply

    run = server(federation)
    drive_round(run.stages(SITES), {s: lambda w, s=s: noted(s, w) for s in SITES})
    found = run.registry.agreement()
    assert found is not None
    stored = {*found.keys.values(), *(b for each in found.sealed.values() for b in each.values())}
    assert len(stored) == 4 + 4 * 3
    assert stored <= sent


# Charged and lost, under masks


@pytest.fixture
def masked(table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]) -> Federation:
    contract = table_contract.changed(
        phases=[{"trains": "head", "rounds": 4, "sampling_rate": 0.5, "head_lr": 0.5}]
    )
    return Federation(contract, tmp_path, write_rows)


def losing(federation: Federation, lost: dict[int, set[str]]) -> dict[str, Answer]:
    """Sites whose disk takes the charge of these rounds and not the reply, and which then start
    again."""

    def answer(site: str, wire: bytes) -> bytes:
        header = messages.unpack(wire).header
        if header.kind != "train" or site not in lost.get(header.round, ()):
            return federation.workers[site].handle(wire)

        def full(*_: object) -> None:
            raise OSError("no room")

        federation.workers[site].replies.release = full  # type: ignore[method-assign]
        try:
            return federation.workers[site].handle(wire)
        finally:
            federation.restart(site)

    return {site: lambda wire, s=site: answer(s, wire) for site in SITES}


def rounds_charged(federation: Federation, site: str) -> list[int]:
    return [charge.round for charge in federation.ledgers[site].charges.values()]


@pytest.mark.parametrize("lost", [{"west", "east"}, set(SITES)], ids=["two of four", "all"])
def test_a_masked_round_whose_charged_replies_are_lost_is_given_up_and_the_run_goes_on(
    masked: Federation, lost: set[str]
) -> None:
    run = server(masked)
    assert play(run, losing(masked, {2: lost}))
    assert [len(f["sites"]) for f in run.registry.rounds()] == [4, 0, 4, 4]
    (why,) = skipped(run)
    assert "updates were charged and lost (" in why
    assert "west: E204" in why
    given_up = run.registry.rounds()[1]
    assert set(given_up["failed"]) == lost
    assert set(given_up["epsilon"]) == set(SITES) - lost
    for site in SITES:
        assert rounds_charged(masked, site) == [1, 2, 3, 4]
    # The adapter that the lost round began with is that of the next round.
    adapters = [
        load_file(run.registry.folder / "rounds" / f"{n:04d}" / "adapter.safetensors")
        for n in (1, 2, 3)
    ]
    assert same(adapters[1], adapters[0])
    assert not same(adapters[2], adapters[1])


def test_a_resumed_masked_run_goes_on_after_replies_that_were_charged_and_lost(
    masked: Federation,
) -> None:
    run = server(masked)
    handles = losing(masked, {1: set(SITES)})
    assert not play(run, handles, 2)  # the server dies with the sites, and sees no reply
    run = server(masked, resume=True)
    assert play(run, masked.handles())
    assert [len(f["sites"]) for f in run.registry.rounds()] == [0, 4, 4, 4]
    assert {tuple(rounds_charged(masked, site)) for site in SITES} == {(1, 2, 3, 4)}


def test_a_run_that_loses_every_round_stops_at_the_second_and_goes_on_when_it_is_resumed(
    masked: Federation,
) -> None:
    lost = {1: set(SITES), 2: set(SITES)}
    run = server(masked)
    with pytest.raises(RunError, match="this round and the one before it are lost"):
        play(run, losing(masked, lost))
    assert run.server_round == 2
    run.registry.close()
    run = server(masked, resume=True)
    assert play(run, masked.handles())
    assert [len(f["sites"]) for f in run.registry.rounds()] == [0, 0, 4, 4]


def test_two_lost_rounds_that_do_not_follow_on_each_other_do_not_stop_a_run(
    masked: Federation,
) -> None:
    run = server(masked)
    assert play(run, losing(masked, {1: set(SITES), 3: set(SITES)}))
    assert [len(f["sites"]) for f in run.registry.rounds()] == [0, 4, 0, 4]


def test_one_lost_reply_leaves_a_round_to_the_others(masked: Federation) -> None:
    run = server(masked)
    assert play(run, losing(masked, {2: {"west"}}))
    # In round 3 it says that it has no secrets, in round 4 it has new ones.
    assert [len(f["sites"]) for f in run.registry.rounds()] == [4, 3, 3, 4]
    assert not skipped(run)


def test_sites_that_were_not_charged_make_a_round_under_new_keys_without_one_that_was(
    masked: Federation,
) -> None:
    """One has answered; the others were started again before they were asked."""
    run = server(masked)
    handles = masked.handles()
    stages = run.stages(SITES)
    asked = next(stages)
    for _ in range(2):
        asked = stages.send({site: handles[site](wire) for site, wire in asked.items()})
    handles["north"](asked["north"])
    run.registry.close()
    for site in set(SITES) - {"north"}:
        masked.restart(site)
    run = server(masked, resume=True)
    assert play(run, handles)
    first, *rest = run.registry.rounds()
    assert first["sites"] == ["east", "south", "west"]
    assert first["failed"] == {"north": "E204"}
    assert [len(f["sites"]) for f in rest] == [4, 4, 4]
    assert {tuple(rounds_charged(masked, site)) for site in SITES} == {(1, 2, 3, 4)}


def test_a_site_that_is_only_silent_stops_a_run_and_costs_it_no_round(masked: Federation) -> None:
    run = server(masked)
    handles: dict[str, Any] = masked.handles()

    def silent(wire: bytes, site: str) -> Any:
        return SILENT if messages.unpack(wire).header.kind == "train" else handles[site](wire)

    partly = handles | {s: lambda wire, s=s: silent(wire, s) for s in ("west", "east")}
    with pytest.raises(RunError, match="2 of 4 sites counted"):
        play(run, partly)
    run.registry.close()
    run = server(masked, resume=True)
    assert play(run, masked.handles())
    assert [len(f["sites"]) for f in run.registry.rounds()] == [4, 4, 4, 4]


def test_a_reply_that_did_not_arrive_is_asked_for_once_more_at_no_cost(masked: Federation) -> None:
    run, missed = server(masked), list[str]()
    handles = masked.handles()

    def flaky(site: str, wire: bytes) -> Any:
        reply = handles[site](wire)
        if messages.unpack(wire).header.kind == "train" and missed.count(site) < 1:
            missed.append(site)
            return NoReply(ErrorCode.UNEXPECTED)
        return reply

    flaky_handles: dict[str, Any] = {
        s: (lambda wire, s=s: flaky(s, wire)) if s in ("west", "east") else handles[s]
        for s in SITES
    }
    assert play(run, flaky_handles)
    assert [len(f["sites"]) for f in run.registry.rounds()] == [4, 4, 4, 4]
    assert {tuple(rounds_charged(masked, site)) for site in SITES} == {(1, 2, 3, 4)}


# Who comes while a server is away


@pytest.mark.parametrize("stages", [2, 3], ids=["agreed", "trained"])
def test_a_site_that_comes_while_the_server_is_away_joins_at_the_next_round(
    masked: Federation, stages: int
) -> None:
    run = server(masked)
    three = [site for site in SITES if site != "west"]
    handles = masked.handles()

    def partly(run: FederatedRun, sites: Any, stages: int) -> None:
        round_ = run.stages(sites)
        asked = next(round_)
        for _ in range(stages):
            try:
                asked = round_.send({site: handles[site](wire) for site, wire in asked.items()})
            except StopIteration:
                break
        else:
            for site, wire in asked.items():
                handles[site](wire)
        run.registry.close()

    partly(run, three, stages)
    partly(server(masked, resume=True), SITES, 0)  # and dies again
    run = server(masked, resume=True)
    assert play(run, handles)
    assert [len(f["sites"]) for f in run.registry.rounds()] == [3, 4, 4, 4]
    for site in three:
        assert rounds_charged(masked, site) == [1, 2, 3, 4]
    assert rounds_charged(masked, "west") == [2, 3, 4]


def test_a_new_site_is_asked_at_once_if_the_agreement_serves_nobody_any_more(
    masked: Federation,
) -> None:
    run = server(masked)
    three = [site for site in SITES if site != "west"]
    stages = run.stages(three)
    asked = next(stages)
    for _ in range(2):
        asked = stages.send({site: masked.handles()[site](wire) for site, wire in asked.items()})
    run.registry.close()
    for site in SITES:
        masked.restart(site)
    run = server(masked, resume=True)
    assert play(run, masked.handles())
    assert [len(f["sites"]) for f in run.registry.rounds()] == [4, 4, 4, 4]


# The same adapter twice


def test_after_a_sum_that_was_not_taken_the_next_is_of_the_same_sites_or_asked_for_later(
    masked: Federation,
) -> None:
    """The adapter has not moved, and sites refuse another set from it: nobody is charged for what
    they would refuse."""
    run, handles = server(masked), masked.handles()
    run.server_state.step = lambda *_, **__: "worse"  # type: ignore[method-assign, assignment]
    drive_round(run.stages(SITES), handles)
    del run.server_state.step  # type: ignore[method-assign]
    run.registry.close()
    three = [site for site in SITES if site != "west"]
    for site in SITES:
        masked.restart(site)
    run = server(masked, resume=True)
    with pytest.raises(RunError, match=r"round 2: west must take part.*\(E220\)"):
        drive_round(run.stages(three), handles)
    assert rounds_charged(masked, "north") == [1]
    run.registry.close()
    run = server(masked, resume=True)
    run.skip()  # the sites have given shares: they refuse by themselves, and are not charged
    with pytest.raises(RunError, match="east: E220, north: E220, south: E220"):
        drive_round(run.stages(three), handles)
    assert rounds_charged(masked, "north") == [1]
    run.registry.close()
    run = server(masked, resume=True)
    assert play(run, handles)
    assert [len(f["sites"]) for f in run.registry.rounds()] == [4, 0, 4, 4]
    assert skipped(run) == ["the operator left it out"]


def test_a_round_can_be_left_out_whose_sum_lacks_a_site_for_good_before_anybody_gave_a_share(
    masked: Federation,
) -> None:
    run, handles = server(masked), masked.handles()
    assert not play(run, handles, 3, answered=False)  # the sum of all four was to be opened
    three = [site for site in SITES if site != "west"]
    run = server(masked, resume=True)
    with pytest.raises(RunError, match="west must take part"):
        drive_round(run.stages(three), handles)
    run.registry.close()
    run = server(masked, resume=True)
    run.skip()
    while not run.done:
        drive_round(run.stages(three), handles)
    assert [len(f["sites"]) for f in run.registry.rounds()] == [0, 3, 3, 3]


def test_a_round_after_a_sum_that_was_not_taken_waits_for_a_site_that_did_not_answer(
    masked: Federation,
) -> None:
    run, handles = server(masked), masked.handles()
    run.server_state.step = lambda *_, **__: "worse"  # type: ignore[method-assign, assignment]
    drive_round(run.stages(SITES), handles)
    del run.server_state.step  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"3 of 4 sites counted.*west must be among them"):
        drive_round(run.stages(SITES), gone_from(handles, "west", "train"))
    run.registry.close()
    run = server(masked, resume=True)
    assert play(run, handles)
    assert [len(f["sites"]) for f in run.registry.rounds()] == [4, 4, 4, 4]


def test_a_site_more_is_left_out_of_the_second_sum_from_one_adapter(masked: Federation) -> None:
    run, handles = server(masked), masked.handles()
    run.server_state.step = lambda *_, **__: "worse"  # type: ignore[method-assign, assignment]
    three = [site for site in SITES if site != "west"]
    drive_round(run.stages(three), handles)
    del run.server_state.step  # type: ignore[method-assign]
    facts = [drive_round(run.stages(SITES), handles) for _ in range(2)]
    assert [len(f.sites) for f in facts] == [3, 4]


def test_a_sum_that_may_still_open_stops_a_run_and_opens_when_it_is_resumed(
    masked: Federation,
) -> None:
    """One survivor has lost its secrets, one is silent: with it, three can open the sum."""
    run, handles = server(masked), masked.handles()

    def reveals(site: str, wire: bytes) -> Any:
        header = messages.unpack(wire).header
        if header.kind == "reveal" and header.round == 2:
            if site == "north":
                return SILENT
            if site == "west":
                masked.restart("west")
        return handles[site](wire)

    partly: dict[str, Any] = {s: lambda wire, s=s: reveals(s, wire) for s in SITES}
    with pytest.raises(RunError, match="does not open: Secure aggregation: 2 sites revealed"):
        play(run, partly)
    run.registry.close()
    run = server(masked, resume=True)
    assert play(run, handles)
    assert [len(f["sites"]) for f in run.registry.rounds()] == [4, 4, 4, 4]
    assert not skipped(run)
