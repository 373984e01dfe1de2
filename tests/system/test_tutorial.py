"""The ten commands of docs/tutorials/three-hospitals.md, run as printed: four parties, seven users,
two-user sites, masks."""

from __future__ import annotations

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

from silotune.server.storage.run_store import RunStore
from tests.system.test_boundary import way_in

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "SILOTUNE_TEST_TUTORIAL"
SECONDS = 300
USERS = [
    f"fl-{who}{relay}"
    for who in ("operator", "cleveland", "hungary", "va-long-beach")
    for relay in ("", "-relay")
]
# As the page says; `wait` gives the exit code of each, which `set -e` looks at.
STOP = "all=$(jobs -p); kill $all; for job in $all; do wait $job; done"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

pytestmark = [
    pytest.mark.system,
    pytest.mark.download,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make users"),
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]


def commands() -> list[str]:
    page = (ROOT / "docs" / "tutorials" / "three-hospitals.md").read_text(encoding="utf-8")
    block = re.search(r"```sh\n(.*?)```", page, re.S)
    assert block is not None
    return block.group(1).splitlines()


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that every user may pass through; no process and no user is left behind."""
    remove_users()  # of a run that was killed before it could
    found = Path(tempfile.mkdtemp(prefix="silotune-tutorial-"))
    found.chmod(0o711)
    try:
        yield found
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = marked()
            for process in left:
                try:
                    process.send_signal(number)
                except psutil.Error:
                    continue
            psutil.wait_procs(left, timeout=40)
        remove_users()
        shutil.rmtree(found, ignore_errors=True)


def remove_users() -> None:
    """End every process of the tutorial's users and delete the users, if there are any."""
    for user in USERS:
        subprocess.run(["pkill", "-KILL", "-U", user], check=False, capture_output=True)
        subprocess.run(["userdel", user], check=False, capture_output=True)


def marked() -> list[psutil.Process]:
    """What the tutorial's shell has started itself."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_there_are_ten() -> None:
    assert len(commands()) == 10


def test_the_tutorial_as_printed(folder: Path) -> None:
    script = folder / "tutorial.sh"
    script.write_text(
        "\n".join(
            [
                "set -euo pipefail",
                "umask 022",
                *commands(),
                STOP,
                "echo all have ended",
            ]
        )
        + "\n"
    )
    with (folder / "said").open("wb") as said:
        shell = subprocess.Popen(
            [str(word) for word in (*way_in(folder), "bash", script)],
            cwd=folder,
            stdout=said,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ
            | {MARK: "1", "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        )
        try:
            code = shell.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
    text = (folder / "said").read_text(errors="replace")
    assert code == 0, text[-8000:]
    assert text.splitlines()[-1] == "all have ended"
    stopped = [line for line in text.splitlines() if line.strip() == "stopped"]
    assert len(stopped) == 4, text[-3000:]  # three sites and the server, each by itself
    assert not marked()
    rounds = re.findall(
        r"^ *(\d)/5 +3 sites +loss [\d.]+ +accuracy [\d.]+ +auc ([\d.]+)$", text, re.M
    )
    assert [number for number, _ in rounds] == list("12345"), text[-3000:]
    assert float(rounds[-1][1]) > 0.8
    registry = RunStore(folder / "operator" / "server" / "runs" / "heart")
    assert [facts["sites"] for facts in registry.rounds()] == [
        ["cleveland", "hungary", "va-long-beach"]
    ] * 5
    assert registry.adapter()
    # Each party's own: nobody else can look into it.
    for who in ("cleveland/site", "operator/server"):
        owner = (folder / who).stat()
        assert owner.st_mode & 0o777 == 0o700, who
    assert (folder / "cleveland" / "site" / "records.csv").stat().st_mode & 0o077 == 0
