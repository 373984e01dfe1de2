"""Files beside the ledger, named by the SHA-256 of their contents, which its entries name.

A file whose content has another digest counts as gone, so no edit of one is ever used.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from silotune.common.errors import ErrorCode, RefusalError
from silotune.common.runtime.atomic_files import is_full, write_durably

FOLDER = "replies"
LEAST_ROOM = 4 << 20  # bytes that the database and its log may need for an entry


class StoredFiles:
    """Contents by their digest. folder: the ledger's; None keeps them in memory only."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._in_memory: dict[str, bytes] = {}

    def store(self, content: bytes) -> str:
        """Make a content durable; returns its name. OSError if the disk does not take it."""
        name = hashlib.sha256(content).hexdigest()
        if self._folder is None:
            self._in_memory[name] = content
        else:
            write_durably(self._folder / FOLDER / name, content)
        return name

    def read(self, name: str) -> bytes | None:
        """The content of that digest, None if it is not there."""
        if self._folder is None:
            return self._in_memory.get(name)
        with contextlib.suppress(OSError):
            content = (self._folder / FOLDER / name).read_bytes()
            if hashlib.sha256(content).hexdigest() == name:
                return content
        return None

    def has_room(self, size: int) -> bool:
        """Whether the disk has room for files of `size` bytes and an entry."""
        return self._folder is None or free_bytes(self._folder) >= size + LEAST_ROOM


@contextlib.contextmanager
def storing(folder: Path | None, outcome: str) -> Iterator[None]:
    """Write files that follow on a committed entry.

    Args:
        folder: the ledger's.
        outcome: what is true of the charge where they cannot be written, for the sentence.

    Raises:
        RefusalError: E216, the disk does not take them.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise disk_full(folder, outcome) from None
        raise RefusalError(
            f"The disk of this site cannot be written ({error.strerror}). {outcome}",
            code=ErrorCode.LEDGER_UNAVAILABLE,
        ) from None


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def disk_full(folder: Path | None, outcome: str) -> RefusalError:
    """RefusalError E216. outcome: what is true of the charge."""
    return RefusalError(
        f"The disk of this site is full: {folder} has no room left. {outcome} Free space there; "
        "the site then goes on.",
        code=ErrorCode.LEDGER_UNAVAILABLE,
    )
