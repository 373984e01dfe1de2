"""A whole federation of real processes, kept running as systemd would, for tests that break it.

The server is `silotune server start` (nginx and SuperLink), a site a worker (faulty_worker.py: the
real command, which stops where it is told to) and Flower's SuperNode, as the units in client/deploy
run them. What ends is started again, later each time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.models.factory import build
from silotune.common.protocol.messages import Arrays
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
START_SECONDS = 150.0
MARK = "SILOTUNE_TEST_SERVICE"  # in the environment of all that a service starts
COMMAND = list[str | Path]


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> Any:
    """What the condition gives once it is true; TimeoutError if it never is."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen in {seconds:.0f} s")
        time.sleep(0.05)
    return found


@dataclass
class Service:
    """One process that is kept running; `command` is made anew for each start."""

    name: str
    command: Callable[[], COMMAND]
    log: Path
    env: dict[str, str]
    kept: bool = True
    process: subprocess.Popen[bytes] | None = None
    pause: float = 1.0
    began: float = field(default_factory=time.monotonic)
    prefix: COMMAND = field(default_factory=list)

    def start(self) -> None:
        self.end(signal.SIGKILL)  # systemd ends what is left of a service before it starts it
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(word) for word in (*self.prefix, *self.command())],
                env=self.env | {MARK: self.name},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.kept, self.began = True, time.monotonic()

    def keep(self) -> None:
        """Start it again if it ended a while ago."""
        if self.kept and self.process is not None and self.process.poll() is not None:
            lasted = time.monotonic() - self.began
            if lasted > 60:
                self.pause = 1.0
            if lasted > self.pause:
                self.pause = min(2 * self.pause, 15.0)
                self.start()

    def tree(self, word: str = "") -> list[psutil.Process]:
        """All live processes that it has started, with `word` in their command line."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.name and word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self, number: int) -> None:
        if self.process is None:
            return
        self.kept = False
        for process in self.tree():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Member:
    """A site: its folder, the contract that it permits, its worker and its SuperNode."""

    def __init__(self, deployment: Deployment, name: str, seed: int) -> None:
        self.deployment, self.name = deployment, name
        self.folder = deployment.folder / name
        self.config, self.faults = self.folder / "site.toml", self.folder / "faults"
        self.socket = self.folder / "run" / "worker.sock"
        made = json.loads(
            deployment.silotune("site", "init", "--name", name, "--folder", self.folder, "--json")
        )
        deployment.silotune(
            "server",
            "add",
            made["request"],
            "--fingerprint",
            made["fingerprint"],
            "--folder",
            deployment.server,
        )
        self.public_key = str(made["public_key"])
        self.faults.mkdir()
        write_rows(self.folder / "records.csv", seed)
        env = deployment.env | {"SILOTUNE_TEST_FAULTS": str(self.faults)}
        self.worker = Service(
            f"{self.folder}-worker",
            lambda: [
                sys.executable,
                HERE / "faulty_worker.py",
                "site",
                "worker",
                deployment.contract,
                "--config",
                self.config,
                "--socket",
                self.socket,
            ],
            deployment.folder / f"{name}-worker.log",
            env,
        )
        self.node = Service(
            f"{self.folder}-node",
            lambda: [
                BIN / "flower-supernode",
                "--root-certificates",
                self.ca,
                "--superlink",
                deployment.address,
                "--auth-supernode-private-key",
                self.key,
                "--port",
                str(free_ports(1)[0]),
                "--node-config",
                f'socket="{self.socket}"',
            ],
            deployment.folder / f"{name}-node.log",
            deployment.env | {"FLWR_HOME": str(self.folder / "flwr")},
        )
        self.ca, self.key = deployment.server / "ca.crt", self.folder / "relay" / "node.key"

    def permit(self, hashes: list[str], **settings: str) -> None:
        """Sign a policy for these contracts; settings replace lines of site.toml."""
        template = self.folder / "site.toml.first"
        if not template.exists():
            template.write_text(self.config.read_text())
        text = template.read_text()
        for line, other in {
            "contracts = []": f"contracts = {json.dumps(hashes)}",
            'duplicate_records = "refuse"': 'duplicate_records = "keep"',
            "min_records = 100": "min_records = 10",
            "allow_without_dp = false": "allow_without_dp = true",
            "min_quorum = 2": "min_quorum = 1",
            "epsilon = 8.0": "epsilon = 100.0",
            **settings,
        }.items():
            assert line in text, line
            text = text.replace(line, other, 1)
        (self.folder / "ca.crt").write_bytes((self.deployment.server / "ca.crt").read_bytes())
        self.config.write_text(
            f'{text}\n[server]\naddress = "{self.deployment.address}"\nca = "ca.crt"\n'
        )
        self.deployment.silotune("site", "sign", "--config", self.config)

    def start(self) -> None:
        self.worker.start()
        self.node.start()

    def ready(self) -> bool:
        process = self.worker.process
        return process is not None and process.poll() is None and self.socket.is_socket()

    def stop_at(self, point: str, number: int | str) -> None:
        """Where to stop next; what has stopped elsewhere goes on."""
        (self.faults / "there").unlink(missing_ok=True)
        order = self.faults / "pause"
        order.with_suffix(".new").write_text(f"{point} {number}")
        order.with_suffix(".new").rename(order)

    def stopped(self) -> bool:
        return (self.faults / "there").exists()

    def go_on(self) -> None:
        (self.faults / "pause").unlink(missing_ok=True)

    def computed(self) -> list[tuple[str, str, int, int]]:
        file = self.faults / "computed"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(c, r, int(n), int(a)) for c, r, n, a in map(str.split, lines)]

    def ledger(self) -> PrivacyLedger:
        return SiteFolder(self.config).open()[1]


class Deployment:
    """One server and its sites in a folder."""

    def __init__(
        self,
        folder: Path,
        sites: tuple[str, ...],
        *,
        host: str = "127.0.0.1",
        contract: Callable[[dict[str, str]], Contract],
    ) -> None:
        self.folder, self.server = folder, folder / "server"
        folder.mkdir(parents=True)
        self.port, self.link = free_ports(2)
        self.address = f"{host}:{self.port}"
        self.env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
        }
        self.silotune(
            "server",
            "init",
            "--host",
            host,
            "--port",
            str(self.port),
            "--link-port",
            str(self.link),
            "--folder",
            self.server,
        )
        self.members = {name: Member(self, name, at) for at, name in enumerate(sites)}
        self.contract = folder / "contract.json"
        self.make = lambda **more: contract(
            {m.name: m.public_key for m in self.members.values()}
        ).changed(**more)
        self.link_service = Service(
            f"{folder}-server",
            lambda: [BIN / "silotune", "server", "start", "--folder", self.server],
            folder / "server.log",
            self.env | {"PYTHONPATH": str(HERE / "hooks"), "SILOTUNE_TEST_SERVER": str(folder)},
        )
        self._ending = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self.current: Contract | None = None
        self.runs = 0

    # processes

    def silotune(self, *words: str | Path, ok: bool | None = True, seconds: float = 240) -> str:
        done = subprocess.run(
            [BIN / "silotune", *map(str, words)],
            cwd=self.folder,
            env=self.env,
            timeout=seconds,
            capture_output=True,
            text=True,
            check=False,
        )
        if ok is not None and (done.returncode == 0) != ok:
            raise AssertionError(
                f"silotune {' '.join(map(str, words))}: {done.returncode}\n"
                f"{done.stdout}{done.stderr}"
            )
        return done.stdout + done.stderr

    @property
    def services(self) -> list[Service]:
        own = [s for m in self.members.values() for s in (m.worker, m.node)]
        return [self.link_service, *own]

    def start(self) -> None:
        """All of it, under the contract without changes."""
        self.use()
        self.link_service.start()
        self._keeper.start()
        wait_for(self.connectable, "the server's start")
        for member in self.members.values():
            member.start()
        self.wait_until_ready()

    def use(self, **changes: Any) -> Contract:
        """Have all sites work under the contract with these changes."""
        found = self.make(**changes)
        if self.current is None or found.hash != self.current.hash:
            self.contract.write_text(found.model_dump_json())
            running = self.current is not None
            self.current = found
            for member in self.members.values():
                member.permit([found.hash])
                if running:
                    member.worker.end(signal.SIGTERM)
                    member.worker.start()
            if running:
                self.wait_until_ready()
        return found

    def connectable(self) -> bool:
        return self.listening(self.port) and self.listening(self.link)

    @staticmethod
    def listening(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def wait_until_ready(self) -> None:
        for member in self.members.values():
            wait_for(lambda m=member: m.ready() and _answers(m.socket), f"{member.name}'s worker")

    def _keep(self) -> None:
        while not self._ending.wait(0.2):
            for service in self.services:
                service.keep()

    def end(self) -> None:
        self._ending.set()
        for service in self.services:
            service.kept = False
        for number in (signal.SIGTERM, signal.SIGKILL):
            for service in reversed(self.services):
                service.end(number)

    # runs

    def begin(self, name: str = "", *more: str | Path) -> tuple[str, subprocess.Popen[str]]:
        """`silotune server run` in the background; its name and process."""
        self.runs += 1
        name = name or f"run-{self.runs}"
        return name, self._background("run", self.contract, "--run", name, *more)

    def resuming(self, name: str, *more: str | Path) -> subprocess.Popen[str]:
        return self._background("resume", name, *more)

    def _background(self, *words: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(w) for w in (BIN / "silotune", "server", *words, "--folder", self.server)],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )

    def finish(self, name: str, process: subprocess.Popen[str], seconds: float = 240) -> list[str]:
        """Wait for the run's end, resuming it as an operator would; the first sentence of each
        time it stopped. TimeoutError if it does not end."""
        end, why = time.monotonic() + seconds, list[str]()
        while True:
            try:
                process.wait(timeout=max(end - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise TimeoutError(f"{name} did not end: {why}") from None
            if process.returncode == 0:
                process.communicate()
                return why
            if time.monotonic() > end:
                raise TimeoutError(f"{name} did not end: {why}")
            lost = len(why) > 1 and all("does not open" in sentence for sentence in why[-2:])
            sentence, process = self.take_up(name, process, *(["--skip-round"] * lost))
            why.append(sentence + " (then without that round)" * lost)

    def take_up(
        self, name: str, ended: subprocess.Popen[str], *more: str
    ) -> tuple[str, subprocess.Popen[str]]:
        """Why a run stopped, and it again, as soon as the server is there."""
        said, _ = ended.communicate()
        told = [line for line in said.splitlines() if line.startswith("✗")]
        wait_for(self.connectable, "the server", 120)
        begun = (self.server / "runs" / name / "contract.json").exists()
        why = told[-1].removeprefix("✗ ") if told else said.strip()[-200:]
        if begun:
            return why, self.resuming(name, *more)
        return why, self._background("run", self.contract, "--run", name)

    def registry(self, name: str) -> RunStore:
        return RunStore(self.server / "runs" / name)

    def events(self, name: str) -> list[dict[str, Any]]:
        file = self.server / "runs" / name / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def reference(self, name: str) -> Arrays:
        """What this process makes of the sites that counted in each round, in the clear."""
        contract = contracts.load(self.server / "runs" / name / "contract.json")
        plain = contract.changed(
            secure_aggregation=None,
            sites=[{"name": s.name, "weight": s.weight} for s in contract.sites],
            quorum=1,
        )
        handles = {
            m.name: Worker(
                permissive_policy(plain, m.name, m.folder / "records.csv", None),
                plain,
                PrivacyLedger.in_memory(m.name),
            ).handle
            for m in self.members.values()
        }
        folder = self.folder / f"reference-{name}"
        run = FederatedRun(
            plain, RunStore.create(folder, plain), "r", build(plain, None).initial_arrays()
        )
        for facts in self.registry(name).rounds():
            drive_round(run.stages(facts["sites"]), handles) if facts["sites"] else run.skip()
        return run.registry.adapter()

    def problems_of(self, name: str, tolerance: float = 0.0) -> list[str]:
        """What is wrong with a run that ended: its adapter, or a site's ledger."""
        found = []
        expected = self.reference(name)
        for key, array in self.registry(name).adapter().items():
            off = float(np.abs(array - expected[key]).max())
            if off > tolerance:
                found.append(f"{key} is off by {off:.2g}")
        for member in self.members.values():
            ledger = member.ledger()
            charged = set(ledger.charges)
            lost = [key for key in member.computed() if key not in charged]
            if lost:
                found.append(f"{member.name} computed {lost} without a charge")
        return found

    def computed(self, name: str) -> Mapping[str, int]:
        return {
            m.name: sum(1 for _, run, *_ in m.computed() if run == name)
            for m in self.members.values()
        }


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def write_rows(path: Path, seed: int, n: int = 60) -> None:
    """Made-up rows of the tests' table contract (tests/conftest.py), for this user alone."""
    rng = np.random.default_rng(seed)
    lines = ["age,smoker,outcome"]
    for _ in range(n):
        age, smoker = int(rng.integers(20, 90)), bool(rng.integers(2))
        ill = rng.random() < 0.1 + 0.4 * (age >= 50) + 0.4 * smoker
        lines.append(f"{age},{'yes' if smoker else 'no'},{int(ill)}")
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
