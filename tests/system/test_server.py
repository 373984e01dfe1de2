"""A server by the command line: init, requests, fingerprints, a real nginx before a real SuperLink.

Runs are in test_tutorial.py and test_faults.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography import x509

BIN = Path(sys.executable).parent
SITES = ("north", "south", "east")


class Operator:
    """The server's folder and the sites', and the processes started on them."""

    def __init__(self, folder: Path, ports: tuple[int, int]) -> None:
        self.folder, (self.port, self.link) = folder, ports
        self.ca = folder / "server" / "ca.crt"
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def silotune(self, *words: str | Path, ok: bool = True) -> str:
        done = subprocess.run(
            [BIN / "silotune", *map(str, words)],
            cwd=self.folder,
            env=self.env,
            timeout=300,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name: str, *words: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.started[name] = subprocess.Popen(
                [str(BIN / "silotune"), *map(str, words)],
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.started[name]

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not condition():
            said = "\n".join(f"--- {n}\n{self.said(n)[-1500:]}" for n in self.started)
            assert time.monotonic() < end, f"{what} did not happen:\n{said}"
            time.sleep(0.1)

    def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.started.values():
                children = []
                if process.poll() is None:
                    children = psutil.Process(process.pid).children(recursive=True)
                    process.send_signal(number)
                    try:
                        process.wait(30)
                    except subprocess.TimeoutExpired:
                        continue
                for child in children:
                    if child.is_running():
                        child.kill()


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(two.getsockname()[1])


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    found = Operator(tmp_path, free_ports())
    try:
        yield found
    finally:
        found.end()


def enrol(operator: Operator, site: str) -> None:
    """Make a site, compare what it reads out, add it."""
    made = json.loads(operator.silotune("site", "init", "--name", site, "--folder", site, "--json"))
    request = json.loads((operator.folder / made["request"]).read_text())
    assert set(request) == {"format", "site", "public_key", "node_key"}
    wrong = ("11" if made["fingerprint"].startswith("00") else "00") + made["fingerprint"][2:]
    said = operator.silotune(
        "server", "add", made["request"], "--fingerprint", wrong, "--folder", "server", ok=False
    )
    assert "do not add it; phone the site" in said
    assert not list((operator.folder / "server" / "roster").iterdir()) or site not in said
    operator.silotune(
        "server",
        "add",
        made["request"],
        "--fingerprint",
        made["fingerprint"].lower(),
        "--folder",
        "server",
    )


@pytest.mark.system
def test_a_server_and_what_it_lets_through(operator: Operator) -> None:
    folder = operator.folder
    said = operator.silotune(
        "server",
        "init",
        "--host",
        "127.0.0.1",
        "--port",
        str(operator.port),
        "--link-port",
        str(operator.link),
        "--folder",
        "server",
    )
    assert re.search(r"CA fingerprint  ([0-9A-F]{2}:){31}[0-9A-F]{2}", said)
    assert all(f.stat().st_mode & 0o077 == 0 for f in (folder / "server").rglob("*"))
    for site in SITES:
        enrol(operator, site)

    operator.start("server", "server", "start", "--folder", "server")
    operator.wait_for(lambda: "sites can connect" in operator.said("server"), "the server's start")
    _the_closed_paths_are_closed(operator)
    operator.started["server"].send_signal(signal.SIGTERM)
    assert operator.started["server"].wait(60) == 0


def _the_closed_paths_are_closed(operator: Operator) -> None:
    """Nobody outside the operator's host submits code or registers nodes."""
    trusted = ssl.create_default_context(cafile=str(operator.ca))
    base = f"https://127.0.0.1:{operator.port}"
    direct = f"https://127.0.0.1:{operator.link}"
    control = ("start-run", "list-runs", "register-node", "stream-logs", "stop-run")
    with httpx.Client(verify=trusted) as client:
        assert client.get(f"{base}/health").text == "ok\n"
        revoked = x509.load_der_x509_crl(client.get(f"{base}/ca.crl").content)
        ca = x509.load_pem_x509_certificate(operator.ca.read_bytes())
        assert revoked.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
        assert list(revoked) == []
        for path in (
            *(f"/v1/control/{name}" for name in control),
            "/v1/runtime/get-run",
            "/v1/runtime",
            "/v1/fleet/register-node",
            "/v1/fleet/unregister-node",
            "/v1/fleet",
            "/v1/fleet/",
            "/",
            "/docs",
            "/openapi.json",
            "/v1/fleet/pull-messages/../../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            "/v1/fleet/pull-messages%2f..%2f..%2fcontrol",
            "//v1/control/start-run",
            "/V1/CONTROL/start-run",
            "/v1/fleet/pull-messages/",
            "/v1/fleet/pull-messages;/../control/start-run",
            "/v1/control/start-run?/v1/fleet/",
        ):
            for method in ("GET", "POST", "PUT", "CONNECT", "OPTIONS"):
                reply = client.request(method, httpx.URL(base).copy_with(raw_path=path.encode()))
                assert reply.status_code in (400, 404, 405), (method, path, reply.status_code)
        assert client.get(f"{base}/v1/fleet/pull-messages").status_code == 405
        # Without a node's signature the open paths give nothing either.
        assert client.post(f"{base}/v1/fleet/pull-messages").status_code >= 400
        # What was asked above does exist: on the operator's own host it is answered.
        assert client.post(f"{direct}/v1/control/list-runs").status_code != 404
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{base}/health")  # the CA is the operator's own
    old = ssl.create_default_context(cafile=str(operator.ca))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", operator.port)) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(plain, server_hostname="127.0.0.1")
    listening = {
        c.laddr.ip
        for c in psutil.net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == operator.link
    }
    assert listening == {"127.0.0.1"}
