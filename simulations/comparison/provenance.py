"""On which machine and from which commit a result was computed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path


def commit() -> str:
    """The commit of the source tree this runs from, with + for changes; 'unknown' outside one."""
    root = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty=+"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def machine(gpu: str) -> str:
    """What this computes on, in a few words; gpu: its name, or nothing."""
    return f"{platform.machine()}, {os.cpu_count()} cores" + (f", {gpu}" if gpu else "")


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or sys.platform


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
