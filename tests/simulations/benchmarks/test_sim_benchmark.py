"""bench-sim without its rivals: medians, ratios, the comparison of weights, the contract."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from silotune.simulations.benchmarks import sim, sim_workload
from silotune.simulations.benchmarks.sim import Block

FIRST = {"head.weight": [[0.0, 0.0]], "q.lora_A": [[1.0, 0.0]], "q.lora_B": [[0.0], [0.0]]}


def block(*marks: float, **more: int) -> Block:
    return {"marks": list(marks), "memory": {"peak": 200_000_000, "code": 50_000_000}, **more}


def weights(**changed: list[list[float]]) -> sim_workload.Weights:
    return {n: np.array(changed.get(n.split(".")[-1], v), np.float32) for n, v in FIRST.items()}


def test_the_first_round_stands_apart_and_counts_in_the_whole() -> None:
    found = sim.cell(
        [
            block(10.0, 14.0, 20.0, model=90_000_000, data=10_000_000),
            block(30.0, 35.0, 43.0, model=90_000_000, data=10_000_000),
        ]
    )
    assert found == {
        "rounds": 4,
        "first": 20.0,
        "round": 5.5,
        "least": 4.0,
        "most": 8.0,
        "client_round": 0.275,
        "whole": round((20.0 + 19 * 5.5) / 400, 5),
        "a_second": round(20 / 5.5, 5),
        "memory_mb": 200.0,
        "code_mb": 50.0,
        "model_and_data_mb": 100.0,
    }
    assert "model_and_data_mb" not in sim.cell([block(10.0, 14.0)])


MEASURE = """
import json
import numpy as np
from silotune.simulations.benchmarks.sim_workload import Memory
memory = Memory()
held = np.ones(50_000_000, np.uint8)
print(json.dumps(memory.found()))
"""


def test_memory_tells_the_libraries_code_from_the_rest() -> None:
    """In a process of its own: what earlier tests freed could be given back meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["peak"] >= found["after"] > 40_000_000
    assert found["code"] < 10_000_000


def test_ratios_are_ours_over_theirs() -> None:
    seconds = {
        "ours": 1.0,
        "ours-queues": 1.5,
        "ours-float32": 2.0,
        "ours-dp": 3.0,
        "stock": 20.0,
        "pfl": 4.0,
        "pfl-bf16": 2.5,
    }
    assert set(seconds) == set(sim.MODULES)
    found = sim.ratios(
        {
            f"{side}/{case}": sim.cell([block(5.0, 5.0 + each, model=90_000_000, data=10_000_000)])
            for side, each in seconds.items()
            for case in sim.CASES
        }
    )
    expected = {
        "time/stock": 0.05,
        "time/pfl": 0.25,
        "time/pfl-bf16": 0.4,
        "float32/pfl": 0.5,
        "ours-queues/ours": 1.5,
        "ours-dp/ours": 3.0,
        "memory": 2.0,
        "memory/stock": 1.0,
    }
    for name, value in expected.items():
        for case in sim.CASES:
            assert found[f"{name}/{case}"] == pytest.approx(value)
    assert found["memory/adapter/data"] == 1.5
    assert found["whole/pfl/head"] == pytest.approx((5 + 19) / (5 + 19 * 4), abs=1e-3)


def test_the_table_has_a_line_for_each_cell() -> None:
    found = sim.cell([block(20.0, 24.0)])
    head, *lines = sim.table({"ours/head": found, "stock/head": found})
    assert head.split()[:2] == ["first", "round"]
    assert [line.split()[:3] for line in lines] == [
        ["ours/head", "20", "4"],
        ["stock/head", "20", "4"],
    ]


def test_weights_differ_by_so_much_of_the_way() -> None:
    first, right = weights(), weights(weight=[[3.0, 4.0]], lora_B=[[2.0], [0.0]])
    found = weights(weight=[[3.0, 4.5]], lora_B=[[2.0], [0.0]], lora_A=[[1.0, 0.25]])
    assert sim.differences(found, right, first) == {"head": 0.1, "lora_B": 0.0, "lora_A": 0.25}
    del found["q.lora_A"]
    with pytest.raises(ValueError, match=r"q\.lora_A"):
        sim.differences(found, right, first)


def lay_weights(folder: Path, **changed: dict[str, list[list[float]]]) -> None:
    right = {"weight": [[3.0, 4.0]], "lora_B": [[2.0], [0.0]]}
    for case in sim.CASES:
        sim_workload.keep(folder / case, weights())
        for side in sim.MODULES:
            found = weights(**(right | changed.get(side, {})))
            sim_workload.keep(folder / f"{side}-{case}", found)


def test_a_side_that_makes_another_step_stops_it(tmp_path: Path) -> None:
    lay_weights(tmp_path, ours={"weight": [[3.0, 4.05]]})
    agreed = sim.agreement(tmp_path)
    assert agreed["ours/adapter/head"] == pytest.approx(0.01)
    assert agreed["stock/head/lora_B"] == 0
    assert not any(name.startswith(("pfl/", "ours-dp/")) for name in agreed)
    lay_weights(tmp_path, stock={"weight": [[3.0, 4.05]]})  # float32: it has no excuse
    with pytest.raises(ValueError, match="stock/head made another step"):
        sim.agreement(tmp_path)


def test_nothing_agrees_where_nothing_moves(tmp_path: Path) -> None:
    still = {"weight": [[0.0, 0.0]], "lora_B": [[0.0], [0.0]]}
    lay_weights(tmp_path, **dict.fromkeys(sim.MODULES, still))
    with pytest.raises(ValueError, match="nothing has moved"):
        sim.agreement(tmp_path)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("case", sim.CASES)
def test_the_contract_is_one_step_over_all_texts(case: str, private: bool) -> None:
    contract = sim_workload.contract("0" * 64, case, 3, private=private)
    assert contract.rounds == 3
    assert len(contract.sites) == sim.CLIENTS
    assert contract.privacy.mode == ("dp" if private else "none")
    assert contract.privacy.expected_units == sim.TEXTS
    assert (contract.adapter is not None) == (case == sim.ADAPTER)
    (phase,) = contract.phases
    assert (phase.sampling_rate, phase.local_steps, phase.adam) == (1.0, 1, None)
    assert contract.aggregation.server_momentum == 0
