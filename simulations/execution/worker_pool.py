"""What runs in a pool process. Torch loads only there, so the process that watches stays small."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from typing import Any

from silotune.simulations.execution.variants import Job, JobResult

_channel: Any = None


def start(channel: Any, threads: int) -> None:
    """Initialise a pool process: where its progress goes, and how many cores it may use."""
    global _channel  # noqa: PLW0603 - one queue a process, given once at its start
    _channel = channel
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """However the parent ends, also by a kill, this process does not outlive it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def check(jobs: Sequence[Job]) -> None:
    """SilotuneError for the first job that every site would refuse, before anything is computed."""
    from silotune.client.operations import contract_check

    for job in jobs:
        for problem in contract_check.problems(job.contract, job.model_folder, job.performance):
            raise problem


def work(job: Job) -> JobResult:
    """Run one job, with its progress sent through the pool's queue."""
    from silotune.simulations.execution.job import run_job

    return run_job(
        job, lambda j, facts: _channel.put((j.variant, j.repeat, j.cost_of(facts.round), facts))
    )
