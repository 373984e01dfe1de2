"""Reading a file whose place another user can change."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from silotune.common.errors import UsageError

LARGEST_FILE = 1 << 20


class Plain(NamedTuple):
    data: bytes
    changed: float  # seconds since 1970


def read_plain(path: Path, owner: int | None = None, most: int = LARGEST_FILE) -> Plain:
    """A plain file of at most `most` bytes, of `owner` if given; UsageError otherwise.

    Root must not be led to others: no link is followed, and opening a pipe does not wait.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise UsageError(f"{path} must be a plain file.")
            # A file that is replaced at this moment has no name left; one with two has another.
            if owner is not None and (facts.st_uid != owner or facts.st_nlink > 1):
                raise UsageError(f"{path} must be a plain file that belongs to the worker's user.")
            data = file.read(most + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > most:
        raise UsageError(f"{path} is larger than {most} bytes.")
    return Plain(data, facts.st_mtime)
