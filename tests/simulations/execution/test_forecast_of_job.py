"""The forecast of a contract, against what the sites and the server really make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from silotune.common.contract.contract import Contract
from silotune.common.contract.head_facts import forecast_of
from silotune.common.planning.forecast import Forecast
from silotune.simulations.execution.job import run_job
from silotune.simulations.execution.variants import Job

COLUMNS = [f"c{number}" for number in range(120)]
SITES = ["a", "b", "c", "d"]
TESTED = 6_000


def contract_of(records: int) -> Contract:
    return Contract.draft(
        [*COLUMNS, "label"],
        task="classification",
        label="label",
        labels=["0", "1"],
        columns={column: ["x", "y"] for column in COLUMNS},
        sites=SITES,
        records=records,
        epsilon=1.0,
    )


def forecast(contract: Contract) -> Forecast:
    found = forecast_of(contract)
    assert found is not None
    return found


def write_rows(file: Path, records: int, rng: np.random.Generator) -> None:
    """Two classes with an effect of 1: each column shows as much of it."""
    file.parent.mkdir(exist_ok=True, parents=True)
    labels = np.arange(records) % 2
    of_column = 0.5 + (labels[:, None] - 0.5) / (2 * len(COLUMNS) ** 0.5)
    cells = np.where(rng.random((records, len(COLUMNS))) < of_column, "y", "x")
    lines = [",".join([*row, str(label)]) for row, label in zip(cells, labels, strict=True)]
    file.write_text("\n".join([",".join([*COLUMNS, "label"]), *lines]) + "\n")


@pytest.mark.parametrize(("times", "shows"), [(1 / 2, False), (3 / 2, True)])
def test_a_medium_signal_shows_where_the_forecast_says_so(
    tmp_path: Path, times: float, shows: bool
) -> None:
    least = forecast(contract_of(10)).least_units
    assert least is not None
    contract = contract_of(round(times * least))
    found, rng = forecast(contract), np.random.default_rng(3)
    assert found.shows == shows
    for site in SITES:
        write_rows(tmp_path / "train" / f"{site}.csv", round(times * least), rng)
    write_rows(tmp_path / "test" / "all.csv", TESTED, rng)
    job = Job(
        "forecast",
        0,
        contract,
        tmp_path / "run",
        None,
        tmp_path,
        federated=False,
        evaluate_every=contract.rounds,
        insecure_seed=5,
    )
    accuracy = run_job(job, lambda *_: None).scores[""]["accuracy"]
    assert accuracy is not None
    assert accuracy == pytest.approx(found.expected, abs=0.03)
    assert (accuracy - 0.5 > 2 * 0.5 / 1000**0.5) == shows
