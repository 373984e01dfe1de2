"""`silotune site worker` that stops where a test asks it to, so that something can be killed then.

Beside the real command line: before a point of a round it looks at the file FAULTS/pause. If that
says "POINT ROUND" or "POINT any", it makes FAULTS/there and waits until it says so no more. What it
computes stands in FAULTS/computed, a line for each time; the last training request in FAULTS/last.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Released
from silotune.client.worker import worker as workers
from silotune.client.worker.worker import Worker
from silotune.common.cli.main import main
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Train

# In the order of a round; the second row are secure aggregation's other stages.
POINTS = ("describe", "asked", "charged", "stored", "answered")
STAGES = ("agree", "share", "asked", "endorse", "reveal")

FAULTS = Path(os.environ.get("SILOTUNE_TEST_FAULTS", "."))


def pause(point: str, number: int) -> None:
    order = FAULTS / "pause"
    try:
        if order.read_text() not in (asked := (f"{point} {number}", f"{point} any")):
            return
        (FAULTS / "there").touch()
        while order.read_text() in asked:
            time.sleep(0.02)
    except FileNotFoundError:
        return


def wrap() -> None:
    handle, append, train = Worker.handle, PrivacyLedger.append, workers.train_round
    asked: list[Any] = [None]

    def handling(self: Worker, wire: bytes) -> bytes:
        try:
            header = messages.unpack(wire).header
        except Exception:
            return handle(self, wire)
        number = getattr(header, "round", 1)
        if isinstance(header, Train):
            asked[0] = header
            (FAULTS / "last").write_bytes(wire)
        pause("asked" if isinstance(header, Train) else header.kind, number)
        reply = handle(self, wire)
        if isinstance(header, Train):
            pause("answered", number)
        return reply

    def training(*args: Any) -> Any:
        now = asked[0]
        with (FAULTS / "computed").open("a") as file:
            file.write(f"{now.contract} {now.run} {now.round} {now.attempt}\n")
            file.flush()
            os.fsync(file.fileno())
        pause("charged", now.round)
        return train(*args)

    def appending(self: PrivacyLedger, kind: Any, **facts: Any) -> Any:
        if kind is Released:
            pause("stored", asked[0].round)
        return append(self, kind, **facts)

    Worker.handle = handling  # type: ignore[method-assign]
    PrivacyLedger.append = appending  # type: ignore[method-assign]
    workers.train_round = training
    if os.environ.get("SILOTUNE_TEST_LIES"):
        # Whatever it is asked to train, it answers with these bytes.
        lie = Path(os.environ["SILOTUNE_TEST_LIES"]).read_bytes()
        honest = Worker.handle

        def lying(self: Worker, wire: bytes) -> bytes:
            header = messages.unpack(wire).header
            return lie if isinstance(header, Train) else honest(self, wire)

        Worker.handle = lying  # type: ignore[method-assign]


if __name__ == "__main__":
    wrap()
    sys.argv[0] = "silotune"
    main()
