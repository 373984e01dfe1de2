"""The gate on the sum: what public rows speak against is not taken, and nothing of it stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.common.contract.contract import Contract
from silotune.common.errors import ContractError, RunError
from silotune.common.protocol.messages import Arrays
from silotune.server.rounds.public_gate import PublicGateCheck
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore
from tests.server.rounds.test_run import events, filled, on_disk, play, update

BEST = 3.0  # where the made-up metrics are at their best


def gated(contract: Contract, most: float = 0.5, **more: Any) -> Contract:
    aggregation = {"server_momentum": 0.0, "gate": {"metric": "loss", "max_degradation": most}}
    return contract.changed(
        aggregation=aggregation | more,
        phases=[
            {
                "trains": "head",
                "rounds": n,
                "sampling_rate": 0.5,
                "head_lr": 0.5,
                "budget_share": 0.5,
            }
            for n in (6, 2)
        ],
    )


def evaluate(adapter: Arrays, adapter_active: bool) -> dict[str, float | None]:
    """As if the head's bias should be BEST everywhere."""
    off = abs(float(adapter["head.bias"][0]) - BEST)
    return {"loss": off, "calibration": off, "auc": -off, "accuracy": -off}


def begin(contract: Contract, folder: Path, **more: Any) -> FederatedRun:
    registry = RunStore.create(folder, contract)
    return FederatedRun(contract, registry, "run-1", filled(0), **{"evaluate": evaluate} | more)


def bias(run: FederatedRun) -> float:
    return float(run.adapter["head.bias"][0])


@pytest.mark.parametrize("metric", ["loss", "calibration", "auc", "accuracy"])
def test_a_sum_is_taken_up_to_what_the_metric_may_get_worse(
    table_contract: Contract, tmp_path: Path, metric: str
) -> None:
    contract = gated(table_contract, gate={"metric": metric, "max_degradation": 0.5})
    run = begin(contract, tmp_path / "run")
    places = [
        (play(run, north=change, south=change).declined is None, bias(run))
        for change in (2.0, -0.5, -0.625, 1.5, 0.75)
    ]
    assert places == [(True, 2.0), (True, 1.5), (False, 1.5), (True, 3.0), (False, 3.0)]


def test_of_a_declined_sum_nothing_stays_but_what_it_cost(
    table_contract: Contract, tmp_path: Path
) -> None:
    adaptive = table_contract.changed(privacy={"adaptive": {}})
    run = begin(gated(adaptive, server_momentum=0.9, averaging_start=0.0), tmp_path / "run")
    half = {"metrics": {"unclipped": 0.5}}
    rounds = []
    for change, header in ((1.0, half), (9.0, {"metrics": {"unclipped": 1.0}}), (0.5, half)):
        run.begin()
        before = run.server_state.state(), run.server_state.standing(), run.adapter, run.released()
        for site in ("north", "south"):
            run.accept(site, 10, update(run, site, change, **header))
        rounds.append(run.finish())
        if change == 9.0:
            after = (
                run.server_state.state(),
                run.server_state.standing(),
                run.adapter,
                run.released(),
            )
            assert after[1:] == before[1:]
            assert {n for n in before[0] if n not in after[0]} == {
                "velocity/head.bias",
                "velocity/head.weight",
            }
    taken, declined, later = rounds
    assert taken.declined is later.declined is None
    assert declined.declined == (
        "loss on public rows would go from 2 to 7.9, which is worse by more than 0.5: the sum was "
        "not taken, its ε stays spent"
    )
    assert declined.epsilon == {"north": 1.0, "south": 1.0}
    assert [(e["round"], e["why"]) for e in events(run, "declined")] == [(2, declined.declined)]
    assert [e["round"] for e in events(run, "committed")] == on_disk(run) == [1, 2, 3]
    stored = run.registry.rounds()
    assert stored[1]["declined"] == declined.declined
    assert stored[0]["sha256"]["adapter.safetensors"] == stored[1]["sha256"]["adapter.safetensors"]
    # The mean of the two that were taken, the second without the momentum of the first.
    np.testing.assert_allclose(run.released()["head.bias"], (1.0 + 1.5) / 2)


@pytest.mark.parametrize("adaptive", [None, {"kind": "adam", "lr": 2.0, "beta1": 0.9}])
def test_a_momentum_that_leads_past_the_gate_is_not_kept(
    table_contract: Contract, tmp_path: Path, adaptive: dict[str, Any] | None
) -> None:
    """Or it would have every later round declined, whatever the sites send."""
    run = begin(
        gated(table_contract, 0.1, server_momentum=0.9, server_optimizer=adaptive), tmp_path / "run"
    )
    while run.server_round < 5 and play(run, north=2.0, south=2.0).declined is None:
        pass
    assert events(run, "declined")
    place = bias(run)
    assert play(run, north=0.0, south=0.0).declined is None
    assert bias(run) == place


def test_a_run_that_is_taken_up_again_declines_the_same(
    table_contract: Contract, tmp_path: Path
) -> None:
    contract = gated(table_contract, server_momentum=0.5)
    changes = (2.0, -4.0, 1.0, 1.0, 2.0, -1.0, 0.5, 8.0)
    ends = []
    for killed in (False, True):
        run = begin(contract, tmp_path / f"run-{killed}")
        told = []
        for change in changes:
            told.append(play(run, north=change, south=change).declined)
            if killed:
                run.registry.close()
                registry = RunStore.open(run.registry.folder, contract)
                run = FederatedRun(contract, registry, "run-1", filled(0), evaluate=evaluate)
                run.restore()
        assert run.done
        ends.append((told, run.registry.adapter()["head.bias"].tolist()))
    assert ends[0] == ends[1]
    assert {t is None for t in ends[0][0]} == {True, False}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_cannot_be_scored_is_not_taken(
    table_contract: Contract, tmp_path: Path, value: float | None
) -> None:
    def broken(adapter: Arrays, adapter_active: bool) -> dict[str, float | None]:
        return {"loss": 1.0 if adapter["head.bias"][0] == 0 else value}

    run = begin(gated(table_contract), tmp_path / "run", evaluate=broken)
    assert play(run, north=1.0, south=1.0).declined is not None
    assert bias(run) == 0


def test_each_phase_is_held_to_what_it_begins_with(table_contract: Contract) -> None:
    """With layers adapted the same tensors may score otherwise."""
    asked: list[tuple[float, bool]] = []

    def noted(adapter: Arrays, adapter_active: bool) -> dict[str, float | None]:
        asked.append((float(adapter["head.bias"][0]), adapter_active))
        return {"loss": float(adapter_active)}

    before, after = filled(0), filled(1)
    acceptance = PublicGateCheck(gated(table_contract), noted, before)
    assert acceptance.rejection_reason(before, after, False) is None
    assert acceptance.rejection_reason(after, filled(2), True) is None
    assert acceptance.rejection_reason(after, last := filled(3), False) is None
    assert acceptance.rejection_reason(last, filled(4), False) is None  # what is in place is known
    assert asked == [
        (0, False),
        (1, False),
        (1, True),
        (2, True),
        (1, False),
        (3, False),
        (4, False),
    ]


def test_a_gate_needs_public_rows_that_define_its_metric(
    table_contract: Contract, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="--test FILE") as caught:
        begin(gated(table_contract), tmp_path / "none", evaluate=None)
    assert caught.value.code == "E301"
    for at, value in enumerate((None, math.nan, math.inf)):
        with pytest.raises(RunError, match="do not define loss"):
            begin(
                gated(table_contract), tmp_path / str(at), evaluate=lambda *_, v=value: {"loss": v}
            )


def test_a_contract_without_a_gate_keeps_its_hash(table_contract: Contract) -> None:
    assert table_contract.changed(aggregation={"gate": None}).hash == table_contract.hash
    assert gated(table_contract).hash != gated(table_contract, gate=None).hash


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ({"metric": "rmse", "max_degradation": 0.1}, "gate.metric must be one of auc"),
        ({"metric": "loss", "max_degradation": -0.1}, "max_degradation"),
        ({"metric": "loss", "max_degradation": math.nan}, "max_degradation"),
        ({"metric": "loss"}, "max_degradation"),
        ({"metric": "loss", "max_degradation": 0.1, "patience": 2}, "patience"),
    ],
)
def test_impossible_gates_are_refused(
    table_contract: Contract, gate: dict[str, Any], why: str
) -> None:
    with pytest.raises(ContractError, match=why):
        table_contract.changed(aggregation={"gate": gate})
