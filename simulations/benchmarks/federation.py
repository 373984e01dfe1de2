"""A federation of real processes on this machine, for benchmarks.

Flower's SuperLink with TLS and node keys; for each site the folder that `silotune site init` makes,
a worker (warm_worker.py) and a SuperNode.
"""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from silotune.common.contract.contract import Contract
from silotune.common.errors import PeerError
from silotune.common.model_files import model_folder
from silotune.common.protocol import join_request
from silotune.server.operations import service
from silotune.server.operations.server_folder import ServerFolder, ServerSettings
from silotune.simulations.datasets import catalog

PATIENCE = 180.0  # seconds for a round, or for a process to be ready
RANK, ALPHA, TOKENS = 8, 16, 32
ENCODER_TARGETS = "query", "attention.output.dense"
TEXTS = (
    "The crew was friendly.",
    "My bag is lost again.",
    "Thank you for the upgrade!",
    "Two hours on hold, no answer.",
    "Best flight in years.",
    "The gate agent was rude.",
    "Boarding went smoothly.",
    "They cancelled my ticket.",
)


@dataclass(frozen=True)
class Case:
    """A base model, in how many layers of it LoRA adapts what (by the model's own names), and the
    sites; three of them mask."""

    label: str
    source: str
    layers: int
    targets: tuple[str, ...] = ENCODER_TARGETS
    sites: tuple[str, ...] = ("north", "south")

    @property
    def masked(self) -> bool:
        return len(self.sites) > 2


class Federation:
    """The processes of one case; files and logs lie in `folder`. A run under its contract has so
    many rounds."""

    def __init__(self, folder: Path, case: Case, rounds: int) -> None:
        self.folder, self.case, self.model = folder, case, catalog.fetch(case.source)
        self.place = ServerFolder.create(
            folder / "server", ServerSettings(host="127.0.0.1", link_port=free_port())
        )
        keys = {site: self._init(site) for site in case.sites}
        self.contract = folder / "contract.json"
        contract = contract_of(case, self.model, keys, rounds)
        self.contract.write_text(contract.model_dump_json())
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def _init(self, name: str) -> str:
        """A site's folder, admitted by the server; its public key."""
        site = self.folder / name
        subprocess.run(
            [service.BIN / "silotune", "site", "init", "--name", name, "--folder", site],
            check=True,
            capture_output=True,
        )
        request = join_request.load(site / f"{name}.request.json")
        self.place.admit(request, request.fingerprint)
        with (site / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [(text, at % 2) for at, text in enumerate(TEXTS)]
            csv.writer(file).writerows([("text", "label"), *rows])
        return request.public_key

    def start(self) -> None:
        server, link = self.place.folder, self.place.link
        self._start(
            "superlink",
            service.BIN / "flower-superlink",
            "--ssl-ca-certfile",
            server / "ca.crt",
            "--ssl-certfile",
            server / "server.crt",
            "--ssl-keyfile",
            server / "server.key",
            "--enable-supernode-auth",
            "--database",
            server / "state.db",
            "--host",
            "127.0.0.1",
            "--port",
            link.split(":")[1],
            "--disable-runtime-dependency-installation",
        )
        self.wait("registering the nodes", self._registered)
        for name in self.case.sites:
            site = self.folder / name
            self._start(
                f"{name}-worker",
                sys.executable,
                Path(__file__).with_name("warm_worker.py"),
                site,
                name,
                self.contract,
                self.model,
            )
            files = {"socket": "socket/worker.sock", "data": "rows.csv", "seconds": "seconds"}
            self._start(
                f"{name}-node",
                service.BIN / "flower-supernode",
                "--superlink",
                link,
                "--root-certificates",
                server / "ca.crt",
                "--auth-supernode-private-key",
                site / "relay" / "node.key",
                "--port",
                str(free_port()),
                "--node-config",
                " ".join(f'{key}="{site / file}"' for key, file in files.items()),
            )
        for name in self.case.sites:
            self.wait(f"{name}'s worker", (self.folder / name / "socket" / "worker.sock").exists)

    def run(self, app: Path) -> None:
        """Submit a Flower app."""
        service.flwr(self.place, "run", app, "silotune")

    def wait(self, what: str, done: Callable[[], bool]) -> None:
        """RuntimeError, with all logs printed, when it takes too long or a process has ended."""
        end = time.monotonic() + PATIENCE
        while not done():
            ended = [name for name, process in self._started.items() if process.poll() is not None]
            if ended or time.monotonic() > end:
                logs = [*self.folder.glob("*.log"), *self.folder.glob("runs/*/events.jsonl")]
                for log in sorted(logs):
                    print(f"--- {log}", log.read_text(errors="replace")[-3000:], sep="\n")
                raise RuntimeError(f"{what} did not come; ended: {ended}; the logs stand above")
            time.sleep(0.05)

    def trained(self, site: str) -> list[float]:
        """Seconds of each training at a site so far."""
        file = self.folder / site / "seconds"
        return [float(line) for line in file.read_text().split()] if file.exists() else []

    def cpu(self) -> float:
        """CPU seconds so far of the sites' processes, with those that have ended."""
        sessions = {p.pid for name, p in self._started.items() if name != "superlink"}
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                found = path.read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(found[3]) in sessions:
                ticks += sum(map(int, found[11:15]))  # its own, and those of children it waited for
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """End all processes and what they started: politely, then not."""
        for number, seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
            for process in self._started.values():
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue
            for process in self._started.values():
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    continue

    def _start(self, name: str, *command: str | Path) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._started[name] = subprocess.Popen(
                [str(word) for word in command],
                env=service.environment(self.place),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _registered(self) -> bool:
        try:
            service.register(self.place)
        except PeerError:
            return False  # the SuperLink is still starting
        return True


@contextmanager
def federation(case: Case, rounds: int) -> Iterator[Federation]:
    """A running federation; nothing of it is left behind."""
    with tempfile.TemporaryDirectory(prefix="rounds-") as name:
        found = Federation(Path(name), case, rounds)
        try:
            found.start()
            yield found
        finally:
            found.end()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def contract_of(case: Case, model: Path, keys: dict[str, str], rounds: int) -> Contract:
    """One step a round over all records, without privacy. model: its folder; keys: by site."""
    sha256 = model_folder.manifest(model).sha256
    labels = [{"name": name, "values": [str(at)]} for at, name in enumerate(("good", "bad"))]
    return Contract.model_validate(
        {
            "format": 1,
            "name": "rounds",
            "quorum": len(keys),
            "deadline_seconds": PATIENCE,
            "task": {"label_column": "label", "labels": labels},
            "input": {"kind": "text", "column": "text"},
            "model": {
                "kind": "encoder",
                "name": case.source,
                "sha256": sha256,
                "max_tokens": TOKENS,
            },
            "adapter": {
                "rank": RANK,
                "alpha": float(ALPHA),
                "layers": case.layers,
                "targets": case.targets,
            },
            "privacy": {"mode": "none", "expected_units": float(len(TEXTS))},
            "phases": [
                {
                    "trains": "head+adapter",
                    "rounds": rounds,
                    "sampling_rate": 1.0,
                    "head_lr": 1e-3,
                    "adapter_lr": 1e-3,
                }
            ],
            "secure_aggregation": {} if case.masked else None,
            "sites": [{"name": name, "public_key": key} for name, key in keys.items()],
        }
    )
