"""bench-rounds without its processes: the medians, the ratios, the table, the two sides' files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from silotune.common.contract.contract import Contract
from silotune.simulations.benchmarks import rounds
from silotune.simulations.benchmarks.federation import Case, contract_of
from silotune.simulations.benchmarks.rounds import CASES, MASKED, Block


def test_a_blocks_first_round_stands_apart() -> None:
    found = rounds.cell(
        [
            Block([20.0, 4.0, 6.0], [0.5, 1.0, 1.0], [9.0, 2.0, 3.0]),
            Block([30.0, 5.0, 8.0], [0.5, 1.0, 2.0], [9.0, 2.0, 5.0]),
        ]
    )
    assert found == {
        "rounds": 4,
        "first": 25.0,
        "round": 5.5,
        "training": 1.0,
        "overhead": 4.5,
        "least": 3.0,
        "most": 6.0,
        "cpu": 2.5,
    }


def test_ratios_say_how_overhead_grows_and_what_ours_is_of_stocks() -> None:
    cells = {
        label: {"overhead": overhead, "cpu": 1.0}
        for label, overhead in (
            ("ours/MiniLM", 4.0),
            ("ours/SmolLM2", 5.0),
            ("stock/MiniLM", 10.0),
            ("stock/SmolLM2", 20.0),
        )
    }
    found = {n: r for n, r in rounds.ratios(cells).items() if n.startswith("overhead/")}
    assert found == {
        "overhead/ours/SmolLM2/MiniLM": 1.25,
        "overhead/stock/SmolLM2/MiniLM": 2.0,
        "overhead/ours/stock/MiniLM": 0.4,
        "overhead/ours/stock/SmolLM2": 0.25,
    }


def test_the_table_has_a_line_for_each_cell_below_its_heads() -> None:
    found = rounds.cell([Block([20.0, 4.0], [0.5, 1.0], [9.0, 2.0])])
    head, *lines = rounds.table({"ours/MiniLM": found, "stock/MiniLM": found})
    assert head.split() == [
        "first",
        "round",
        "training",
        "overhead",
        "least",
        "most",
        "cpu",
        "seconds",
    ]
    assert [line.split()[:5] for line in lines] == [
        ["ours/MiniLM", "20.00", "4.00", "1.00", "3.00"],
        ["stock/MiniLM", "20.00", "4.00", "1.00", "3.00"],
    ]


def test_a_round_is_done_when_it_is_committed(tmp_path: Path) -> None:
    marks = tmp_path / "events.jsonl"
    assert not rounds.reached(marks, 1)
    events = ((1.0, "run"), (2.5, "committed"), (3.0, "rejected"), (4.5, "committed"))
    marks.write_text("".join(json.dumps({"at": at, "event": e}) + "\n" for at, e in events))
    assert rounds.committed(marks) == [2.5, 4.5]
    assert rounds.reached(marks, 2)
    assert not rounds.reached(marks, 3)


def test_the_stock_app_is_whole(tmp_path: Path) -> None:
    rounds.write_stock(tmp_path / "app", CASES[1], tmp_path / "model", tmp_path / "marks")
    app = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert {path.name for path in (tmp_path / "app").iterdir()} == {
        "pyproject.toml",
        *app["fab-include"],
    }
    assert app["config"] == {
        "model": str(tmp_path / "model"),
        "targets": "q_proj,o_proj",
        "rank": 8,
        "alpha": 16,
        "tokens": 32,
        "rounds": rounds.ROUNDS,
        "marks": str(tmp_path / "marks"),
    }
    code = (tmp_path / "app" / "stock_app.py").read_text()
    assert "silotune" not in code
    for side in app["components"].values():  # Flower looks for just this line
        name = side.removeprefix("stock_app:")
        assert f"\n{name} = {name.title()}App()" in code


@pytest.mark.parametrize("case", [*CASES, MASKED], ids=lambda case: case.label)
def test_the_contract_is_one_step_over_all_records(case: Case, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"{}")
    keys = {site: f"{at:064x}" for at, site in enumerate(case.sites)}
    contract: Contract = contract_of(case, tmp_path, keys, rounds.ROUNDS)
    assert contract.rounds == rounds.ROUNDS
    assert contract.quorum == len(case.sites)
    assert contract.privacy.mode == "none"
    assert (contract.secure_aggregation is not None) == case.masked
