"""A table that nobody has seen, in three commands, to a federated adapter."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from silotune.common import contract as contracts
from silotune.common.errors import DataError, UsageError
from silotune.simulations.recipe import own_recipe
from silotune.simulations.split import of_file

Ran = tuple[int, str, str]
SILOTUNE = Path(sys.executable).parent / "silotune"
ANSWERS = [
    "--task", "classification", "--label", "status", "--labels", "good,bad",
    "--column", "age: 25, 30, 40", "--column", "home: rent, own",
    "--site", "bank-a", "--site", "bank-b", "--site", "bank-c", "--records", "100",
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Loans of three branches, whose owners' numbers stand twice; and columns that a simulation
    has names of its own for."""
    rng = np.random.default_rng(5)
    rows = []
    for number in range(240):
        age, home = int(rng.integers(18, 61)), ("rent", "own")[rng.integers(2)]
        bad = rng.random() < 0.1 + 0.5 * (age < 30) + 0.3 * (home == "rent")
        branch = f"bank-{'abc'[rng.integers(3)]}"
        rows.append([number // 2, age, home, branch, "x", "train", "bad" if bad else "good"])
    path = tmp_path / "loans.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        header = ["owner", "age", "home", "branch", "site", "split", "status"]
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def contract_of(run: Callable[..., Ran]) -> Callable[..., Path]:
    """contract_of(table, *answers): the contract's file, beside the table."""

    def draft(table: Path, *more: str) -> Path:
        out = table.with_suffix(".toml")
        code, _, wrong = run("contract", "new", "--from", table, "--out", out, *ANSWERS, *more)
        assert code == 0, wrong
        return out

    return draft


def test_three_commands(table: Path) -> None:
    for words in (
        ["contract", "new", "--from", "loans.csv", "--out", "loans.toml", *ANSWERS],
        ["contract", "validate", "loans.toml"],
        ["sim", "run", "loans.toml", "data=loans.csv", "site_column=branch", "repeats=1",
         "cheap_repeats=1", "arms=pooled-no-dp", "--out", "run", "--json"],
    ):
        done = subprocess.run([SILOTUNE, *words], cwd=table.parent, capture_output=True, text=True,
                              timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert {s["site"] for s in result["data"]["sites"]} == {"bank-a", "bank-b", "bank-c"}
    federated = next(arm for arm in result["arms"] if arm["main"])
    assert federated["metrics"]["auc"]["mean"] > 0.6
    assert max(s["epsilon"] for s in result["privacy"]["sites"]) <= 8.0
    adapter = load_file(table.parent / "run/arms/federated-lora-0/adapter.safetensors")
    assert adapter["head.weight"].shape == (2, 8)
    assert adapter["head.weight"].any()


@pytest.mark.parametrize("column", ["branch", None])
def test_rows_are_split_by_entity(
    table: Path, tmp_path: Path, contract_of: Callable[..., Path], column: str | None
) -> None:
    """An owner's rows are all public or none; drawn sites also keep an owner together."""
    contract = contracts.load(contract_of(table, "--entity", "owner", "--cap", "2"))
    counts = of_file(table, contract, column, tmp_path / "split").counts
    assert sum(int(c["train"]) + int(c["test"]) for c in counts) == 240
    owners: dict[str, set[str]] = {}
    for part in ("train", "test"):
        for file in (tmp_path / "split" / part).glob("*.csv"):
            with file.open(newline="", encoding="utf-8") as lines:
                found = list(csv.DictReader(lines))
            assert {row["site"] for row in found} == {"x"}  # a column of the table's own
            owners.setdefault(f"{part}/{file.stem}", set()).update(row["owner"] for row in found)
    for site in contract.weights():
        assert not owners[f"train/{site}"] & owners[f"test/{site}"]
    if column is None:
        drawn = [owners[f"train/{s}"] | owners[f"test/{s}"] for s in contract.weights()]
        assert sum(map(len, drawn)) == len(set().union(*drawn))


@pytest.mark.parametrize(("labels", "metric"), [("good,bad", "auc"), ("good,bad,odd", "accuracy")])
def test_the_figure_is_one_that_the_task_has(
    table: Path, contract_of: Callable[..., Path], labels: str, metric: str
) -> None:
    found = own_recipe(contract_of(table, "--labels", labels), table, None)
    assert found.facts["metric"] == metric


def test_what_does_not_fit(
    table: Path, tmp_path: Path, contract_of: Callable[..., Path], run: Callable[..., Ran]
) -> None:
    contract = contracts.load(contract_of(table))
    with pytest.raises(DataError, match="Column 'brunch' is not in") as error:
        of_file(table, contract, "brunch", tmp_path / "split")
    assert "Did you mean 'branch'?" in error.value.local
    with pytest.raises(DataError, match="of a site of the contract: bank-a, bank-b, bank-c"):
        of_file(table, contract, "home", tmp_path / "split")
    with pytest.raises(UsageError, match="is no file"):
        own_recipe(table.with_suffix(".toml"), tmp_path / "none.csv", None)
    code, _, wrong = run("sim", "run", table.with_suffix(".toml"))
    assert code == 2
    assert "name its table" in wrong
