"""The same ServerApp, relay and worker over a real SuperLink: TLS, node keys, two SuperNodes.

Two hospitals, two rounds, noise off: the adapter must equal the one the in-process path gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.models.factory import build
from silotune.server.flower.app_bundle import write_app
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore
from tests.system.seeded_worker import SEED

SITES = ("north", "south")


def in_process(
    contract: Contract, files: dict[str, Path], model: Path, folder: Path
) -> FederatedRun:
    workers = [
        Worker(
            permissive_policy(contract, s, files[s], model),
            contract,
            PrivacyLedger.in_memory(s),
            insecure_seed=SEED,
        )
        for s in SITES
    ]
    run = FederatedRun(
        contract,
        RunStore.create(folder, contract),
        "reference",
        build(contract, model).initial_arrays(),
    )
    handles = {worker.policy.name: worker.handle for worker in workers}
    while not run.done:
        drive_round(run.stages(SITES), handles)
    return run


@pytest.mark.system
def test_two_supernodes_give_the_adapter_of_the_in_process_path(
    lora_contract: Contract,
    encoder_folder: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    federation: Any,
) -> None:
    contract = lora_contract.changed(privacy={"mode": "none"})
    files = {s: write_rows(tmp_path / s / "rows.csv", 40, seed=i) for i, s in enumerate(SITES)}
    contract_file = tmp_path / "contract.json"
    contract_file.write_text(contract.model_dump_json())
    reference = in_process(contract, files, encoder_folder, tmp_path / "reference")

    for site in SITES:
        federation.start_site(site, contract_file, files[site], model=encoder_folder)
    for site in SITES:
        assert federation.wait_until_ready(site).stat().st_mode & 0o077 == 0
    app = write_app(
        tmp_path / "app",
        contract=contract_file,
        model=encoder_folder,
        run="deployed",
        runs=tmp_path / "runs",
    )
    federation.flwr("run", app, "tls")
    done = tmp_path / "runs" / "deployed" / "adapter.safetensors"
    federation.wait_for(done.exists, 180, "the run's adapter", "superlink.log")

    found = RunStore(tmp_path / "runs" / "deployed").adapter()
    assert found.keys() == reference.registry.adapter().keys()
    for name, array in reference.registry.adapter().items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    # It trained: a run that does nothing would also agree with itself.
    start_arrays = build(contract, encoder_folder).initial_arrays()
    assert any((found[n] != start_arrays[n]).any() for n in found if n.endswith("lora_B"))
    events = (tmp_path / "runs" / "deployed" / "events.jsonl").read_text()
    assert len(re.findall('"committed"', events)) == contract.rounds
    assert "rejected" not in events
