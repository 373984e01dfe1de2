"""How often work changes files: one `train` request of a worker, and one `sim run`.

    python -m tests.trace_calls

Counts functions of this project alone: files entered, calls from one file to another, and those
of them that enter the contract. Loops count once: equal (caller, line, callee) are one call.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from silotune.common.contract.contract import parse
from silotune.common.models.factory import build
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Message, Train
from tests.behaviour import recipe_adapter, write_rows
from tests.client.worker.test_secagg import Federation
from tests.conftest import TABLE_CONTRACT

CONTRACT = "silotune.common.contract.contract"  # the module, later the folder

Call = tuple[str, int, str, str]


def module_of(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__") or ""
    return name if name.startswith("silotune.") else ""


def traced(work: Callable[[], Any]) -> dict[str, int]:
    """Runs `work` and counts."""
    calls: set[Call] = set()
    files: set[str] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not (to := module_of(frame)):
            return
        files.add(to)
        caller = frame.f_back
        while caller is not None and not module_of(caller):
            caller = caller.f_back
        if caller is not None and (of := module_of(caller)) != to:
            calls.add((of, caller.f_lineno, to, frame.f_code.co_name))

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    into = [c for c in calls if f"{c[2]}.".startswith(f"{CONTRACT}.") and c[0] != c[2]]
    return {
        "files": len(files),
        "calls between files": len(calls),
        "calls into the contract": len(into),
        "files that call the contract": len({c[0] for c in into}),
    }


def request(folder: Path) -> dict[str, int]:
    """The second `train` request of a worker (the first one loads): no masks, the one-hot model."""
    federation = Federation(parse(TABLE_CONTRACT), folder, write_rows)
    federation.contract = federation.contract.changed(secure_aggregation=None)
    for site in federation.workers:
        federation.restart(site)
    answer = federation.handles()["north"]
    arrays = build(federation.contract, None).initial_arrays()

    def train(number: int) -> bytes:
        header = Train(contract=federation.contract.hash, run="run-1", round=number, attempt=1)
        return answer(messages.pack(Message(header, arrays)))

    train(1)
    return traced(lambda: train(2))


def simulation(folder: Path) -> dict[str, int]:
    """The main variant of `sim run heart-diagnosis`, one round a phase, without its process
    pool."""
    return traced(lambda: recipe_adapter("heart-diagnosis", folder))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request").mkdir()
        print("train request", request(folder / "request"))
        print("sim run", simulation(folder / "simulation"))


if __name__ == "__main__":
    main()
