"""Room for the frozen layers' outputs: memory, or a file that no other user can open.

The outputs are as private as the records. The file has mode 0600 and no name, so it takes up
nothing and shows nothing once the process has ended, however it ended.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from silotune.common.errors import DataError, ErrorCode


def allocate(
    rows: int, columns: int, dtype: torch.dtype, *, most_bytes: int, folder: Path | None
) -> Tensor:
    """Zeros [rows, columns], in a file in `folder` (None: the system's for temporary files) when
    they are more than `most_bytes`. DataError if the disk has no room for them.
    """
    size = rows * columns * dtype.itemsize
    if size <= most_bytes:
        return torch.zeros(rows, columns, dtype=dtype)
    place = folder or Path(tempfile.gettempdir())
    try:
        file = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, size)  # now, and not as a signal in the middle of a write
            memory = mmap.mmap(file, size)
        finally:
            os.close(file)
    except OSError as error:
        raise DataError(
            f"The frozen layers' outputs need a file of {size >> 20:,} MB in {place}, which cannot "
            f"be had: {error.strerror}. Make room there, name another folder "
            "(performance.cache_folder), or allow more memory (performance.cache_megabytes).",
            code=ErrorCode.NO_ROOM_FOR_CACHE,
        ) from None
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)
