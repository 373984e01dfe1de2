"""Secure aggregation over a real SuperLink with TLS: five SuperNodes, of which two are killed.

One dies after the shares (stage 2), one after its masked update (stage 3). With a threshold of
three the sum still opens, and it is that of the four updates that were sent.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.models.factory import build
from silotune.common.protocol import packing
from silotune.common.protocol.messages import Arrays
from silotune.server.flower.app_bundle import write_app
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore
from tests.system.seeded_worker import SEED

SITES = ("a", "b", "c", "d", "e")
STOPS = {"d": "train", "e": "endorse"}  # the first request that it does not live to answer


def unmasked(contract: Contract, files: dict[str, Path], folder: Path, sites: str) -> Arrays:
    """What these sites' updates come to, in the clear and in this process."""
    plain = contract.changed(secure_aggregation=None, sites=[{"name": s} for s in SITES])
    workers = {
        s: Worker(
            permissive_policy(plain, s, files[s], None),
            plain,
            PrivacyLedger.in_memory(s),
            insecure_seed=SEED,
        ).handle
        for s in sites
    }
    run = FederatedRun(
        plain, RunStore.create(folder, plain), "r", build(plain, None).initial_arrays()
    )
    while not run.done:
        drive_round(run.stages(list(workers)), workers)
    return run.registry.adapter()


@pytest.mark.system
def test_the_sum_is_right_though_one_site_dies_before_its_update_and_one_after(
    table_contract: Contract,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    federation: Any,
) -> None:
    keys = {site: Ed25519PrivateKey.generate() for site in SITES}
    contract = table_contract.changed(
        sites=[
            {"name": s, "public_key": k.public_key().public_bytes_raw().hex()}
            for s, k in keys.items()
        ],
        quorum=3,
        secure_aggregation={"threshold": 3, "bound": 4.0},
        deadline_seconds=20.0,
        phases=[{"trains": "head", "rounds": 1, "sampling_rate": 0.5, "head_lr": 0.5}],
    )
    files = {s: write_rows(tmp_path / s / "rows.csv", 60, seed=i) for i, s in enumerate(SITES)}
    contract_file = tmp_path / "contract.json"
    contract_file.write_text(contract.model_dump_json())

    started: dict[str, list[Any]] = {}
    for site, key in keys.items():
        (tmp_path / site / "site.key").write_bytes(key.private_bytes_raw())
        started[site] = federation.start_site(
            site,
            contract_file,
            files[site],
            "--key",
            tmp_path / site / "site.key",
            "--stop-at",
            STOPS.get(site, "nothing"),
            "--marker",
            tmp_path / f"{site}.there",
        )
    for site in SITES:
        federation.wait_until_ready(site)

    def kill_when_there(site: str) -> None:
        marker = tmp_path / f"{site}.there"
        federation.wait_for(marker.exists, 180, f"{site}'s last request", f"{site}-worker.log")
        for process in started[site]:
            federation.kill(process)

    app = write_app(
        tmp_path / "app", contract=contract_file, model=None, run="masked", runs=tmp_path / "runs"
    )
    federation.flwr("run", app, "tls")
    for site in STOPS:
        kill_when_there(site)
    folder = tmp_path / "runs" / "masked"
    federation.wait_for(
        (folder / "adapter.safetensors").exists, 180, "the adapter", "superlink.log"
    )

    for site in STOPS:
        assert {process.wait() for process in started[site]} == {-signal.SIGKILL}
    (facts,) = RunStore(folder).rounds()
    assert facts["sites"] == ["a", "b", "c", "e"]
    assert set(facts["failed"]) == {"d"}
    expected = unmasked(contract, files, tmp_path / "reference", "abce")
    others = unmasked(contract, files, tmp_path / "others", "abc")
    quantum = 1 / packing.factor(contract, 1.0)
    for name, array in RunStore(folder).adapter().items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=4 * quantum)
        assert np.abs(array - others[name]).max() > 100 * quantum  # without e it is another sum
    events = [json.loads(e) for e in (folder / "events.jsonl").read_text().splitlines()]
    assert {e["site"] for e in events if e["event"] == "rejected"} == {"d", "e"}
