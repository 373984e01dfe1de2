"""What studies have computed so far, in a folder's study.json: cells by key, of which none is lost.

Several processes may run parts of a study in one folder at the same time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from silotune.common.errors import UsageError
from silotune.common.runtime.atomic_files import write_durably

NAME = "study.json"


class StudyStore:
    """head: what the file says beside its cells. UsageError for a file that is no study's."""

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.head = folder / NAME, head
        self.cells()

    def cells(self) -> dict[str, Any]:
        """All that are there, also of variants that the study has no more. Where a cell does not
        say on which machine it was made, it was the file's."""
        if not self.file.exists():
            return {}
        try:
            whole = json.loads(self.file.read_text("utf-8"))
            where = {"machine": whole.get("machine", "unknown")}
            return {key: where | cell for key, cell in whole["cells"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f"{self.file} is no result of a study. Move it away, or name another folder."
            ) from None

    def put(self, key: str, cell: Mapping[str, Any]) -> None:
        """Add a cell, or put it in the place of the one that has its key."""
        with self._alone():
            cells = dict(sorted((self.cells() | {key: cell}).items()))
            found = dict(self.head) | {"cells": cells}
            text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
            write_durably(self.file, text.encode() + b"\n")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
