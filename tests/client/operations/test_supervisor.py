"""What `site start` says and serves, with a worker and a relay that are scripts of this test."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from silotune.client.operations import supervisor, telemetry
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import Server
from silotune.common.errors import UsageError
from silotune.common.runtime.journal import Journal
from silotune.server.operations import certificate_authority

# The supervisor adopts orphans and ends every descendant: it needs a process of its own.
SUPERVISOR = """
import sys
from pathlib import Path
from silotune.client.operations import supervisor
from silotune.client.site.policy import Server
from silotune.client.site.folder import SiteFolder
from silotune.common.runtime.journal import Journal
folder, port, as_json = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "json"
supervisor.BIN = folder / "bin"
sys.exit(supervisor.Supervisor(
    SiteFolder(folder / "site.toml"), folder / "contract.toml",
    Server(address="127.0.0.1:1", ca=folder / "ca.crt"), supervisor.Users(),
    Journal("supervisor", as_json=as_json), port or None, ["DATABASE_PASSWORD"],
).run())
"""
WORKER = """
import os, signal, sys
from pathlib import Path
from silotune.client.operations.telemetry import FILE, Answered, Tally
from silotune.common.runtime.journal import Journal
said = sys.argv
if said[2] == "admission":
    sys.exit(print("what the server \x1bsays"))
folder = Path(said[said.index("--config") + 1]).parent
journal = Journal("worker", as_json="--log-json" in said)
tally = Tally(folder / "state" / FILE)
tally.ready()
answered = Answered("train", "ok", 0.5, "r", 1, 1, 0.25)
tally.note(answered)
print("a warning of some library", flush=True)
(folder / "worker-has").write_text(" ".join(os.environ))
journal.emit(answered.text, "answered", answered.facts)
os.write(int(said[said.index("--ready-fd") + 1]), b"1")
signal.pause()
"""
RELAY = """
import os, pathlib, signal
pathlib.Path("{forged}").with_name("relay-has").write_text(" ".join(os.environ))
print(open("{forged}").read(), flush=True)
signal.pause()
"""


class Started:
    """A supervisor with its two scripts, and what it has said."""

    def __init__(self, folder: Path, port: int, how: str) -> None:
        self.folder, self.log = folder, folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, str(folder), str(port), how],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"DATABASE_PASSWORD": "secret", "ANOTHER": "one"},
            )

    def wait_for(self, word: str) -> None:
        end = time.monotonic() + 60
        while word not in self.log.read_text():
            assert time.monotonic() < end, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def forged() -> str:
    """A line as a worker would say it, that no worker has said."""
    lines: list[str] = []
    journal = Journal("worker", as_json=True, write=lines.append)
    journal.emit("forged by the relay", "answered", {"kind": "train", "code": "ok", "round": 7})
    return lines[0]


@pytest.fixture
def start(tmp_path: Path, forged: str) -> Iterator[Callable[..., Started]]:
    made: list[Started] = []
    (tmp_path / "bin").mkdir()
    (tmp_path / "relay").mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "forged").write_text(forged)
    (tmp_path / "relay" / "node.key").write_text("no key")
    (tmp_path / "ca.crt").write_bytes(certificate_authority.make_ca("test")[0].certificate)
    for name, text in (
        ("silotune", WORKER),
        ("flower-supernode", RELAY.format(forged=tmp_path / "forged")),
    ):
        script = tmp_path / "bin" / name
        script.write_text(f"#!{sys.executable}\n{text}")
        script.chmod(0o755)

    def call(port: int = 0, how: str = "json") -> Started:
        made.append(Started(tmp_path, port, how))
        return made[-1]

    yield call
    for started in made:
        if started.process.poll() is None:
            started.end()


def events(started: Started) -> list[dict[str, Any]]:
    return [json.loads(line) for line in started.log.read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_every_line_is_an_object_and_a_relay_cannot_speak_as_the_worker(
    start: Callable[..., Started], forged: str
) -> None:
    started = start()
    started.wait_for("forged by the relay")
    assert started.end() == 0
    found = events(started)
    answered = [e for e in found if e["event"] == "answered"]
    assert [(e["from"], e["round"], e["seconds"]) for e in answered] == [("worker", 1, 0.5)]
    assert [e["text"] for e in found if e["from"] == "relay"] == [forged]
    assert {e["event"] for e in found if e["from"] == "relay"} == {"output"}
    assert ("worker", "output", "a warning of some library") in {
        (e["from"], e["event"], e["text"]) for e in found
    }
    assert [e["event"] for e in found if e["from"] == "supervisor"] == [
        "ready",
        "connecting",
        "stopped",
    ]


def test_people_see_who_said_what(start: Callable[..., Started], forged: str) -> None:
    started = start(how="text")
    started.wait_for("forged by the relay")
    assert started.end() == 0
    said = started.log.read_text().splitlines()
    assert "worker: train r round 1: ok, 0.5 s" in said
    assert f"relay: {forged}" in said
    assert "stopped" in said


def test_metrics_and_health_of_a_running_site(start: Callable[..., Started]) -> None:
    port = free_port()
    started = start(port)
    started.wait_for("forged by the relay")
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{url}/healthz").text == "ok\n"
        text = client.get(f"{url}/metrics").text
        assert 'silotune_site_requests_total{code="ok",kind="train"} 1.0' in text
        assert 'silotune_site_run_epsilon{run="r"} 0.25' in text
        assert "silotune_site_relay_up 1.0" in text
        # What the worker's user puts in the file's place root does not read out.
        file = started.folder / "state" / telemetry.FILE
        file.unlink()
        file.symlink_to("/etc/passwd")
        reply = client.get(f"{url}/healthz")
        assert (reply.status_code, reply.text) == (503, "worker\n")
        text = client.get(f"{url}/metrics").text
        assert "silotune_site_worker_up 1.0" in text
        assert "root" not in text
        assert "requests" not in text
    assert started.end() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz", trust_env=False)


def test_a_relay_that_ends_is_counted(start: Callable[..., Started]) -> None:
    port = free_port()
    started = start(port)
    started.wait_for("forged by the relay")
    for pid in processes(started):
        os.kill(pid, signal.SIGKILL)
    started.wait_for("restarting")
    (again,) = [e["text"] for e in events(started) if e["event"] == "restarting"]
    assert again == "the relay ended with -9; again in 1 s (what the server says)"
    end = time.monotonic() + 60
    url = f"http://127.0.0.1:{port}/metrics"
    while "relay_restarts_total 1.0" not in httpx.get(url, trust_env=False).text:
        assert time.monotonic() < end
    assert started.end() == 0


def test_a_port_in_use_stops_it_before_anything_starts(start: Callable[..., Started]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        started = start(int(taken.getsockname()[1]))
        assert started.process.wait(60) != 0
    assert "Address already in use" in started.log.read_text()
    assert not (started.folder / "state" / "metrics").exists()


def processes(started: Started, name: str = "flower-supernode") -> list[int]:
    """Those of the site that run its script of that name."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_text()
        except OSError:
            continue
        if str(started.folder / "bin" / name) in line and entry.name.isdigit():
            found.append(int(entry.name))
    return found


def test_a_second_start_on_a_folder_is_refused_and_leaves_the_first_alone(
    start: Callable[..., Started],
) -> None:
    first = start(how="text")
    first.wait_for("forged by the relay")
    before = processes(first)
    assert len(before) == 1
    first.log.rename(first.log.with_name("first.log"))  # each start writes a log of that name
    second = start(how="text")
    assert second.process.wait(60) != 0
    assert "Another `silotune site start` runs on" in second.log.read_text()
    assert processes(first) == before
    first.process.kill()  # the lock ends with the process, however it ends
    first.process.wait(60)
    for pid in [*before, *processes(first, "silotune")]:
        os.kill(pid, signal.SIGKILL)
    third = start(how="text")
    third.wait_for("forged by the relay")
    assert third.end() == 0


def test_two_sites_cannot_have_one_relay_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes of that user end with the first site that ends."""
    monkeypatch.setattr(supervisor, "OF_ROOT", tmp_path)

    def made(name: str, relay: int | None) -> supervisor.Supervisor:
        (tmp_path / name).mkdir(exist_ok=True)
        return supervisor.Supervisor(
            SiteFolder(tmp_path / name / "site.toml"),
            tmp_path / "contract.toml",
            Server(address="127.0.0.1:1", ca=tmp_path / "ca.crt"),
            supervisor.Users(None if relay is None else 61001, relay),
            Journal("supervisor"),
        )

    with made("north", 61002)._alone():
        for name, relay in (("south", 61002), ("north", 61003), ("north", 61002), ("north", None)):
            with pytest.raises(UsageError) as refusal:
                made(name, relay).run()
            assert refusal.value.code == "E104"
        for relay in (61003, None):
            with made("south", relay)._alone():
                pass
    with made("south", 61002)._alone():
        pass


def test_a_databases_password_is_the_workers_alone(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    started = start()
    started.wait_for("forged by the relay")
    assert started.end() == 0
    worker, relay = ((tmp_path / f"{who}-has").read_text().split() for who in ("worker", "relay"))
    assert "DATABASE_PASSWORD" in worker
    assert "DATABASE_PASSWORD" not in relay
    assert "ANOTHER" not in [*worker, *relay]


def test_a_program_that_the_user_may_not_run_is_one_sentence(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    (tmp_path / "bin" / "silotune").chmod(0o644)
    started = start()
    assert started.process.wait(60) == 1
    assert started.log.read_text().splitlines()[-1] == (
        f"silotune.common.errors.UsageError: User {os.geteuid()} may not run "
        f"{tmp_path}/bin/silotune or its Python ({sys.base_prefix}). Install Silotune where that "
        "user can run it, for example in /opt/silotune."
    )
