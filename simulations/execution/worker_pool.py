"""What runs in a pool process. Torch loads only there, so the process that watches stays small."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

from silotune.common.errors import ErrorCode, SilotuneError
from silotune.simulations.execution.variants import PLAIN, Job, JobResult, Stopped

TRACE = "failure.txt"  # in a run's folder: what went wrong in it unexpectedly

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
    """Run one job, with its progress sent through the pool's queue. What goes wrong in an optional
    one is told by its result."""
    from silotune.simulations.execution.job import run_job
    from silotune.simulations.execution.plain_baseline import run_plain

    began = time.perf_counter()
    try:
        if job.variant == PLAIN:
            return run_plain(job)
        return run_job(
            job, lambda j, facts: _channel.put((j.variant, j.repeat, j.cost_of(facts.round), facts))
        )
    except Exception as error:
        if not job.optional:
            raise
        return JobResult(
            job.variant,
            job.repeat,
            tuple(site.name for site in job.contract.sites),
            {},
            (),
            time.perf_counter() - began,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            os.getpid(),
            stopped=_stopped(job, error),
        )


def _stopped(job: Job, error: Exception) -> Stopped:
    if isinstance(error, SilotuneError):
        return Stopped(error.code, str(error))
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / TRACE).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return Stopped(
        ErrorCode.UNEXPECTED,
        f"An unexpected failure ({type(error).__name__}): {job.folder / TRACE} says where.",
    )
