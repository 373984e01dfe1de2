"""The same ServerApp, relay and worker over a real SuperLink: TLS, node keys, two SuperNodes.

Two hospitals, two rounds, noise off: the adapter must equal the one the in-process path gives.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from silotune.client.ledger import Ledger
from silotune.client.policy import permitting
from silotune.client.worker import Worker
from silotune.common.contract import Contract
from silotune.common.model import build
from silotune.server.fab import write_app
from silotune.server.registry import Registry
from silotune.server.rounds import Run

BIN = Path(sys.executable).parent
SITES = ("north", "south")
SEED = 7

# A worker with a seed, which no command line can start: Poisson samples must repeat in this test.
WORKER = f"""
import sys, torch
from pathlib import Path
from silotune.client.ledger import Ledger
from silotune.client.policy import permitting
from silotune.client.wire import listen, serve
from silotune.client.worker import Worker
from silotune.common.contract import load
torch.set_num_threads(1)
file, name, data, model, path = sys.argv[1:]
contract = load(Path(file))
policy = permitting(contract, name, Path(data), Path(model))
worker = Worker(policy, contract, Ledger.in_memory(name), insecure_seed={SEED})
serve(worker.handle, listen(Path(path)))
"""


@contextmanager
def processes() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start processes in sessions of their own and end each of them, also when a test fails."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str | Path, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            started.append(
                subprocess.Popen(
                    [str(c) for c in command], env=env, stdout=file, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return started[-1]

    try:
        yield start
    finally:
        for sig in (signal.SIGTERM, signal.SIGKILL):
            for process in started:
                try:
                    os.killpg(process.pid, sig)
                except ProcessLookupError:
                    continue
            for process in started:
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    continue


def wait_for(condition: Callable[[], bool], seconds: float, what: str, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen in {seconds} s:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def make_certificate(folder: Path) -> None:
    """A CA and a server certificate for 127.0.0.1, by openssl."""
    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test CA")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=127.0.0.1")
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", "server.pem", "-days", "2", "-extfile", "ext")


def in_process(contract: Contract, files: dict[str, Path], model: Path, folder: Path) -> Run:
    workers = [
        Worker(
            permitting(contract, s, files[s], model), contract, Ledger.in_memory(s),
            insecure_seed=SEED,
        )
        for s in SITES
    ]
    run = Run(
        contract, Registry.create(folder, contract), "reference",
        build(contract, model).initial_arrays(),
    )
    while not run.done:
        run.begin()
        for worker in workers:
            wire = run.request(worker.policy.name)
            run.accept(worker.policy.name, len(wire), worker.handle(wire))
        run.finish()
    return run


@pytest.mark.system
@pytest.mark.xdist_group("system")
def test_two_supernodes_give_the_adapter_of_the_in_process_path(
    lora_contract: Contract, encoder_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    contract = lora_contract.changed(privacy={"mode": "none"})
    files = {s: write_rows(tmp_path / s / "rows.csv", 40, seed=i) for i, s in enumerate(SITES)}
    contract_file = tmp_path / "contract.json"
    contract_file.write_text(contract.model_dump_json())
    reference = in_process(contract, files, encoder_folder, tmp_path / "reference")

    port = free_port()
    make_certificate(tmp_path)
    env = os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink.tls]\naddress = "127.0.0.1:{port}"\nroot-certificates = '
        f'"{tmp_path / "ca.crt"}"\n'
    )

    def flwr(*args: str | Path) -> str:
        done = subprocess.run(
            [BIN / "flwr", *map(str, args)], env=env, cwd=tmp_path, capture_output=True,
            text=True, timeout=120, check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with processes() as start:
        log = tmp_path / "superlink.log"
        start(
            BIN / "flower-superlink", "--ssl-ca-certfile", tmp_path / "ca.crt",
            "--ssl-certfile", tmp_path / "server.pem", "--ssl-keyfile", tmp_path / "server.key",
            "--enable-supernode-auth", "--database", tmp_path / "state.db", "--port", str(port),
            "--disable-runtime-dependency-installation", env=env, log=log,
        )
        wait_for(lambda: listening(port), 60, "the SuperLink listening", log)
        for site in SITES:
            key = tmp_path / f"{site}.key"
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", key],
                check=True,
            )
            flwr("supernode", "register", f"{key}.pub", "tls", "--name", site)
            path = tmp_path / site / "worker.sock"
            log = tmp_path / f"{site}-worker.log"
            start(
                sys.executable, "-c", WORKER, contract_file, site, files[site], encoder_folder,
                path, env=env, log=log,
            )
            wait_for(path.exists, 120, f"the worker of {site} being ready", log)
            assert path.stat().st_mode & 0o077 == 0
            start(
                BIN / "flower-supernode", "--root-certificates", tmp_path / "ca.crt",
                "--superlink", f"127.0.0.1:{port}", "--auth-supernode-private-key", key,
                "--port", str(free_port()), "--node-config",
                f'site="{site}" socket="{path}"', env=env, log=tmp_path / f"{site}-node.log",
            )
        app = write_app(
            tmp_path / "app", contract=contract_file, model=encoder_folder, run="deployed",
            runs=tmp_path / "runs",
        )
        flwr("run", app, "tls")
        done = tmp_path / "runs" / "deployed" / "adapter.safetensors"
        wait_for(done.exists, 180, "the run's adapter", tmp_path / "superlink.log")

    found = Registry(tmp_path / "runs" / "deployed").adapter()
    assert found.keys() == reference.registry.adapter().keys()
    for name, array in reference.registry.adapter().items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    # It trained: a run that does nothing would also agree with itself.
    start_arrays = build(contract, encoder_folder).initial_arrays()
    assert any((found[n] != start_arrays[n]).any() for n in found if n.endswith("lora_B"))
    events = (tmp_path / "runs" / "deployed" / "events.jsonl").read_text()
    assert len(re.findall('"committed"', events)) == contract.rounds
    assert "rejected" not in events
