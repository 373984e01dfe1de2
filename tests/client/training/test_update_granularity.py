"""An attack that once worked: a sum of few possible values, weighted, tells every one of them.

A server shifts all entries of the head by a constant, which softmax does not see. If a site's
change is a difference of float32 weights, it then lies on a grid as coarse as it likes, and of
sum_i w_i x_i with public weights only one choice of the x_i fits: the masks cancel honestly, and
yet each site's update is read out of their sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.training.local_round import train_round
from silotune.client.worker import worker as workers
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.models.factory import build
from silotune.common.protocol import messages, packing
from silotune.common.protocol.messages import Arrays, Message, Train
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore

WEIGHTS = {"north": 1203.0, "south": 877.0, "east": 1540.0}
SHIFT = np.float32(6e5)
GRID = float(np.spacing(SHIFT))
MOST = 6  # steps of the grid that a change may be away from zero


def as_differences(*arguments: Any) -> tuple[Arrays, Any]:
    """What a site sent before: weights after training less weights before."""
    change, metrics = train_round(*arguments)
    before = arguments[5]
    return {
        name: np.subtract(before[name] + moved, before[name], dtype=np.float32)
        for name, moved in change.items()
    }, metrics


def told_of(
    contract: Contract,
    folder: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> float:
    """The part of all entries of which the server can tell every site's value from the sum."""
    keys = {site: Keys.in_memory() for site in WEIGHTS}
    contract = contract.changed(
        sites=[{"name": s, "public_key": keys[s].public, "weight": w} for s, w in WEIGHTS.items()],
        quorum=3,
        secure_aggregation={},
        phases=[{"trains": "head", "rounds": 1, "sampling_rate": 0.5, "head_lr": 0.5}],
    )
    sent: list[packing.Vector] = []
    join = packing.join

    def overheard(*arguments: Any) -> packing.Vector:
        sent.append(join(*arguments))
        return sent[-1]

    monkeypatch.setattr(packing, "join", overheard)
    handles = {}
    for at, site in enumerate(WEIGHTS):
        file = write_rows(folder / f"{site}.csv", 60, seed=at)
        policy = permissive_policy(contract, site, file, None)
        handles[site] = Worker(policy, contract, PrivacyLedger.in_memory(site, keys[site])).handle
    shifted = {n: a + SHIFT for n, a in build(contract, None).initial_arrays().items()}
    run = FederatedRun(contract, RunStore.create(folder / "run", contract), "run-1", shifted)
    seen: list[Arrays] = []
    finish = run.finish
    monkeypatch.setattr(run, "finish", lambda mean: seen.append(mean[0]) or finish(mean))
    drive_round(run.stages(list(WEIGHTS)), handles)

    # The server: which steps of the grid give this sum, to the ring's last digit?
    factors = [packing.factor(contract, contract.weight_share(site)) for site in WEIGHTS]
    steps = np.array(list(itertools.product(range(-MOST, MOST + 1), repeat=len(WEIGHTS))))
    sums = sum(np.rint(steps[:, i] * GRID * f) for i, f in enumerate(factors))
    mean = np.concatenate([seen[0][name].ravel() for name in sorted(seen[0])])
    units = np.rint(mean * packing.factor(contract, 1.0))
    found = 0
    for entry, unit in enumerate(units):
        hits = steps[np.abs(sums - unit) <= 1]
        guess = min(hits, key=lambda hit: float((hit**2).sum()), default=np.zeros(3)) * GRID
        found += bool(np.allclose(guess, [x[entry] for x in sent], rtol=0, atol=GRID / 100))
    return found / len(units)


def test_a_weighted_sum_tells_no_sites_update(
    table_contract: Contract,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert told_of(table_contract, tmp_path, write_rows, monkeypatch) == 0


def test_differences_of_weights_would_give_every_site_away(
    table_contract: Contract,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "train_round", as_differences)
    assert told_of(table_contract, tmp_path, write_rows, monkeypatch) > 0.8


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("pull", [0.5, 1.0])
def test_no_weights_of_a_server_put_a_copys_change_on_a_coarse_grid(
    pull: float,
    steps: int,
    table_contract: Contract,
    tmp_path: Path,
    write_rows: Callable[..., Path],
) -> None:
    """A copy is pulled to the server's weights by up to the whole way, so what it sends is as large
    as they are far: beyond the bound, or with the noise's own digits. (With a pull of more than
    once the way two steps would cancel, and leave the grid alone: contracts refuse that.)"""
    keys = Keys.in_memory()
    contract = table_contract.changed(
        sites=[{"name": "north", "public_key": keys.public}],
        quorum=1,
        aggregation={"server_momentum": 0.0},
        phases=[
            {
                "trains": "head",
                "rounds": 2,
                "sampling_rate": 0.5,
                "head_lr": 2.0,
                "local_steps": steps,
                "personal": "mean-regularised",
                "proximal_mu": pull / 2.0,
            }
        ],
    )
    policy = permissive_policy(contract, "north", write_rows(tmp_path / "north.csv", 60), None)
    for shift in (1.0, 12.0, 3e4):
        worker = Worker(policy, contract, PrivacyLedger.in_memory("north", keys), insecure_seed=1)
        start = build(contract, None).initial_arrays()
        for number, arrays in (
            (1, start),
            (2, {n: a + np.float32(shift) for n, a in start.items()}),
        ):
            header = Train(contract=contract.hash, run="r", round=number)
            reply = messages.unpack(worker.handle(messages.pack(Message(header, arrays))))
        sent = np.concatenate([a.ravel() for a in reply.arrays.values()])
        assert (np.abs(sent) > 16).all() or len(np.unique(sent)) == len(sent)
