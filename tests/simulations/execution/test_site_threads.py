"""Simulated sites side by side."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.models.factory import build
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore
from silotune.simulations.execution.site_threads import SiteThreadPool
from tests import tiny
from tests.federation import EXACT, SITES, of_method


def test_a_run_on_three_lanes_is_the_run_on_one(tmp_path: Path) -> None:
    """To the bit: no site's arithmetic meets another's, also where they share weights' names."""
    keys = {site: Keys.in_memory() for site in SITES}
    contract, found = of_method("fedavg", keys), []
    initial = build(contract, tiny.folder_of("bert"), EXACT).initial_arrays()
    for count in (1, 3):
        lanes = SiteThreadPool(SITES, count)
        workers = {}
        for seed, site in enumerate(SITES):
            file = tiny.write(tmp_path / f"{site}.csv", tiny.rows_of("classification", 24, seed))
            policy = permissive_policy(contract, site, file, tiny.folder_of("bert"), EXACT)
            workers[site] = Worker(
                policy,
                contract,
                PrivacyLedger.in_memory(site, keys[site]),
                insecure_seed=seed,
                lane=lanes.of[site],
            )
        assert len({id(worker.model) for worker in workers.values()}) == count
        handles = {site: worker.handle for site, worker in workers.items()}
        run = FederatedRun(contract, RunStore.create(tmp_path / str(count), contract), "r", initial)
        with lanes:
            while not run.done:
                assert not drive_round(
                    run.stages(SITES), handles, partial(lanes.ask, handles)
                ).failed
        found.append(run.registry.adapter())
    assert all(found[0][name].tobytes() == found[1][name].tobytes() for name in initial)


def test_lanes_answer_at_the_same_time_and_in_order() -> None:
    """Each site waits for one of another lane; a failure in one is raised."""
    meet = threading.Barrier(2)
    sites = ("a", "b", "c", "d")

    def answer(wire: bytes) -> bytes:
        meet.wait(timeout=20)
        return wire * 2

    with SiteThreadPool(sites, 2) as lanes:
        asked = {site: site.encode() for site in reversed(sites)}
        found = lanes.ask(dict.fromkeys(sites, answer), asked)
        assert list(found.items()) == [(s, s.encode() * 2) for s in reversed(sites)]

        def broken(wire: bytes) -> bytes:
            raise OSError(wire)

        with pytest.raises(OSError, match="a"):
            lanes.ask(dict.fromkeys(sites, broken), {"a": b"a"})


def test_lanes_leave_the_process_its_cores() -> None:
    def seen() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with SiteThreadPool(("a", "b"), 2) as lanes:
            lanes.ask({"a": lambda wire: wire}, {"a": b""})
        assert (seen(), torch.get_num_threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)
