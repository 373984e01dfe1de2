"""The short form of `make soak`: some faults of faults.py, to one federation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.system.faults import faults, federation, heed_interrupts

SHORT = ("kill -9 of ServerApp", "two servers, one run")
MORE = (
    "Ctrl-C on server run",
    "a site that is absent at the start",
    "SIGTERM to a worker",
    "message of 300 MB",
)
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def test_every_fault_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in faults()]
    assert len(set(names)) == len(names)
    assert {*SHORT, *MORE} <= set(names)


def survived(names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """What each of the faults, one after the other to one federation, ended in."""
    chosen = {fault.name: fault for fault in faults()}
    heed_interrupts()
    with federation(folder / "f", "plain") as found:
        return {name: chosen[name].do(found) for name in names}


@pytest.mark.system
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_faults_are_survived(tmp_path: Path) -> None:
    seen = survived(SHORT, tmp_path)
    assert len(seen["kill -9 of ServerApp"].splitlines()) == 5
    assert "E602" in seen["two servers, one run"]


@pytest.mark.nightly
@pytest.mark.system
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_more_faults_are_survived(tmp_path: Path) -> None:
    assert "413" in survived(MORE, tmp_path)["message of 300 MB"]
