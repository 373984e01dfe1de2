"""A benchmark that nobody runs is soon wrong: its smallest cells, with the sums it checks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_secure_aggregation_beside_flowers_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "silotune.simulations.benchmarks.secagg", "--quick"], cwd=tmp_path,
        capture_output=True, text=True, timeout=300, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    cells = {(row[0], row[1]) for row in rows if len(row) > 2 and row[2] == "ours"}
    assert cells == {
        (cell, what) for cell in ("0.1M-3", "0.1M-10", "0.1M-10-20%")
        for what in ("client", "server", "bytes")
    }
    # Times depend on the machine; bytes do not: three an entry against eight.
    ratios = re.findall(r"bytes .* ratios ([\d.]+)", done.stdout)
    assert all(0.3 < float(ratio) < 0.4 for ratio in ratios)
    assert not list(tmp_path.iterdir())
