"""Whether the server's disk has room for a run, and the error if it has not."""

from __future__ import annotations

import shutil
from pathlib import Path

from silotune.common.errors import ErrorCode, RunError
from silotune.common.runtime.atomic_files import is_full

LEAST_FREE = 1 << 20  # bytes


def no_room(folder: Path, error: BaseException | None = None) -> RunError | None:
    """RunError E604 if `error` says that a disk is full, or the folder's disk is; None otherwise.

    A full disk also shows as other errors: Flower's SuperLink cannot write its database, or a
    process ends before it can say why.
    """
    free = shutil.disk_usage(folder).free
    if not (error is not None and is_full(error)) and free >= LEAST_FREE:
        return None
    return RunError(
        f"The disk of {folder} is full ({free >> 20} MB free). What was committed is kept and "
        "nothing more is asked of the sites: free space, then resume the run.",
        code=ErrorCode.DISK_FULL,
    )
