"""What happened in a run: events.jsonl, one object a line. Facts are names, numbers and codes.

run, waiting (for sites of the roster), absent (sites that take part in no round), agreed, rejected,
declined (a sum, by the gate), committed, skipped, resumed, damaged, stopped, failed, released; of a
server process, with its token: starting, taken (it carries out the run), refused (it could not).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.common.runtime.atomic_files import is_full

FILE = "events.jsonl"
RESERVE, RESERVED = ".reserve", 8192  # bytes
Event = dict[str, Any]


def reserve(folder: Path) -> None:
    """Take the room that a run's last event needs when its disk is full by then."""
    (folder / RESERVE).write_bytes(bytes(RESERVED))


def append(folder: Path, what: str, **facts: Any) -> None:
    """Write an event. On a full disk the reserve gives way to it; OSError if that is gone, too."""
    try:
        _append(folder, what, facts)
    except OSError as error:
        if not is_full(error) or not (folder / RESERVE).exists():
            raise
        (folder / RESERVE).unlink()
        _append(folder, what, facts)


def _append(folder: Path, what: str, facts: Mapping[str, Any]) -> None:
    line = json.dumps({"at": round(time.time(), 3), "event": what, **facts}, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line  # a crash or a full disk left half a line
        file.write(f"{line}\n".encode())


class Events:
    """The events of the run in a folder, as they come."""

    def __init__(self, folder: Path) -> None:
        self._path, self._read = folder / FILE, 0

    def new(self) -> list[Event]:
        """Those since the last call. A line that a crash left unfinished is left out."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._read += len(whole) + bool(whole)
        found = []
        for line in whole.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


@dataclass
class RunStatus:
    """What the events of one run say."""

    planned: int = 0
    committed: set[int] = field(default_factory=set)
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    why: str = ""  # it stopped, and was not resumed since
    code: str = ""  # of that
    waiting: Mapping[str, Any] = field(default_factory=dict)  # of the last event, if it is that
    absent: Mapping[str, str] = field(default_factory=dict)  # sites, and why
    released: bool = False
    last: float = 0.0
    seconds: float = 0.0  # of `timed` rounds together
    timed: int = 0


def run_status(events: list[Event]) -> RunStatus:
    found, since = RunStatus(), None
    for event in events:
        kind, at = event["event"], float(event["at"])
        found.waiting = event if kind == "waiting" else {}
        if kind == "run":  # a resumed run begins with another
            found.planned, found.why, found.absent = int(event["rounds"]), "", {}
            found.code = ""
        elif kind == "absent":
            found.absent = event["sites"]
        elif kind == "committed":
            found.committed.add(int(event["round"]))
            if since is not None:
                found.seconds, found.timed = found.seconds + at - since, found.timed + 1
        elif kind == "rejected":
            found.rejected[str(event["site"]), str(event["code"])] += 1
        elif kind in ("stopped", "failed") or (kind == "refused" and not found.planned):
            # A process that could not take up a run leaves it as it was.
            found.why, found.code = str(event["why"]), str(event.get("code", ""))
        elif kind == "released":
            found.released = True
        if kind == "skipped":  # its commit follows at once and took no time
            since = None
        elif kind in ("run", "resumed", "committed"):
            since = at
        found.last = at
    return found
