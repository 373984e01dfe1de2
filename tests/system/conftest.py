"""Real processes: a SuperLink with TLS and node keys, and what is started beside it."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


class Federation:
    """A folder with a CA, a SuperLink once `start_superlink` has run, and started processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, BIN
        self.address = f"127.0.0.1:{self.free_port()}"
        self.ca = folder / "ca.crt"
        self.env = os.environ | {
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self._sockets: dict[str, Path] = {}

    def start(
        self, *command: str | Path, log: str, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; what it says goes to the folder's file `log`."""
        with (self.folder / log).open("wb") as file:
            self._started.append(
                subprocess.Popen(
                    [str(word) for word in command],
                    env=env or self.env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        return self._started[-1]

    def end(self) -> None:
        """End every started process and its session, politely and then not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._started:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue
            for process in self._started:
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    continue

    def wait_for(
        self, condition: Callable[[], object], seconds: float, what: str, log: str
    ) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                said = (self.folder / log).read_text(errors="replace")[-3000:]
                pytest.fail(f"{what} did not happen in {seconds} s:\n{said}")
            time.sleep(0.1)

    @staticmethod
    def free_port() -> int:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return int(s.getsockname()[1])

    def listening(self) -> bool:
        host, port = self.address.split(":")
        with socket.socket() as s:
            return s.connect_ex((host, int(port))) == 0

    def make_certificate(self) -> None:
        """A CA and a server certificate for 127.0.0.1, by openssl."""

        def openssl(*args: str) -> None:
            subprocess.run(["openssl", *args], cwd=self.folder, check=True, capture_output=True)

        new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl(
            "req",
            "-x509",
            *new,
            "-keyout",
            "ca.key",
            "-out",
            "ca.crt",
            "-days",
            "2",
            "-subj",
            "/CN=test CA",
        )
        openssl(
            "req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=127.0.0.1"
        )
        (self.folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
        openssl(
            "x509",
            "-req",
            "-in",
            "server.csr",
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-out",
            "server.pem",
            "-days",
            "2",
            "-extfile",
            "ext",
        )

    def start_superlink(self) -> None:
        self.make_certificate()
        (self.folder / "flwr").mkdir()
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink.tls]\naddress = "{self.address}"\nroot-certificates = "{self.ca}"\n'
        )
        self.start(
            BIN / "flower-superlink",
            "--ssl-ca-certfile",
            self.ca,
            "--ssl-certfile",
            self.folder / "server.pem",
            "--ssl-keyfile",
            self.folder / "server.key",
            "--enable-supernode-auth",
            "--database",
            self.folder / "state.db",
            "--port",
            self.address.split(":")[1],
            "--disable-runtime-dependency-installation",
            log="superlink.log",
        )
        self.wait_for(self.listening, 60, "the SuperLink listening", "superlink.log")

    def flwr(self, *args: str | Path) -> str:
        done = subprocess.run(
            [BIN / "flwr", *map(str, args)],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_site(
        self, name: str, contract: Path, data: Path, *more: str | Path, model: Path | None = None
    ) -> list[subprocess.Popen[bytes]]:
        """Register a node, start its worker (seeded_worker.py) and its SuperNode beside it."""
        key, path = self.folder / f"{name}.key", data.parent / "worker.sock"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", key],
            check=True,
        )
        self.register(key.with_suffix(".key.pub"), name)
        worker = self.start(
            sys.executable,
            Path(__file__).with_name("seeded_worker.py"),
            name,
            "--contract",
            contract,
            "--data",
            data,
            "--socket",
            path,
            *(("--model", model) if model else ()),
            *more,
            log=f"{name}-worker.log",
        )
        node = self.start(
            BIN / "flower-supernode",
            "--root-certificates",
            self.ca,
            "--superlink",
            self.address,
            "--auth-supernode-private-key",
            key,
            "--port",
            str(self.free_port()),
            "--node-config",
            f'site="{name}" socket="{path}"',
            log=f"{name}-node.log",
        )
        self._sockets[name] = path
        return [worker, node]

    def wait_until_ready(self, name: str) -> Path:
        """Wait for the worker's socket; returns it."""
        path = self._sockets[name]
        self.wait_for(path.exists, 120, f"the worker of {name} being ready", f"{name}-worker.log")
        return path

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """SIGKILL, for it and all it started."""
        os.killpg(process.pid, signal.SIGKILL)

    def register(self, public_key: Path, name: str) -> None:
        self.flwr("supernode", "register", public_key, "tls", "--name", name)


@pytest.fixture(autouse=True)
def _one_at_a_time() -> Iterator[None]:
    """Across all test runs on this machine: sites of different tests share the two users, and a
    site that ends takes all of its relay's processes with it."""
    with (Path(tempfile.gettempdir()) / "silotune-system-tests.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def make_federation() -> type[Federation]:
    return Federation


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """A running SuperLink; whatever is started beside it ends with the test."""
    found = Federation(tmp_path)
    try:
        found.start_superlink()
        yield found
    finally:
        found.end()
