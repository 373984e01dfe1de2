"""`make soak`: every fault of faults.py to real federations, a table of what was seen, and
simulations/benchmarks/results/soak.json. Exits with 1 if one was not survived.

    python -m tests.system.soak [WORD …]     those whose names hold one of the words

Each row of the results says of which commit it is, and when it was taken.
"""

from __future__ import annotations

import argparse
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

from tests.system.faults import CONTRACTS, Fault, faults, federation, heed_interrupts

RESULTS = Path("simulations/benchmarks/results/soak.json")
MOST_SECONDS = 18 * 60  # after which no fault is begun
# Side by side; one that is idle takes a tenth of a core.
FEDERATIONS = {"plain": 3, "masked": 1, "own": 1}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names of faults to run")
    words = parser.parse_args().words
    torch.set_num_threads(1)
    heed_interrupts()
    chosen = [f for f in faults() if not words or any(word in f.name for word in words)]
    known = _known()
    # A machine that does not get through them in the time begins, next time, with what it left out.
    chosen.sort(key=lambda f: min(known.get(n, {}).get("at", "")[:13] for n in _names(f)))
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
            threads.append(
                threading.Thread(
                    target=_work,
                    args=(folder / f"{kind}-{at}", kind, waiting, rows, began + MOST_SECONDS),
                )
            )
            threads[-1].start()
    for thread in threads:
        thread.join()
    kept = _keep(known, rows)
    _table(kept)
    order = [name for fault in chosen for name in _names(fault)]
    survived, done = sum(row["survived"] for row in rows), {row["fault"] for row in rows}
    print(f"{survived} of {len(rows)} survived, {(time.monotonic() - began) / 60:.1f} min")
    if len(done) < len(order):
        print(
            f"{len(order) - len(done)} were not begun in {MOST_SECONDS // 60} min; their rows "
            "are of an earlier run. Next time they come first."
        )
    if survived == len(rows):
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}")
    latest = {row["fault"]: row["survived"] for row in kept}
    return int(not all(latest.get(name) for name in order))


def _work(
    folder: Path,
    kind: str,
    waiting: queue.SimpleQueue[Fault],
    rows: list[dict[str, Any]],
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
        rows.append(
            {
                "fault": name,
                "survived": survived,
                "seen": line,
                "seconds": round(seconds / len(names)),
            }
        )
        print(f"{'✓' if survived else '✗'} {name} ({seconds} s): {line[:300]}", flush=True)
    return survived


def _names(fault: Fault) -> list[str]:
    return [f"{fault.name}, {part}" if part else fault.name for part in fault.parts]


def _known() -> dict[str, dict[str, Any]]:
    """The rows of before, by fault."""
    before = json.loads(RESULTS.read_text())["faults"] if RESULTS.exists() else []
    return {row["fault"]: row for row in before}


def _keep(known: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the rows in the place of those of the same name; all of them, in order."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    kept = known | {row["fault"]: row | {"commit": commit, "at": at} for row in rows}
    names = [name for fault in faults() for name in _names(fault) if name in kept]
    found = [kept[name] for name in names]
    RESULTS.write_text(
        json.dumps(
            {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "faults": found,
            },
            indent=1,
            ensure_ascii=False,
        )
        + "\n",
        encoding="utf-8",
    )
    return found


def _table(rows: list[dict[str, Any]]) -> None:
    width = max((len(row["fault"]) for row in rows), default=0)
    print(f"\n{'fault':{width}}  survived  commit   seconds  seen")
    for row in rows:
        print(
            f"{row['fault']:{width}}  {'yes' if row['survived'] else 'NO':8}  "
            f"{row['commit']}  {row['seconds']:7}  {row['seen'][:160]}"
        )


if __name__ == "__main__":
    sys.exit(main())
