"""How a request to the worker ended: for its log, its journal and its metrics."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from silotune.common.protocol.messages import Header
from silotune.common.runtime.journal import Fact

REQUESTS = ("describe", "train", "agree", "share", "endorse", "reveal")
OTHER = "other"  # bytes that are no request


@dataclass(frozen=True)
class Answered:
    """What is recorded of one answered request: only what the reply itself shows."""

    kind: str
    code: str
    seconds: float
    run: str | None = None
    round: int | None = None
    attempt: int | None = None
    epsilon: float | None = None

    @classmethod
    def of(cls, asked: Header | None, reply: bytes, seconds: float) -> Answered:
        """asked: None if the request was no message. reply: of the worker's own making."""
        (size,) = struct.unpack("<Q", reply[:8])
        header = json.loads(json.loads(reply[8 : 8 + size])["__metadata__"]["silotune"])
        kind = asked.kind if asked is not None and asked.kind in REQUESTS else OTHER
        run, number, attempt = (getattr(asked, what, None) for what in ("run", "round", "attempt"))
        return cls(
            kind, header.get("code", "ok"), seconds, run, number, attempt, header.get("epsilon")
        )

    @property
    def facts(self) -> dict[str, Fact]:
        """For the journal."""
        found = {
            "kind": self.kind,
            "code": self.code,
            "run": self.run,
            "round": self.round,
            "attempt": self.attempt,
            "seconds": round(self.seconds, 3),
        }
        return {key: value for key, value in found.items() if value is not None}

    @property
    def text(self) -> str:
        which = [
            self.kind,
            *([self.run] if self.run else []),
            *([f"round {self.round}"] if self.round else []),
            *([f"attempt {self.attempt}"] if (self.attempt or 1) > 1 else []),
        ]
        return f"{' '.join(which)}: {self.code}, {self.seconds:.1f} s"
