"""What a simulated client and round cost: `make bench-sim` writes results/sim.json.

Twenty clients with 64 airline tweets each (cut at 48 tokens), MiniLM, one step of SGD a round over
all of a client's texts at one rate: of a three-class head on the normalised mean token alone, or of
it and LoRA r=8 in the top two layers (A frozen, B trained). Each side is a process of its own; in
two blocks, by turns (ours of other kinds in the first alone), run

- ours: run_job, what studies run, without Flower; `ours-queues`, the same through Flower's queues;
  `ours-float32`, where the processor's bfloat16 would be taken; `ours-dp`, with noise (sim_ours.py)
- stock: Flower's simulation, whose client builds its model in each message (sim_stock.py)
- pfl: pfl-research's simulator, float32 as by default, and with its bfloat16 (sim_pfl.py)

`client_round` is the median of rounds but each block's first, over the clients: ours has the frozen
layers' outputs then, and the others, which do not keep them, run all six layers in every round. All
twenty clients take part in every round, which is what keeping them is best at. `first` is that
round, from the libraries' import on: model and texts are read in it, ours runs its frozen layers,
Ray starts. `whole` is a client and round with all of that in a run of 20 rounds: a first and 19
like the median. Ours scores 64 public texts in its last round and writes each round durably.

The sides' weights after two rounds are compared with pfl's in float32: they may differ by a
thousandth of the way that these have moved, by a twentieth where layers computed in bfloat16, whose
products have eight bits. Not equal: ours takes a client's texts by length, 16 at once, padded to a
multiple of 4 tokens (of 16, in filled blocks, through the frozen layers and under DP); the others
all 64 at once, padded to the client's longest. Stock sends A back, too.

Memory is by how much a process grows beyond its libraries, at its peak; of stock, all of Ray's
processes together (PSS), whose own libraries count as growth: no other side has such processes.
`memory/CASE` is ours over the model's float32 weights and the encoded texts; `memory/CASE/data` is
the same without the libraries' own code, which is read as it is used.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from silotune.simulations.benchmarks import command_line
from silotune.simulations.benchmarks.sim_ours import FLOAT32, OURS, PRIVATE, QUEUES
from silotune.simulations.benchmarks.sim_pfl import BF16, PFL
from silotune.simulations.benchmarks.sim_workload import (
    ADAPTER,
    AGREE,
    CLIENTS,
    HEAD,
    TEXTS,
    TOKENS,
    Weights,
    lay,
    read,
)

RESULTS = Path("simulations/benchmarks/results")
STOCK, CASES, BLOCKS, PATIENCE = "stock", (HEAD, ADAPTER), 2, 1200
RIVALS = STOCK, PFL, BF16
LIBRARIES = "flwr", "ray", "pfl", "torch", "transformers", "peft"
MODULES = dict.fromkeys((OURS, QUEUES, FLOAT32, PRIVATE), "sim_ours") | {
    STOCK: "sim_stock",
    PFL: "sim_pfl",
    BF16: "sim_pfl",
}
WHOLE = 20  # rounds
ROUNDS = dict.fromkeys(MODULES, 8) | {STOCK: 3, PFL: 4, BF16: 4}
ONCE = QUEUES, FLOAT32, PRIVATE  # in the first block alone
TOLERANCE = dict.fromkeys(MODULES, 0.05) | {STOCK: 0.001, FLOAT32: 0.001}

Block = dict[str, Any]  # a side's last line (sim_workload.report)


def block(side: str, case: str, folder: Path, rounds: int) -> Block:
    """One run of a side, in a process of its own."""
    words = [sys.executable, "-m", f"silotune.simulations.benchmarks.{MODULES[side]}", side, case]
    done = subprocess.run(
        [*words, folder, str(rounds), folder / f"{side}-{case}"],
        env=os.environ
        | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_TELEMETRY_ENABLED": "0",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"marks"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{side}/{case} has failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: Block = json.loads(lines[-1])
    if len(found["marks"]) != rounds:
        raise RuntimeError(f"{side}/{case} did {len(found['marks'])} of {rounds} rounds")
    return found


def cell(blocks: list[Block]) -> dict[str, Any]:
    """Seconds, clients and rounds a second, and megabytes, of one side and case."""
    first = median(block["marks"][0] for block in blocks)
    later = [b - a for block in blocks for a, b in pairwise(block["marks"])]
    each = median(later)
    seconds = {
        "first": first,
        "round": each,
        "least": min(later),
        "most": max(later),
        "client_round": each / CLIENTS,
        "whole": (first + (WHOLE - 1) * each) / WHOLE / CLIENTS,
        "a_second": CLIENTS / each,
    }
    peak = max(block["memory"]["peak"] for block in blocks)
    found = {"rounds": len(later)} | {name: round(value, 5) for name, value in seconds.items()}
    found["memory_mb"] = round(peak / 1e6, 1)
    found["code_mb"] = round(max(b["memory"].get("code", 0) for b in blocks) / 1e6, 1)
    if "model" in blocks[0]:
        found["model_and_data_mb"] = round((blocks[0]["model"] + blocks[0]["data"]) / 1e6, 1)
    return found


def ratios(cells: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours over theirs, and ours of one kind over ours; cells: SIDE/CASE."""
    found = dict[str, float]()
    for case in CASES:
        ours = cells[f"{OURS}/{case}"]
        for what, key in (("time", "client_round"), ("whole", "whole"), ("memory", "memory_mb")):
            for rival in RIVALS:
                found[f"{what}/{rival}/{case}"] = ours[key] / cells[f"{rival}/{case}"][key]
        alike = cells[f"{FLOAT32}/{case}"]["client_round"]
        found[f"float32/{PFL}/{case}"] = alike / cells[f"{PFL}/{case}"]["client_round"]
        for side in (QUEUES, PRIVATE):
            own = cells[f"{side}/{case}"]["client_round"]
            found[f"{side}/{OURS}/{case}"] = own / ours["client_round"]
        found[f"memory/{case}"] = ours["memory_mb"] / ours["model_and_data_mb"]
        own = ours["memory_mb"] - ours["code_mb"]
        found[f"memory/{case}/data"] = own / ours["model_and_data_mb"]
    return {name: round(value, 5) for name, value in found.items()}


def differences(found: Weights, right: Weights, first: Weights) -> dict[str, float]:
    """By part, how far weights are from the right ones, of how far these are from the first."""
    if set(found) != set(right):
        raise ValueError(f"other tensors: {sorted(set(found) ^ set(right))}")
    parts = {"head": "head.", "lora_B": ".lora_B", "lora_A": ".lora_A"}
    differing = dict[str, float]()
    for part, word in parts.items():
        names = [name for name in right if word in name]
        apart, moved = (
            float(np.sqrt(sum(np.square(a[n] - b[n], dtype=float).sum() for n in names)))
            for a, b in ((found, right), (right, first))
        )
        if names:
            differing[part] = apart / moved if moved else apart
    return differing


def agreement(folder: Path) -> dict[str, float]:
    """How far the sides are from pfl in float32; ValueError where that is too far: the time of
    something else is worth nothing. Noise is no step to compare."""
    agreed = dict[str, float]()
    for case in CASES:
        first, right = read(folder / case), read(folder / f"{PFL}-{case}")
        if any(not np.abs(right[n] - first[n]).max() for n in right if not n.endswith("lora_A")):
            raise ValueError(f"{case}: nothing has moved")
        for side in MODULES:
            if side in (PFL, PRIVATE):
                continue
            found = differences(read(folder / f"{side}-{case}"), right, first)
            agreed |= {f"{side}/{case}/{part}": round(d, 6) for part, d in found.items()}
            if not max(found.values()) <= TOLERANCE[side]:
                raise ValueError(f"{side}/{case} made another step than {PFL}: {found}")
    return agreed


def table(cells: dict[str, dict[str, Any]]) -> list[str]:
    columns = "first", "round", "least", "most", "client_round", "whole", "a_second", "memory_mb"
    lines = [" " * 22 + "".join(f"{name:>13}" for name in columns)]
    lines += [
        f"{label:22}" + "".join(f"{found[name]:13.5g}" for name in columns)
        for label, found in cells.items()
    ]
    return lines


def main(*, quick: bool) -> None:
    """Measure, print the table and write the results; quick: few rounds, nothing written."""
    raw: dict[str, list[Block]] = {f"{side}/{case}": [] for case in CASES for side in MODULES}
    rounds = dict.fromkeys(ROUNDS, AGREE) if quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="sim-") as name:
        lay(Path(name))
        for turn in range(1 if quick else BLOCKS):
            for label, blocks in raw.items():
                side, case = label.split("/")
                if turn and side in ONCE:
                    continue
                blocks.append(block(side, case, Path(name), rounds[side]))
                print(label, *(f"{b:.2f}" for b in blocks[-1]["marks"]), flush=True)
            agreed = agreement(Path(name))
    cells = {label: cell(found) for label, found in raw.items()}
    print(*table(cells), json.dumps(ratios(cells), indent=1), sep="\n")
    print("agreement", json.dumps(agreed))
    if quick:
        return
    commit = ["git", "rev-parse", "--short", "HEAD"]
    results = {
        "commit": subprocess.check_output(commit, text=True).strip(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in LIBRARIES},
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "clients": CLIENTS,
        "texts": TEXTS,
        "tokens": TOKENS,
        "rounds": ROUNDS,
        "blocks": BLOCKS,
        "ratios": ratios(cells),
        "cells": cells,
        "tolerance": TOLERANCE,
        "agreement": agreed,
        "raw": raw,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "sim.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(quick=command_line.is_quick(__doc__))
