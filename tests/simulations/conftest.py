"""What the tests of studies share."""

from __future__ import annotations

from typing import Any

import pytest

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
