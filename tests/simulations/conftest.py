"""What the tests of comparisons and studies share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from silotune.simulations.comparison import run as run_module
from silotune.simulations.execution import worker_pool
from silotune.simulations.execution.variants import Job
from silotune.simulations.study import study as studies


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that studies have run, in the order in which they were given out."""
    found: list[Job] = []
    original = studies.run_jobs

    def counted(jobs: list[Job], *args: Any) -> Any:
        found.extend(jobs)
        return original(jobs, *args)

    monkeypatch.setattr(studies, "run_jobs", counted)
    return found


class InProcess:
    """A pool of processes that are this one: starting some takes longer than what they do here."""

    def __init__(self, *_: object, initargs: tuple[Any, int], **__: object) -> None:
        worker_pool._channel = initargs[0]

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        worker_pool._channel = None

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except (Exception, KeyboardInterrupt) as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "ProcessPoolExecutor", InProcess)
