"""Pool processes that do not run the caller's script again.

A process that `multiprocessing` spawns first runs the file of `__main__`, for functions that were
defined there. A script that starts a pool at its top level would then start it again in each of
them, and so has to hide its code behind `if __name__ == "__main__"`. What the pool runs are
functions of this package (worker_pool.py), so its processes leave the script alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

_starting = threading.Lock()


class PoolProcess(SpawnProcess):
    """A spawned process without the `__main__` of its parent."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - the name by which BaseProcess calls it
        with _starting, _main_without_file():
            return SpawnProcess._Popen(process_obj)


class PoolContext(SpawnContext):
    """The context of the pool: processes as of "spawn", but for that."""

    Process = PoolProcess


@contextmanager
def _main_without_file() -> Iterator[None]:
    """`__main__` as it is in an interactive session: `multiprocessing` finds no file or module of
    it to run. Lasts while one process is being started, a few milliseconds."""
    main: dict[str, Any] = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {
        name: main.pop(name) for name in ("__file__", "__spec__") if name in main
    }
    main["__spec__"] = None  # is asked for without a default
    try:
        yield
    finally:
        del main["__spec__"]
        main |= hidden
