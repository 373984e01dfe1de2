"""What a long-running command says: short lines for people, or with --log-json one object a line.

{"at": "2026-11-22T10:15:00.123Z", "from": "worker", "event": "ready", "text": "…", …facts}

Facts are names, numbers and codes. JSON is written in ASCII, text for people without colours and
with escapes: what a process wrote, whatever it is, can then neither end its line nor reach a
terminal as a control sequence.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal

import click

from silotune.common.runtime.terminal import echo, escaped

Source = Literal["worker", "relay", "supervisor", "superlink", "nginx", "server"]
Fact = str | int | float
NONE: Mapping[str, Fact] = MappingProxyType({})
OUTPUT = "output"  # the event of a line that a process wrote on its own

_TEXT, _WHOLE, _NUMBER = (str,), (int,), (int, float)
_REQUIRED: dict[str, tuple[type, ...]] = {"at": _TEXT, "from": _TEXT, "event": _TEXT, "text": _TEXT}
_FACTS: dict[str, tuple[type, ...]] = {
    "kind": _TEXT,
    "code": _TEXT,
    "run": _TEXT,
    "round": _WHOLE,
    "attempt": _WHOLE,
    "seconds": _NUMBER,
}


class Journal:
    """Where one command, `source`, tells what happens, and repeats what its processes say."""

    def __init__(
        self, source: Source, *, as_json: bool = False, write: Callable[[str], None] = echo
    ) -> None:
        self.source, self.as_json = source, as_json
        self._write, self._lock = write, threading.Lock()

    def emit(
        self,
        text: str,
        event: str = OUTPUT,
        facts: Mapping[str, Fact] = NONE,
        *,
        source: Source | None = None,
    ) -> None:
        """Tell one event. source: whose, if it is not this command's own.

        With facts the text must say them too: people see only the text.
        """
        source = source or self.source
        if self.as_json:
            entry = {"at": _now(), "from": source, "event": event, "text": text}
            self._line(_json({**entry, **facts}))
        else:
            line = text if source == self.source else f"{source}: {text}"
            self._line(escaped(click.unstyle(line), lines=False))

    def pass_on(self, line: str, source: Source) -> None:
        """Repeat a line of a process that keeps a journal of its own under the name `source`: its
        objects stay what they are, anything else is text."""
        if self.as_json and (found := _object(line, source)) is not None:
            self._line(found)
        else:
            self.emit(line, source=source)

    def _line(self, text: str) -> None:
        # Whoever read this has gone: that must not end the work, nor cost a site its reply.
        with self._lock, contextlib.suppress(OSError):
            self._write(text)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json(event: dict[str, Any]) -> str:
    return json.dumps(event, allow_nan=False)


def _object(line: str, source: str) -> str | None:
    """The line, serialised again, if it is one object of a journal of `source`; None otherwise."""
    try:
        found = json.loads(line)
        if not isinstance(found, dict) or not _REQUIRED.keys() <= found.keys():
            return None
        types = _REQUIRED | _FACTS
        known = all(type(value) in types.get(key, ()) for key, value in found.items())
        datetime.fromisoformat(found["at"] if known else "")
        return _json(found) if found["from"] == source else None
    except (ValueError, RecursionError):
        return None
