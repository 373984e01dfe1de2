"""How long a comparison takes: by the last one, and in proportion."""

from __future__ import annotations

from pathlib import Path

import pytest

from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.simulations.comparison.duration import Duration, file_of
from silotune.simulations.execution.variants import Job


def test_twice_the_runs_take_twice_as_long_and_two_processes_half(
    table_contract: Contract, tmp_path: Path
) -> None:
    job = Job(
        "federated-lora", 0, table_contract, tmp_path, None, tmp_path, federated=True,
        evaluate_every=1,
    )  # fmt: skip
    one = Duration.of([job] * 4, 2, 30.0, 2**30, "2026-11-30")
    one.keep(tmp_path / "cache" / "one.json")
    found = Duration.load(tmp_path / "cache" / "one.json")
    assert found == one
    assert found.seconds([job] * 4, 2) == pytest.approx(30.0)
    assert found.seconds([job] * 8, 2) == pytest.approx(60.0)
    assert found.seconds([job] * 4, 4) == pytest.approx(15.0)
    assert found.seconds([job] * 4, 400) == pytest.approx(15.0)  # no more than there are runs


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"seconds_per_cost": "x"}'])
def test_what_cannot_be_read_is_no_estimate(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.json").write_text(text)
    assert Duration.load(tmp_path / "one.json") is None
    assert Duration.load(tmp_path / "none.json") is None


def test_where_nothing_can_be_written_there_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    Duration(1.0, 1, "2026-11-30").keep(tmp_path / "cache" / "one.json")


def test_another_device_or_contract_has_a_duration_of_its_own(table_contract: Contract) -> None:
    files = {
        file_of(contract, performance)
        for contract in (table_contract, table_contract.changed(name="other"))
        for performance in (Performance(), Performance(device="cpu"))
    }
    assert len(files) == 4
