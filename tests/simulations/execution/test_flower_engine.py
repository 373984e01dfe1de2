"""Flower's runtime with our backend: it carries every message, and changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context

from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.relay.client_app import relay_app
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.errors import RunError
from silotune.common.models.factory import build
from silotune.server.flower.strategy import SilotuneStrategy
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore
from silotune.simulations.execution.flower_engine import simulate

Rows = Callable[..., Path]


def new_run(contract: Contract, folder: Path) -> FederatedRun:
    return FederatedRun(
        contract, RunStore.create(folder, contract), "r", build(contract, None).initial_arrays()
    )


def new_workers(contract: Contract, write_rows: Rows, folder: Path) -> list[Worker]:
    return [
        Worker(
            permissive_policy(
                contract, s.name, write_rows(folder / f"{s.name}.csv", 60, seed=i), None
            ),
            contract,
            PrivacyLedger.in_memory(s.name),
            insecure_seed=5,
        )
        for i, s in enumerate(contract.sites)
    ]


def node_of(context: Context) -> int:
    return int(str(context.node_config["partition-id"]))


def test_flower_gives_what_direct_calls_give(
    table_contract: Contract, write_rows: Rows, tmp_path: Path
) -> None:
    direct = new_run(table_contract, tmp_path / "direct")
    workers = new_workers(table_contract, write_rows, tmp_path)
    while not direct.done:
        direct.begin()
        for worker in workers:
            wire = direct.request(worker.policy.name)
            direct.accept(worker.policy.name, len(wire), worker.handle(wire))
        direct.finish()

    carried: list[int] = []
    flower = new_run(table_contract, tmp_path / "flower")
    workers = new_workers(table_contract, write_rows, tmp_path)

    def ask(context: Context, wire: bytes) -> bytes:
        carried.append(len(wire))
        return workers[node_of(context)].handle(wire)

    simulate(SilotuneStrategy(flower).start, relay_app(ask), len(workers))
    for name, array in direct.registry.adapter().items():
        np.testing.assert_array_equal(flower.registry.adapter()[name], array)
    assert len(carried) == len(workers) * (table_contract.rounds + 1)  # once to ask who they are
    assert direct.registry.rounds()[0]["bytes_up"] == flower.registry.rounds()[0]["bytes_up"]


def test_a_site_that_fails_is_named_and_the_quorum_decides(
    table_contract: Contract, write_rows: Rows, tmp_path: Path
) -> None:
    def go(contract: Contract, folder: Path) -> FederatedRun:
        workers = new_workers(contract, write_rows, tmp_path)

        def ask(context: Context, wire: bytes) -> bytes:
            worker = workers[node_of(context)]
            if worker.policy.name == "south" and worker.ledger.charges:
                raise ConnectionError("the worker of south is gone")
            return worker.handle(wire)

        run = new_run(contract, folder)
        simulate(SilotuneStrategy(run).start, relay_app(ask), 2)
        return run

    with pytest.raises(RunError, match="south: E401") as error:
        go(table_contract, tmp_path / "strict")
    assert error.value.code == "E402"
    assert not (tmp_path / "strict" / "adapter.safetensors").exists()
    lenient = go(table_contract.changed(quorum=1), tmp_path / "lenient")
    assert lenient.registry.rounds()[-1]["failed"] == {"south": "E401"}


def test_nothing_keeps_running_afterwards(
    table_contract: Contract, write_rows: Rows, tmp_path: Path
) -> None:
    before = threading.active_count()
    workers = new_workers(table_contract, write_rows, tmp_path)
    run = new_run(table_contract, tmp_path / "run")
    client = relay_app(lambda context, wire: workers[node_of(context)].handle(wire))
    simulate(SilotuneStrategy(run).start, client, 2)
    assert threading.active_count() == before
