"""What a round costs beyond training: `make bench-rounds` writes results/rounds.json.

Two sites and a server on this machine: Flower's SuperLink with TLS and node keys, two SuperNodes,
one thread a process. Over them, in blocks by turns, run

- ours: the product's ServerApp and relay, and at each site its worker, which stays warm;
- stock: stock_app.py, which loads model and records in each message, as Flower's examples do.

Both adapt the same layers by LoRA of the same rank and make one step over the same eight short
texts, without privacy or masks. Training is what a site's clock shows around the step (ours: around
`train_round`, which also takes the server's adapter); overhead is a round less the training of the
slower site. A block's first round also has what starts a run, so it stands apart. CPU seconds are
of all processes at the sites, training included. Both sides have Flower look for work every 0.1 s,
not every second as it does by default; its other pauses are as they are (3 s between two looks of a
SuperNode for messages, and between two looks of the stock server for replies).

What is not the product in ours: no supervisor, nginx or users of their own. Not equal: stock trains
A and B and sends both, ours, as always, B alone; down to the sites go A and B on either side.

A last row has three sites on MiniLM with masks, which take one more exchange of messages a round.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from silotune.server.flower.app_bundle import write_app
from silotune.simulations.benchmarks import command_line
from silotune.simulations.benchmarks.federation import (
    ALPHA,
    RANK,
    TEXTS,
    TOKENS,
    Case,
    Federation,
    federation,
)

RESULTS = Path("simulations/benchmarks/results")
ROUNDS, BLOCKS = 4, 2  # of each side in turn
OURS, STOCK = "ours", "stock"
CASES = (
    Case("MiniLM", "all-MiniLM-L6-v2", 6),
    Case("SmolLM2", "SmolLM2-135M-Instruct", 30, ("q_proj", "o_proj")),
)
MASKED = Case("MiniLM masked", "all-MiniLM-L6-v2", 6, sites=("north", "south", "west"))

PYPROJECT = """[project]
name = "stock-app"
version = "1.0.0"
description = "LoRA as documentation teaches it"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "benchmark"
fab-format-version = 1
flwr-version-target = "{flwr}"
fab-include = ["LICENSE", "README.md", "stock_app.py"]

[tool.flwr.app.components]
serverapp = "stock_app:server"
clientapp = "stock_app:client"

[tool.flwr.app.config]
{config}
"""


@dataclass(frozen=True)
class Block:
    """Rounds of one run: seconds of each, of the slowest site's training, of the sites' CPUs."""

    seconds: list[float]
    training: list[float]
    cpu: list[float]


def block(running: Federation, side: str, run: str) -> Block:
    """One run; its first round counts from the moment it is submitted."""
    app, sites = running.folder / f"{run}-app", running.case.sites
    if side == OURS:
        runs = running.folder / "runs"
        marks = runs / run / "events.jsonl"
        write_app(app, contract=running.contract, model=running.model, run=run, runs=runs)
    else:
        marks = running.folder / f"{run}.marks"
        write_stock(app, running.case, running.model, marks)
    before = {site: len(running.trained(site)) for site in sites}
    began, cpu = time.time(), [running.cpu()]
    running.run(app)
    for number in range(1, ROUNDS + 1):
        running.wait(f"round {number} of {run}", partial(reached, marks, number))
        cpu.append(running.cpu())
    trained = [running.trained(site)[before[site] :] for site in sites]
    if any(len(found) != ROUNDS for found in trained):
        raise RuntimeError(f"a site did not train in each round of {run}")
    return Block(
        [b - a for a, b in pairwise([began, *committed(marks)])],
        [max(found) for found in zip(*trained, strict=True)],
        [b - a for a, b in pairwise(cpu)],
    )


def write_stock(folder: Path, case: Case, model: Path, marks: Path) -> None:
    """The Flower app of stock_app.py."""
    folder.mkdir()
    config = {
        "model": str(model),
        "targets": ",".join(case.targets),
        "rank": RANK,
        "alpha": ALPHA,
        "tokens": TOKENS,
        "rounds": ROUNDS,
        "marks": str(marks),
    }
    lines = (f"{key} = {json.dumps(value)}" for key, value in config.items())
    (folder / "pyproject.toml").write_text(
        PYPROJECT.format(flwr=version("flwr"), config="\n".join(lines))
    )
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "README.md").write_text("LoRA in a Flower app.\n")
    shutil.copy(Path(__file__).with_name("stock_app.py"), folder)


def reached(marks: Path, number: int) -> bool:
    return len(committed(marks)) >= number


def committed(marks: Path) -> list[float]:
    """When each round was done."""
    lines = marks.read_text().splitlines() if marks.exists() else []
    return [e["at"] for e in map(json.loads, lines) if e["event"] == "committed"]


def cell(blocks: list[Block]) -> dict[str, Any]:
    """Medians in seconds over all rounds but each block's first, which is `first`."""
    seconds = [one for block in blocks for one in block.seconds[1:]]
    training = [one for block in blocks for one in block.training[1:]]
    over = [a - b for a, b in zip(seconds, training, strict=True)]
    found = {
        "first": median(block.seconds[0] for block in blocks),
        "round": median(seconds),
        "training": median(training),
        "overhead": median(over),
        "least": min(over),
        "most": max(over),
        "cpu": median(one for block in blocks for one in block.cpu[1:]),
    }
    return {"rounds": len(over)} | {name: round(value, 3) for name, value in found.items()}


def ratios(cells: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How overhead and CPU time grow with the model, and ours beside stock's; cells: SIDE/MODEL."""
    small, large = (case.label for case in CASES)
    pairs = {
        f"{side}/{large}/{small}": (f"{side}/{large}", f"{side}/{small}") for side in (OURS, STOCK)
    } | {
        f"{OURS}/{STOCK}/{label}": (f"{OURS}/{label}", f"{STOCK}/{label}")
        for label in (small, large)
    }
    return {
        f"{what}/{name}": round(cells[a][what] / cells[b][what], 3)
        for what in ("overhead", "cpu")
        for name, (a, b) in pairs.items()
    }


def table(cells: dict[str, dict[str, Any]]) -> list[str]:
    columns = "first", "round", "training", "overhead", "least", "most", "cpu"
    lines = [" " * 20 + "".join(f"{name:>10}" for name in columns) + "  seconds"]
    lines += [
        f"{label:20}" + "".join(f"{found[name]:10.2f}" for name in columns)
        for label, found in cells.items()
    ]
    return lines


def main(*, quick: bool) -> None:
    """Measure, print the table and write the results; quick: one block each, nothing written."""
    blocks = 1 if quick else BLOCKS
    raw: dict[str, list[Block]] = {}
    for case, turns in (*((case, (OURS, STOCK) * blocks) for case in CASES), (MASKED, (OURS,))):
        with federation(case, ROUNDS) as running:
            for number, side in enumerate(turns, start=1):
                found = block(running, side, f"{side}-{number}")
                raw.setdefault(f"{side}/{case.label}", []).append(found)
                print(f"{side}/{case.label}", *(f"{s:.1f}" for s in found.seconds), flush=True)
    cells = {label: cell(found) for label, found in raw.items()}
    print(*table(cells), json.dumps(ratios(cells), indent=1), sep="\n")
    if quick:
        return
    commit = ["git", "rev-parse", "--short", "HEAD"]
    results = {
        "commit": subprocess.check_output(commit, text=True).strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a process; flwr "
        f"{version('flwr')}, torch {version('torch')}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": ROUNDS,
        "blocks": BLOCKS,
        "batch": len(TEXTS),
        "rank": RANK,
        "ratios": ratios(cells),
        "cells": cells,
        "raw": {label: [vars(one) for one in found] for label, found in raw.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "rounds.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    only_quick = command_line.is_quick(__doc__)
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all processes end, too
    main(quick=only_quick)
