"""What an operator's Prometheus sees: processes, certificates, and how far each run is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from silotune.common.contract.contract import Contract
from silotune.common.errors import ContractError
from silotune.common.runtime import prometheus
from silotune.common.runtime.process_lock import try_lock
from silotune.server.operations import telemetry
from silotune.server.operations.server_folder import ServerFolder, ServerSettings
from silotune.server.operations.telemetry import ServerMonitor
from silotune.server.storage.run_store import RunStore

Shown = dict[tuple[str, ...], float]
Event = dict[str, object]
RUN: Event = {"at": 100.0, "event": "run", "run": "r", "contract": "0" * 64, "rounds": 3}


@pytest.fixture
def place(tmp_path: Path) -> ServerFolder:
    return ServerFolder.create(
        tmp_path / "server", ServerSettings(host="fl.example.org", metrics_port=1)
    )


@pytest.fixture
def listening() -> Iterator[Callable[[], int]]:
    """listening() -> a port on which somebody listens until the test ends."""
    made = []

    def call() -> int:
        made.append(socket.create_server(("127.0.0.1", 0)))
        return int(made[-1].getsockname()[1])

    yield call
    for listener in made:
        listener.close()


def write(place: ServerFolder, run: str, *events: Event, end: str = "\n") -> Path:
    folder = place.runs / run
    folder.mkdir(exist_ok=True)
    file = folder / "events.jsonl"
    file.write_text("\n".join(json.dumps(event) for event in events) + end)
    return file


@contextlib.contextmanager
def carried_out(place: ServerFolder, run: str) -> Iterator[None]:
    """A process holds the run."""
    (place.runs / run).mkdir(exist_ok=True)
    held = try_lock(place.runs / run / ".lock")
    assert held is not None
    yield
    os.close(held)


def shown(place: ServerFolder) -> Shown:
    text = prometheus.text(ServerMonitor(place, lambda _: True).collect()).decode()
    return {
        (s.name.removeprefix("silotune_server_"), *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_a_new_server_has_certificates_and_nobody(place: ServerFolder) -> None:
    found = shown(place)
    ca, server = (found["certificate_expiry_timestamp_seconds", n] for n in ("ca", "server"))
    assert ca - server == pytest.approx((3650 - 397) * 86400, abs=60)
    assert found["roster_sites",] == 0
    assert not any(name[0].startswith("run_") for name in found)


def test_a_run_that_goes_well(place: ServerFolder) -> None:
    write(
        place,
        "r",
        RUN,
        {"at": 102.0, "event": "agreed", "round": 1, "sites": ["a", "b"]},
        {"at": 110.0, "event": "committed", "round": 1, "sites": ["a"]},
        {"at": 111.0, "event": "rejected", "round": 2, "site": "a", "code": "E402"},
        {"at": 112.0, "event": "rejected", "round": 2, "site": "b", "code": "E502"},
        {"at": 113.0, "event": "rejected", "round": 2, "site": "a", "code": "E402"},
        {"at": 130.0, "event": "committed", "round": 2, "sites": ["a", "b"]},
    )
    with carried_out(place, "r"):
        found = {name: value for name, value in shown(place).items() if name[0].startswith("run_")}
    assert found == {
        ("run_rounds_planned", "r"): 3,
        ("run_rounds_committed", "r"): 2,
        ("run_stopped", "r"): 0,
        ("run_released", "r"): 0,
        ("run_last_event_timestamp_seconds", "r"): 130.0,
        ("run_rejected_total", "E402", "r", "a"): 2,
        ("run_rejected_total", "E502", "r", "b"): 1,
        ("run_round_seconds_count", "r"): 2,
        ("run_round_seconds_sum", "r"): 30.0,
    }


def test_stopped_until_it_is_resumed_and_the_pause_is_no_round(place: ServerFolder) -> None:
    events: list[Event] = [
        RUN,
        {"at": 110.0, "event": "committed", "round": 1, "sites": []},
        {"at": 120.0, "event": "stopped", "round": 2, "code": "E402", "why": "x", "failed": {}},
        {"at": 121.0, "event": "failed", "code": "E402", "why": "x"},
    ]
    write(place, "r", *events)
    assert shown(place)["run_stopped", "r"] == 1
    events += [RUN | {"at": 5000.0}, {"at": 5001.0, "event": "resumed", "after": 1}]
    write(place, "r", *events)
    with carried_out(place, "r"):
        assert shown(place)["run_stopped", "r"] == 0
    events += [
        {"at": 5011.0, "event": "committed", "round": 2, "sites": []},
        {"at": 5012.0, "event": "skipped", "round": 3},
        {"at": 5012.1, "event": "committed", "round": 3, "sites": []},
        {"at": 5013.0, "event": "released", "round": 3},
    ]
    write(place, "r", *events)
    found = shown(place)
    assert (found["run_round_seconds_count", "r"], found["run_round_seconds_sum", "r"]) == (2, 20)
    assert (found["run_rounds_committed", "r"], found["run_released", "r"]) == (3, 1)
    assert found["run_stopped", "r"] == 0


def test_a_run_whose_process_died_counts_as_stopped(place: ServerFolder) -> None:
    """SIGKILL writes no event: that nobody carries the run out is all there is to see."""
    write(place, "r", RUN, {"at": 110.0, "event": "committed", "round": 1, "sites": []})
    with carried_out(place, "r"):
        assert shown(place)["run_stopped", "r"] == 0
    assert shown(place)["run_stopped", "r"] == 1
    write(place, "new", {"at": 1.0, "event": "starting", "token": "t"})  # is building its model
    assert shown(place)["run_stopped", "new"] == 0


def test_a_round_made_again_counts_once(place: ServerFolder) -> None:
    write(
        place,
        "r",
        RUN,
        *({"at": 101.0 + n, "event": "committed", "round": 1, "sites": []} for n in range(2)),
    )
    assert shown(place)["run_rounds_committed", "r"] == 1


def test_half_a_line_is_passed_over(place: ServerFolder) -> None:
    write(place, "r", RUN, end='\n{"at": 3, "eve')
    assert shown(place)["run_rounds_planned", "r"] == 3


def test_the_registrys_own_events_are_read(place: ServerFolder, table_contract: Contract) -> None:
    registry = RunStore.create(place.runs / "own", table_contract, place.runs / ".receipts")
    registry.event("run", run="own", contract=table_contract.hash, rounds=3)
    registry.event("rejected", round=1, site='north "x"\n', code="E402")
    registry.close()
    found = shown(place)
    assert found["run_rejected_total", "E402", "own", 'north "x"\n'] == 1
    assert found["run_last_event_timestamp_seconds", "own"] > 1e9


def test_only_the_newest_runs_are_shown(place: ServerFolder) -> None:
    for number in range(telemetry.MOST_RUNS + 5):
        write(place, f"r{number:03}", RUN)
    names = {name[1] for name in shown(place) if name[0] == "run_rounds_planned"}
    assert len(names) == telemetry.MOST_RUNS


def test_health_needs_both_processes_and_both_ports(
    tmp_path: Path, listening: Callable[[], int]
) -> None:
    link, port, closed = listening(), listening(), socket.create_server(("127.0.0.1", 0))
    nobody = int(closed.getsockname()[1])
    closed.close()

    def health(running: set[str], link: int, port: int) -> str:
        settings = ServerSettings(host="x", port=port, link_port=link)
        folder = tmp_path / f"{link}-{port}"
        place = ServerFolder(folder) if folder.exists() else ServerFolder.create(folder, settings)
        return ServerMonitor(place, running.__contains__).health()

    both = {"superlink", "nginx"}
    assert health(both, link, port) == ""
    assert health({"nginx"}, link, port) == "superlink"
    assert health({"superlink"}, link, port) == "nginx"
    assert health(both, nobody, port) == "superlink"
    assert health(both, link, nobody) == "nginx"


def test_the_metrics_port_is_the_files_and_off_by_default(
    tmp_path: Path, place: ServerFolder
) -> None:
    assert place.settings.metrics_port == 1
    without = ServerFolder.create(tmp_path / "other", ServerSettings(host="fl.example.org"))
    assert without.settings.metrics_port is None
    assert "metrics" not in (without.folder / "server.toml").read_text()
    text = (without.folder / "server.toml").read_text()
    for ports in (
        "metrics_port = 8443",
        "metrics_port = 8000",
        "metrics_port = 0",
        'metrics_port = "x"',
    ):
        (without.folder / "server.toml").write_text(text + ports + "\n")
        with pytest.raises(ContractError, match="port"):
            assert without.settings


def test_nginx_has_no_way_to_the_metrics(tmp_path: Path) -> None:
    place = ServerFolder.create(
        tmp_path / "s", ServerSettings(host="fl.example.org", metrics_port=59465)
    )
    text = (place.folder / "nginx.conf").read_text()
    assert "59465" not in text
    assert "metrics" not in text
    assert text.count("proxy_pass ") == 1
