"""`make soak`: every fault of faults.py to real federations, a table of what was seen, and
simulations/benchmarks/results/soak.json. Exits with 1 if one was not survived.

    python -m tests.system.soak [WORD …]     those whose names hold one of the words

Each row of the results says of which commit it is, and when it was taken.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.system.faults import CONTRACTS, Fault, faults, federation

RESULTS = Path("simulations/benchmarks/results/soak.json")
MOST_SECONDS = 18 * 60  # after which no fault is begun
# Side by side; one that is idle takes a tenth of a core.
FEDERATIONS = {"plain": 2, "masked": 1, "own": 1}


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    chosen = [f for f in faults() if not words or any(word in f.name for word in words)]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    threads = []
    for kind, number in FEDERATIONS.items():
        waiting: queue.SimpleQueue[Fault] = queue.SimpleQueue()
        for fault in chosen:
            if fault.kind == kind:
                waiting.put(fault)
        for at in range(min(number, waiting.qsize())):
            threads.append(threading.Thread(
                target=_work,
                args=(folder / f"{kind}-{at}", kind, waiting, rows, began + MOST_SECONDS),
            ))
            threads[-1].start()
    for thread in threads:
        thread.join()
    order = [name for fault in chosen for name in _names(fault)]
    done = {row["fault"] for row in rows}
    rows += [{"fault": name, "survived": False, "seen": "not begun in time", "seconds": 0}
             for name in order if name not in done]
    rows.sort(key=lambda row: order.index(row["fault"]))
    _table(rows)
    survived = sum(row["survived"] for row in rows)
    print(f"{survived} of {len(order)} survived, {(time.monotonic() - began) / 60:.1f} min")
    _keep(rows)
    if survived == len(order):
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}")
    return int(survived < len(order))


def _work(
    folder: Path, kind: str, waiting: queue.SimpleQueue[Fault], rows: list[dict[str, Any]],
    end: float,
) -> None:
    """Do faults of one kind to one federation until none is left; a broken one is made anew."""
    for attempt in range(100):
        if waiting.empty() or time.monotonic() > end:
            return
        if kind == "own":
            _do(waiting.get(), folder.with_name(f"{folder.name}-{attempt}"), rows)
            continue
        assert kind in CONTRACTS
        with federation(folder.with_name(f"{folder.name}-{attempt}"), kind) as found:
            while not waiting.empty() and time.monotonic() < end:
                if not _do(waiting.get(), found, rows):
                    break


def _do(fault: Fault, on: Any, rows: list[dict[str, Any]]) -> bool:
    began = time.monotonic()
    try:
        seen, survived = fault.do(on), True
    except Exception as error:
        seen, survived = " ".join(f"{type(error).__name__}: {error}".split())[:400], False
        traceback.print_exc(limit=-3)
    seconds = round(time.monotonic() - began)
    names = _names(fault)
    lines = seen.splitlines() if survived else [seen] * len(names)
    for name, line in zip(names, lines, strict=True):
        rows.append({"fault": name, "survived": survived, "seen": line,
                     "seconds": round(seconds / len(names))})
        print(f"{'✓' if survived else '✗'} {name} ({seconds} s): {line[:300]}", flush=True)
    return survived


def _names(fault: Fault) -> list[str]:
    return [f"{fault.name}, {part}" if part else fault.name for part in fault.parts]


def _keep(rows: list[dict[str, Any]]) -> None:
    """Write the rows in the place of those of the same name."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            check=True).stdout.strip()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    before = json.loads(RESULTS.read_text())["faults"] if RESULTS.exists() else []
    kept = {row["fault"]: row for row in before}
    kept |= {row["fault"]: row | {"commit": commit, "at": at} for row in rows}
    names = [name for fault in faults() for name in _names(fault) if name in kept]
    RESULTS.write_text(json.dumps({
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "faults": [kept[name] for name in names],
    }, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> None:
    width = max((len(row["fault"]) for row in rows), default=0)
    print(f"\n{'fault':{width}}  survived  seconds  seen")
    for row in rows:
        print(f"{row['fault']:{width}}  {'yes' if row['survived'] else 'NO':8}  "
              f"{row['seconds']:7}  {row['seen'][:160]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
