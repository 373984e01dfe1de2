"""A lock between processes that ends with the process that holds it, however it ends (Linux)."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def try_lock(path: Path) -> int | None:
    """Lock a folder, or a file, which is created (0600) if it does not exist.

    Returns:
        The descriptor that holds the lock: closing it gives the lock up. None if another process,
        or another descriptor of this one, holds the lock.
    Raises:
        OSError: if the path cannot be opened; a symbolic link is not followed to a file.
    """
    flags = os.O_DIRECTORY if path.is_dir() else os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
