"""The commands of docs/for/flower-users.md, run as printed: `flwr run` on the app of a recipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.common.contract import contract as contracts
from silotune.server.storage.run_store import RunStore
from tests.system.conftest import Federation

ROOT = Path(__file__).resolve().parents[2]
MARK = "SILOTUNE_TEST_FLOWER_APP"

pytestmark = [pytest.mark.system, pytest.mark.download]


def commands() -> str:
    page = (ROOT / "docs" / "for" / "flower-users.md").read_text(encoding="utf-8")
    block = re.search(r"```sh\n(silotune sim flower-app .*?)```", page, re.S)
    assert block is not None
    return block.group(1)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder with a short path, for Ray's sockets; no process is left behind."""
    found = Path(tempfile.mkdtemp(prefix="flwr-"))
    try:
        yield found
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = marked(found)
            for process in left:
                try:
                    process.send_signal(number)
                except psutil.Error:
                    continue
            psutil.wait_procs(left, timeout=20)
        shutil.rmtree(found, ignore_errors=True)


def marked(folder: Path) -> list[psutil.Process]:
    """The processes that the test has started, and what those have: the SuperLink lets go of its
    parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_commands_of_the_page(folder: Path) -> None:
    pytest.importorskip("ray", reason="Flower's simulation needs Ray: flwr[simulation]")
    env = os.environ | {
        MARK: str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(Federation.free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(Federation.free_port()),
        "RAY_TMPDIR": str(folder / "ray"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": str(folder),
        # What answers for a package index: nothing may be fetched.
        "UV_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
    }
    done = subprocess.run(
        ["bash", "-ec", commands()],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    app = folder / "heart"
    runs = [place for place in (app / "runs").glob("*") if place.name != ".receipts"]
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(runs) == 1, done.stdout[-3000:]
    contract = contracts.load(app / "contract.json")
    figures = json.loads((runs[0] / "metrics.json").read_text())
    assert list(figures["train"]) == [str(n) for n in range(1, contract.rounds + 1)]
    last = figures["train"][str(contract.rounds)]
    assert last["sites"] == len(contract.sites)
    assert 0.9 * contract.privacy.epsilon < last["epsilon"] <= contract.privacy.epsilon
    assert figures["evaluate"][str(contract.rounds)]["auc"] > 0.7
    adapter = RunStore.open(runs[0], contract).adapter()
    assert {name: list(array.shape) for name, array in adapter.items()} == figures["arrays"]
    for site in contract.sites:
        place = app / "sites" / site.name
        ledger = PrivacyLedger.open(place / "state", Keys.load(place / "keys"))
        assert len(ledger.charges) == contract.rounds
