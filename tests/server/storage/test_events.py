"""What a run's events say: to those who follow it, and to those who ask later."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from silotune.common.contract.contract import Contract
from silotune.common.errors import RunError
from silotune.server import cli
from silotune.server.storage import disk, events, run_store
from silotune.server.storage.events import Events, run_status
from silotune.server.storage.run_store import RunStore


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(run_store, "LOCK_SECONDS", 0.0)


@pytest.fixture
def run(tmp_path: Path, table_contract: Contract) -> RunStore:
    """A run that this process carries out."""
    return RunStore.create(tmp_path / "run", table_contract)


def test_events_come_once_and_whole(tmp_path: Path) -> None:
    found = Events(tmp_path)
    assert found.new() == []
    events.append(tmp_path, "run", run="r", rounds=3)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"at": 1.0, "event": "comm')
    assert [e["event"] for e in found.new()] == ["run"]
    assert found.new() == []
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('itted", "round": 1, "sites": ["ä"]}\n')
    assert found.new() == [{"at": 1.0, "event": "committed", "round": 1, "sites": ["ä"]}]


def test_what_a_crash_left_of_a_line_is_left_out(tmp_path: Path) -> None:
    half, whole = b'{"at": 1.0, "event": "ru\xff\n', b'{"at": 2, "event": "x"}\n'
    (tmp_path / "events.jsonl").write_bytes(half + whole)
    assert [e["event"] for e in Events(tmp_path).new()] == ["x"]


def test_what_a_full_disk_left_of_a_line_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"at": 1.0, "event": "ru')
    events.append(tmp_path, "released", round=3)
    assert [e["event"] for e in Events(tmp_path).new()] == ["released"]


def follow(run: RunStore, *told: tuple[str, dict[str, object]]) -> Path:
    seen = Events(run.folder)
    seen.new()
    for kind, facts in told:
        run.event(kind, **facts)
    return cli._follow(run.folder, seen, 3, "mine")


BEGUN: tuple[str, dict[str, object]] = ("taken", {"token": "mine"})


def test_a_run_that_ends_well(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"loss": 0.5, "auc": 0.875, "macro_f1": 0.1, "accuracy": None}
    found = follow(
        run,
        BEGUN,
        ("rejected", {"round": 1, "site": "north", "code": "E502"}),
        ("committed", {"round": 1, "sites": ["a", "b"], "metrics": metrics}),
        ("declined", {"round": 2, "why": "auc fell"}),
        ("released", {"round": 3}),
    )
    assert found == run.folder / "adapter.safetensors"
    assert capsys.readouterr().out.splitlines() == [
        "        north: E502",
        "  1/3   2 sites   loss 0.500   auc 0.875",
        '        declined: {"event": "declined", "round": 2, "why": "auc fell"}',
    ]


@pytest.mark.parametrize("kind", ["stopped", "failed"])
def test_a_run_that_stops(run: RunStore, kind: str) -> None:
    with pytest.raises(RunError, match="quorum") as error:
        follow(run, BEGUN, (kind, {"code": "E402", "why": "below the quorum"}))
    assert error.value.code == "E402"


def test_a_run_whose_process_died(run: RunStore) -> None:
    """SIGKILL says nothing: what is left is that nobody holds the run."""
    run.close()
    with pytest.raises(RunError, match="ended without an error message") as error:
        follow(run, BEGUN, ("committed", {"round": 1, "sites": []}))
    assert error.value.code == "E603"
    assert cli._standing(run.folder)["state"].startswith("stopped: The process of the run")


def test_a_missing_site_is_named_and_then_that_the_run_goes_on_without_it(
    run: RunStore, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = {
        "sites": ["hungary", "switzerland"],
        "refused": {"hungary": "E201"},
        "nodes": {"E401": 1},
        "seconds": 42,
        "of": 600,
    }
    run.event("run", rounds=3)
    run.event("waiting", **waiting)
    assert cli._standing(run.folder)["state"] == (
        "waiting for hungary (E201), switzerland; 1 connected node without a name (E401), "
        "42 s of 600"
    )
    absent = {"switzerland": "E403"}
    follow(
        run,
        BEGUN,
        ("waiting", waiting | {"sites": ["switzerland"], "nodes": {}}),
        ("absent", {"sites": absent}),
        ("released", {"round": 3}),
    )
    assert capsys.readouterr().out.splitlines() == [
        "waiting for switzerland, 42 s of 600",
        "        the run goes on without switzerland (E403)",
    ]
    found = cli._standing(run.folder)
    assert (found["state"], found["absent"]) == ("running", absent)


def test_a_full_disk_is_told_also_where_no_event_could_be_written(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(run.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=disk.LEAST_FREE - 1))
    run.close()
    with pytest.raises(RunError, match="The disk of") as error:
        follow(run, BEGUN, ("committed", {"round": 1, "sites": []}))
    assert error.value.code == "E604"
    assert cli._standing(run.folder)["state"].startswith("stopped: The disk of")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_last_event_of_a_run_has_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    events.reserve(tmp_path)
    real, reserve = Path.open, tmp_path / events.RESERVE

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        if reserve.exists():
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    events.append(tmp_path, "failed", code="E604", why="full")
    monkeypatch.undo()
    assert [e["code"] for e in Events(tmp_path).new()] == ["E604"]
    assert not reserve.exists()


def test_a_run_that_has_said_why_it_stopped_does_not_count_as_running(run: RunStore) -> None:
    """Its process may take a moment to end."""
    run.event("run", rounds=3)
    run.event("failed", code="E604", why="the disk is full")
    assert cli._standing(run.folder)["state"] == "stopped: the disk is full"
    run.event("run", rounds=3)
    assert cli._standing(run.folder)["state"] == "running"


def test_what_a_process_said_last_is_heard(run: RunStore) -> None:
    run.close()
    assert follow(run, BEGUN, ("released", {"round": 3})).name == "adapter.safetensors"


def test_a_second_server_is_refused_and_the_first_goes_on(run: RunStore) -> None:
    refused: dict[str, object] = {"code": "E602", "why": "another server"}
    others = ("taken", {"token": "another"}), ("released", {"round": 3})
    with pytest.raises(RunError, match="another server"):
        follow(run, *others, ("refused", refused | {"token": "mine"}))
    theirs = ("refused", refused | {"token": "another"})
    assert follow(run, BEGUN, theirs, ("released", {"round": 3}))


def test_a_run_that_never_begins(run: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "FIRST_SECONDS", 0.0)
    with pytest.raises(RunError, match="did not begin"):
        follow(run)


def test_looking_at_a_run_keeps_nobody_from_it(run: RunStore, table_contract: Contract) -> None:
    assert run_store.is_running(run.folder)
    with pytest.raises(RunError, match="Another server"):
        RunStore.open(run.folder, table_contract)
    run.close()
    assert not run_store.is_running(run.folder)
    again = RunStore.open(run.folder, table_contract)
    assert cli._standing(run.folder)["state"] == "running"
    again.close()


def test_where_a_run_stands(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"event": "run", "rounds": 4},
        {"event": "committed", "round": 1},
        {"event": "rejected", "round": 2, "site": "north", "code": "E402"},
        {"event": "stopped", "code": "E402", "why": "below the quorum"},
        {"event": "failed", "code": "E402", "why": "Run stopped"},
        {"event": "run", "rounds": 4},
        {"event": "resumed", "after": 1},
        {"event": "committed", "round": 2},
    ]
    found = run_status([{"at": float(at), **line} for at, line in enumerate(lines)])
    assert (found.planned, found.committed, found.why, found.last) == (4, {1, 2}, "", 7.0)
    assert (found.timed, found.seconds) == (2, 2.0)
    assert run_status([{"at": 0.0, **line} for line in lines[:5]]).why == "Run stopped"
    assert json.dumps(sorted(found.rejected)) == '[["north", "E402"]]'
