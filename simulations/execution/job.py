"""One job in one process: build the sites' workers, run the contract, score the adapter."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.relay.client_app import relay_app
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.contract.task import Language
from silotune.common.errors import ErrorCode, RunError
from silotune.common.models.base import Network
from silotune.common.models.factory import build
from silotune.common.tasks.metrics import Scores
from silotune.server.flower.strategy import SilotuneStrategy
from silotune.server.rounds.evaluation import PublicTest
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun, RoundRecord
from silotune.server.storage.run_store import RunStore
from silotune.simulations.attacks.poisoning import (
    TRIGGERED,
    malicious_sites,
    masking_of,
    poisoned_client,
)
from silotune.simulations.datasets.split import CALIBRATION, TEST, public_files
from silotune.simulations.execution.flower_engine import simulate
from silotune.simulations.execution.site_threads import SiteThreadPool
from silotune.simulations.execution.variants import POOLED, Job, JobResult, Stopped


def run_job(job: Job, on_round: Callable[[Job, RoundRecord], None]) -> JobResult:
    """Carry out one job. Federated jobs go through Flower's simulation runtime. Where training
    diverges the result says so; what else goes wrong is raised."""
    # How many products torch keeps prepared in each thread, by shape (1024 if not said): 45 MB less
    # in bench-sim, and no slower, as oneDNN keeps them also, once for all threads. It is read at
    # a thread's first product.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "4")
    contract = job.contract
    model = build(contract, job.model_folder, job.performance)
    seed = None if job.insecure_seed is None else job.insecure_seed + job.repeat
    lanes = SiteThreadPool(contract.weights(), 1 if job.federated else torch.get_num_threads())
    workers: dict[str, Worker] = {}
    for site in contract.weights():
        policy = permissive_policy(
            contract, site, training_file(job.data, site), job.model_folder, job.performance
        )
        workers[site] = Worker(
            policy,
            contract,
            _ledger(job, site),
            insecure_seed=seed,
            lane=lanes.of[site],
            masking=masking_of(site, contract, job.poison),
        )
        _give_back_freed_memory()
    test = _public_test(model, contract, job.public_files(TEST))
    rounds: list[RoundRecord] = []
    began = time.perf_counter()

    def note(facts: RoundRecord) -> None:
        rounds.append(facts)
        on_round(job, facts)
        _give_back_freed_memory()

    run = FederatedRun(
        contract,
        RunStore.create(job.folder, contract),
        f"{job.variant}-{job.repeat}",
        model.initial_arrays(),
        evaluate=test.metrics,
        evaluate_every=job.evaluate_every,
        on_round=note,
    )
    stopped = None
    try:
        _carry_out(job, run, workers, lanes)
    except RunError as error:
        if error.code != ErrorCode.DIVERGED:
            raise
        stopped = Stopped(error.code, str(error))
    seconds = time.perf_counter() - began
    scores: dict[str, Scores] = {}
    own: dict[str, dict[str, Scores]] = {}
    outputs: Sequence[Any] = ()
    untrained: Sequence[Any] = ()
    calibration = None
    if isinstance(contract.task, Language) and job.keeps_outputs and not job.optional:
        # Of an answer in words there is no constant one to compare with.
        untrained = test.outputs(model.initial_arrays(), adapter_active=False)
    if stopped is None:
        adapter_active = contract.adapter is not None
        released = run.registry.adapter()
        found = test.outputs(released, adapter_active=adapter_active)
        scores, outputs = test.scores_of(found), found if job.keeps_outputs else ()
        if files := job.public_files(CALIBRATION):
            calibration = _public_test(model, contract, files).calibration(
                released, adapter_active=adapter_active
            )
        if calibration is not None:
            calibration.write(job.folder)
        if contract.personal:
            for site, worker in workers.items():
                model_of_site = worker.local_state(run.run_id, contract.rounds + 1).model(released)
                own[site] = test.scores(model_of_site, adapter_active=adapter_active)
        if (job.data / TRIGGERED).is_dir():
            files = public_files(job.data, TRIGGERED)
            triggered = _public_test(model, contract, files)
            scores[TRIGGERED] = triggered.scores(released, adapter_active=adapter_active)[""]
    return JobResult(
        job.variant,
        job.repeat,
        tuple(site.name for site in contract.sites),
        scores,
        tuple(rounds),
        seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        os.getpid(),
        own,
        torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "",
        stopped,
        outputs,
        calibration,
        untrained,
    )


def _carry_out(
    job: Job, run: FederatedRun, workers: dict[str, Worker], lanes: SiteThreadPool
) -> None:
    """All rounds. RunError where the run stops."""
    if job.federated:
        nodes = list(workers.values())
        client = relay_app(
            lambda context, wire: nodes[int(context.node_config["partition-id"])].handle(wire)
        )
        simulate(SilotuneStrategy(run).start, client, len(workers))
        return
    handles: dict[str, Callable[[bytes], bytes]] = {
        site: worker.handle for site, worker in workers.items()
    }
    for site in malicious_sites(job.contract, job.poison):
        assert job.poison is not None
        if job.contract.secure_aggregation is None:
            handles[site] = poisoned_client(handles[site], job.poison)
    with lanes:
        while not run.done:
            drive_round(run.stages(handles), handles, partial(lanes.ask, handles))


def _ledger(job: Job, site: str) -> PrivacyLedger:
    return PrivacyLedger.in_memory(
        site, Keys.in_memory(job.keys[site]) if site in job.keys else None
    )


def _give_back_freed_memory() -> None:
    """Return freed pages to the system: batches of many lengths leave glibc's heap in pieces,
    and a process would keep several times what it uses. Does nothing where there is no glibc.
    """
    if (trim := getattr(_libc(), "malloc_trim", None)) is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c")
    return ctypes.CDLL(name) if name else None


_tests: dict[tuple[int, tuple[Path, ...]], PublicTest] = {}


def _public_test(model: Network, contract: Contract, files: Mapping[str, Path]) -> PublicTest:
    """The public rows, encoded once a process for each model."""
    key = (id(model), tuple(files.values()))
    if key not in _tests:
        _tests[key] = PublicTest(contract, model, files)
    return _tests[key]


def training_file(data: Path, site: str) -> Path:
    """The site's own rows; for the pooled variant the file with the rows of all."""
    return data / ("pooled.csv" if site == POOLED else f"train/{site}.csv")
