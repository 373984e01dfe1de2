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

from silotune.common import messages
from silotune.common.contract import Contract
from silotune.common.errors import RunError
from silotune.common.messages import Arrays
from silotune.common.model import build
from silotune.server.registry import Registry
from silotune.server.replies import carry_out
from silotune.server.rounds import Run
from tests.client.test_masking import SITES, Answer, Federation, gone_from, released_contract

Fresh = Callable[[str], Federation]


@pytest.fixture(params=["masked", "plain"])
def fresh(
    request: pytest.FixtureRequest, table_contract: Contract, tmp_path: Path,
    write_rows: Callable[..., Path],
) -> Fresh:
    """fresh(name) -> four sites with seeded noise, the same each time."""

    def new(name: str) -> Federation:
        contract = released_contract(table_contract).changed(phases=[
            {"trains": "head", "rounds": 2, "sampling_rate": 0.5, "budget": 0.5, "head_rate": 0.5},
            {"trains": "head", "rounds": 2, "sampling_rate": 0.3, "budget": 0.5, "head_rate": 0.2},
        ])
        federation = Federation(contract, tmp_path / name, write_rows)
        if request.param == "plain":
            federation.contract = federation.contract.changed(secure_aggregation=None)
            for site in SITES:
                federation.restart(site)
        return federation

    return new


def server(federation: Federation, *, resume: bool = False) -> Run:
    """A server process's run: begun, or taken up again."""
    folder, contract = federation.folder / "run", federation.contract
    registry = Registry.open(folder, contract) if resume else Registry.create(folder, contract)
    run = Run(contract, registry, "run-1", build(contract, None).initial_arrays())
    if resume:
        run.restore()
    return run


def play(run: Run, handles: dict[str, Answer], stages: int = -1, *, answered: bool = True) -> bool:
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


def same(found: Arrays, expected: Arrays) -> bool:
    return all(np.array_equal(found[name], array) for name, array in expected.items())


def test_a_server_that_dies_at_any_stage_goes_on_to_the_same_adapter(fresh: Fresh) -> None:
    whole = fresh("whole")
    assert play(server(whole), whole.handles())
    expected = Registry(whole.folder / "run").adapter()
    facts = Registry(whole.folder / "run").rounds()
    for answered in (False, True):
        for stages in range(100):
            federation = fresh(f"{stages}-{answered}")
            if play(server(federation), federation.handles(), stages, answered=answered):
                break
            assert play(server(federation, resume=True), federation.handles())
            registry = Registry(federation.folder / "run")
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
    assert same(again.registry.adapter(), again.iterate.adapter)


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "adapter.safetensors").write_bytes(b"x"),
    lambda folder: (folder / "state.safetensors").unlink(),
    lambda folder: (folder / "round.json").write_text("{"),
    lambda folder: (folder / "round.json").write_text("{}"),
    lambda folder: (folder / "round.json").write_text("[1]"),
    lambda folder: os.truncate(folder / "adapter.safetensors", 100),
], ids=["other bytes", "no state", "half JSON", "no facts", "a list", "cut short"])
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
    assert run.number == 2
    events = [json.loads(e) for e in (run.registry.folder / "events.jsonl").read_text().split("\n")
              if e]
    assert [e["round"] for e in events if e["event"] == "damaged"] == [2]
    assert any((run.registry.folder / "rounds").glob(".damaged-0002-*"))
    # The sites answer what is asked again with their stored bytes; nothing is paid twice.
    assert play(run, federation.handles())
    assert same(run.registry.adapter(), Registry(whole.folder / "run").adapter())
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


def test_a_round_that_cannot_be_opened_any_more_can_be_left_out(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    """All sites lost their secrets after their masked updates: those are lost, the run is not."""
    federation = Federation(table_contract, tmp_path, write_rows)
    run = server(federation)
    assert not play(run, federation.handles(), 2)
    for site in SITES:
        federation.restart(site)
    run = server(federation, resume=True)
    with pytest.raises(RunError, match="does not open"):
        play(run, federation.handles())
    run.registry.close()
    run = server(federation, resume=True)
    facts = run.skip()
    assert (facts.round, facts.sites) == (1, ())
    assert play(run, federation.handles())
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
        sorted(set(SITES) - {"west"}), sorted(SITES), sorted(SITES)
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
        "from silotune.common.contract import load; from silotune.server.registry import Registry\n"
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
        Registry.open(federation.folder / "nothing", federation.contract)


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
    carry_out(run.stages(SITES), {s: lambda w, s=s: noted(s, w) for s in SITES})
    found = run.registry.agreement()
    assert found is not None
    stored = {*found.keys.values(), *(b for each in found.sealed.values() for b in each.values())}
    assert len(stored) == 4 + 4 * 3
    assert stored <= sent
