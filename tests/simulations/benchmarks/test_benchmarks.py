"""A benchmark that nobody runs is soon wrong: its smallest cells, with the sums it checks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from silotune.client.privacy import accountant
from silotune.common.contract.contract import Contract
from silotune.simulations.benchmarks import differences


def test_secure_aggregation_beside_flowers_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "silotune.simulations.benchmarks.secagg", "--quick"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    cells = {(row[0], row[1]) for row in rows if len(row) > 2 and row[2] == "ours"}
    assert cells == {
        (cell, what)
        for cell in ("0.1M-3", "0.1M-10", "0.1M-10-20%")
        for what in ("client", "server", "bytes")
    }
    # Times depend on the machine; bytes do not: three an entry against eight.
    ratios = re.findall(r"bytes .* ratios ([\d.]+)", done.stdout)
    assert all(0.3 < float(ratio) < 0.4 for ratio in ratios)
    assert not list(tmp_path.iterdir())


def test_the_difference_of_two_sums_has_the_noise_of_both(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    """Of n sites of one weight it has 2 n - 1 times the variance of one update."""
    contract = table_contract.changed(
        sites=[{"name": name} for name in ("north", "south", "east")],
        quorum=3,
        phases=[{"trains": "head", "rounds": 3, "sampling_rate": 1.0, "head_lr": 0.5}],
    )
    sites = {
        name: differences.Site(contract, name, write_rows(tmp_path / f"{name}.csv", 60, i), None)
        for i, name in enumerate(contract.weights())
    }
    (start, begun) = differences.adapters(sites, contract, 2)
    assert any(np.any(begun[name] != start[name]) for name in start)
    mechanism = accountant.mechanism_of(contract, sites["north"].worker.plan, 1)
    noise = mechanism.noise_multiplier * 1.0 * 0.5 / 50 / 3
    for name, row in differences.measure(sites, 1, start, 100).items():
        assert row["entries"] == 14
        assert row["alone"]["deviation"] == pytest.approx(noise, rel=0.1)
        assert row["deviation"] == pytest.approx(noise * 5**0.5, rel=0.1)
        assert row["as_one"] == pytest.approx(5, rel=0.3)
        exact = np.linalg.norm(sites[name].vector(1, start, noise=False))
        assert row["signal"] == exact
        assert row["stands_out"] == pytest.approx(exact / (noise * 5**0.5), rel=0.1)
        # One record of a full batch: clip norm over the noise of the sum.
        assert row["alone"]["record"] == pytest.approx(1 / mechanism.noise_multiplier, rel=0.1)
