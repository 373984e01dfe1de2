"""How long a comparison takes on this machine and how much memory, by the last one like it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.formats import strict_json
from silotune.common.runtime.atomic_files import write_durably
from silotune.simulations.datasets import catalog
from silotune.simulations.execution.variants import Job


@dataclass(frozen=True)
class Duration:
    """Of a comparison that has ended.

    Attributes:
        seconds_per_cost: By the unit of `Job.cost`, on one process.
        memory: The peak, in bytes, of all processes together.
        date: When it ended: year-month-day.
    """

    seconds_per_cost: float
    memory: int
    date: str

    @classmethod
    def of(
        cls, jobs: Sequence[Job], processes: int, seconds: float, memory: int, date: str
    ) -> Duration:
        cost = sum(job.cost for job in jobs)
        return cls(seconds * min(processes, len(jobs)) / cost, memory, date)

    @classmethod
    def load(cls, file: Path) -> Duration | None:
        """What was kept in a file; None if nothing was, or it cannot be read."""
        try:
            found = strict_json.loads(file.read_text(encoding="utf-8"))
            return cls(float(found["seconds_per_cost"]), int(found["memory"]), str(found["date"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, file: Path) -> None:
        """For later runs. An estimate is no reason to fail: where nothing can be written there
        will be none."""
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(file, json.dumps(asdict(self)).encode())

    def seconds(self, jobs: Sequence[Job], processes: int) -> float:
        """About how long these jobs take."""
        return self.seconds_per_cost * sum(job.cost for job in jobs) / min(processes, len(jobs))


def file_of(contract: Contract, performance: Performance, kind: str = "") -> Path:
    """Where the duration of a contract's last comparison lies: in the cache. Other variants,
    repeats, rounds or another ε are the same comparison, another way to compute or another kind of
    comparison is not."""
    asked = hashlib.sha256(f"{contract.hash} {performance.model_dump_json()}{kind}".encode())
    return catalog.home() / "durations" / f"{asked.hexdigest()[:16]}.json"


def clock(seconds: float) -> str:
    """Seconds as people say them: 45s, 3m20s."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
