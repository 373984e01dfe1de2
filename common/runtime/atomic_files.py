"""Files that after a crash are the old one or the new one, whole."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file, readable by this user alone (0600). On disk when it returns."""
    half = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rename_durably(half, path)
    finally:
        half.unlink(missing_ok=True)


def rename_durably(half: Path, path: Path) -> None:
    """Give a file or folder, whose content is on disk, its name."""
    half.rename(path)
    sync(path.parent)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a quota on it, is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names are in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
