"""Flower starts the relay anew for every message: its import must stay cheap."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TRIES = 3
SECONDS = 1.5  # of CPU time, interpreter and flwr included
CODE = "import sys, silotune.client.relay.client_app; sys.exit('torch' in sys.modules)"


def cpu_seconds() -> float:
    """User and system time of one child that imports the relay."""
    process = subprocess.Popen([sys.executable, "-c", CODE])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, "torch was imported, or the relay could not be"
    return usage.ru_utime + usage.ru_stime


@pytest.mark.system
def test_the_relay_starts_quickly_and_without_torch() -> None:
    best = min(cpu_seconds() for _ in range(TRIES))
    print(f"\nimporting the relay: {best:.2f} s of CPU")
    assert best < SECONDS
