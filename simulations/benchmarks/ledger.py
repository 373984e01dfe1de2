"""What the ledger costs: `make bench-ledger` writes results/ledger.json.

A round's share: the charge (one transaction) and the release (reply and entry durable). Beside it,
in the same loop, the physical limit: the same bytes written to one file and synced once. Then how
long 10,000 entries take to be verified and composed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from silotune.client.privacy import accountant
from silotune.client.privacy.budget import Budget
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged
from silotune.client.privacy.reply_store import ReplyStore
from silotune.client.records.record_ids import SIZE, RecordSet
from silotune.simulations.benchmarks import command_line

RESULTS = Path("simulations/benchmarks/results")
ROUNDS = 500
REPLY = 300_000  # bytes: LoRA r=8 on q and v of MiniLM
ENTRIES = 10_000
RECORDS = 10_000


def charges(
    ledger: PrivacyLedger, records: RecordSet, first: int, last: int, kinds: int
) -> Charged:
    """Rounds `first` to `last` in one transaction, by `kinds` mechanisms in turn; the last one."""
    with ledger.writing():
        for number in range(first, last + 1):
            entry = ledger.charge(
                records,
                source="bench.csv",
                unit="record",
                contract="0" * 64,
                run="bench",
                round=number,
                attempt=1,
                request="0" * 64,
                noise_multiplier=20.0 + (number % kinds) / kinds,
                sampling_rate=0.25,
                steps=1,
                order=3.7,
            )
    return entry


def write_and_sync(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def rounds(folder: Path, records: RecordSet, reply: bytes) -> tuple[list[float], list[float]]:
    """Seconds of each charge with its release, and of one synced write of the same reply."""
    keys = Keys.create(folder / "keys")
    ledger = PrivacyLedger.create(folder / "state", keys, "bench")
    ours, limit = [], []
    for number in range(1, ROUNDS + 1):
        wire = reply + number.to_bytes(4)
        began = time.perf_counter()
        ReplyStore(ledger).release(charges(ledger, records, number, number, 1), wire)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        write_and_sync(folder / "limit", wire)
        limit.append(time.perf_counter() - began)
    return ours, limit


def composing(folder: Path, records: RecordSet, kinds: int) -> dict[str, float]:
    """Seconds to verify and to compose ENTRIES charges of `kinds` different mechanisms."""
    keys = Keys.create(folder / "keys")
    charges(PrivacyLedger.create(folder / "state", keys, "bench"), records, 1, ENTRIES, kinds)
    accountant._rdp_of_step.cache_clear()
    began = time.perf_counter()
    ledger = PrivacyLedger.open(folder / "state", keys)
    verified = time.perf_counter()
    Budget(ledger, records, "record").spent(1e-4)
    return {"verify": verified - began, "compose": time.perf_counter() - verified}


def main() -> None:
    """Measure, print and write the results."""
    rng = np.random.default_rng(0)
    prints = np.unique(np.frombuffer(rng.bytes(SIZE * RECORDS), dtype=f"S{SIZE}"))
    records = RecordSet("bench", prints, len(prints))
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        ours, limit = rounds(folder / "rounds", records, rng.bytes(REPLY))
        entries = {
            kinds: composing(folder / str(kinds), records, kinds) for kinds in (2, 200, ENTRIES)
        }
    ratio = float(np.median(ours) / np.median(limit))
    results = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": ROUNDS,
        "reply_bytes": REPLY,
        "entries": ENTRIES,
        "charge_and_release_ms": _percentiles(ours),
        "one_synced_write_ms": _percentiles(limit),
        "ratios": {"time/synced-write/charge-and-release": round(ratio, 3)},
        "seconds_for_mechanisms": {str(kinds): found for kinds, found in entries.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "ledger.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


def _percentiles(found: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(found, [50, 99]) * 1000
    return {"p50": round(float(p50), 2), "p99": round(float(p99), 2)}


if __name__ == "__main__":
    command_line.parser(__doc__).parse_args()
    main()
