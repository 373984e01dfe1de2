"""Released metrics: bounded, noised, and paid for out of the steps' own budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silotune.client.privacy.accountant import plan
from silotune.client.training import local_round, released_metrics
from silotune.client.training.noise import NoiseSource
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Message, Refusal, Train, Update

Rows = Callable[..., Path]
MakeWorker = Callable[..., Worker]
RELEASES = [
    {"metric": "loss", "share": 0.1, "bound": 2.0},
    {"metric": "accuracy", "share": 0.05},
]


@pytest.fixture
def measured(table_contract: Contract) -> Contract:
    return table_contract.changed(releases=RELEASES)


def ask(worker: Worker, number: int = 1) -> Update:
    header = Train(contract=worker.contract.hash, run="r", round=number)
    wire = worker.handle(messages.pack(Message(header, worker.model.initial_arrays())))
    found = messages.unpack(wire).header
    assert isinstance(found, Update)
    return found


def test_gradients_and_metrics_together_are_the_mechanism_that_is_charged(
    measured: Contract,
    write_rows: Rows,
    tmp_path: Path,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The noises in units of what one record can move: 1/s^2 must be their 1/s_i^2 together."""
    found: list[float] = []
    optimizer, total = local_round.DPOptimizer, released_metrics.noisy_total

    def spy_optimizer(sgd: Any, *, noise_multiplier: float, **more: Any) -> Any:
        found.append(noise_multiplier)
        return optimizer(sgd, noise_multiplier=noise_multiplier, **more)

    def spy_total(values: Any, bound: float, noise_multiplier: float, source: Any) -> float:
        found.append(noise_multiplier)
        return total(values, bound, noise_multiplier, source)

    monkeypatch.setattr(local_round, "DPOptimizer", spy_optimizer)
    monkeypatch.setattr(released_metrics, "noisy_total", spy_total)
    worker = make_worker(measured, write_rows(tmp_path / "rows.csv", 50))
    ask(worker)
    assert len(found) == 1 + len(RELEASES)
    charged = next(iter(worker.ledger.charges.values())).noise_multiplier
    assert sum(1 / s**2 for s in found) == pytest.approx(1 / charged**2)


def test_metrics_do_not_change_what_the_plan_costs(
    measured: Contract, table_contract: Contract
) -> None:
    assert plan(measured) == plan(table_contract)


@pytest.mark.parametrize("extra", [0.0, 1.0, 5.0, float("inf"), float("nan"), -3.0])
def test_one_record_moves_a_total_by_at_most_the_bound(
    extra: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NoiseSource, "normal", lambda self, shape: np.zeros(shape))
    source = NoiseSource(site="x", insecure_seed=1)
    values = torch.tensor([0.5, 1.5, 9.0])

    def total(*parts: torch.Tensor) -> float:
        return released_metrics.noisy_total(iter(parts), 2.0, 3.0, source)

    assert total(values) == pytest.approx(4.0, abs=0.01)  # the noise's grain
    assert total() == 0.0
    assert 0.0 <= total(values, torch.tensor([extra])) - total(values) <= 2.0


def test_a_total_lies_on_the_grain_whatever_the_values() -> None:
    """Values of many bits and none at all: the numbers that come out have the same form."""
    source = NoiseSource(site="x", insecure_seed=1)
    for values in ([], [torch.rand(100, dtype=torch.float64)], [torch.full((3,), 1 / 3)]):
        for _ in range(50):
            total = released_metrics.noisy_total(iter(values), 2.0, 3.0, source)
            assert (total * 2**8).is_integer()


def test_a_totals_noise_has_the_stated_size() -> None:
    source = NoiseSource(site="x", insecure_seed=1)
    drawn = [released_metrics.noisy_total(iter(()), 2.0, 3.0, source) for _ in range(4000)]
    # The standard deviation of 4,000 draws is known to 1.1%.
    assert np.std(drawn) == pytest.approx(6.0, rel=0.05)
    assert abs(np.mean(drawn)) < 0.4


def test_without_noise_the_metrics_are_the_means_over_the_expected_batch(
    measured: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    contract = measured.changed(
        privacy={"mode": "none"},
        phases=[{"trains": "head", "rounds": 1, "sampling_rate": 1.0, "head_lr": 0.5}],
    )
    rows = 40
    found = ask(make_worker(contract, write_rows(tmp_path / "rows.csv", rows))).metrics
    share = rows / contract.privacy.expected_units
    assert found["loss"] == pytest.approx(share * np.log(2), rel=1e-5)  # the head starts at zero
    assert 0 < found["accuracy"] < share


def test_a_site_that_does_not_permit_a_metric_does_not_start(
    measured: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    worker = make_worker(measured, write_rows(tmp_path / "rows.csv", 40))
    policy = worker.policy.model_copy(
        update={"permits": worker.policy.permits.model_copy(update={"metrics": ("loss",)})}
    )
    assert [r.code for r in policy.refusals(measured)] == ["E206"]


def test_a_metric_that_was_not_agreed_does_not_leave(
    measured: Contract,
    table_contract: Contract,
    write_rows: Rows,
    tmp_path: Path,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_rows(tmp_path / "rows.csv", 40)
    extra: dict[str, float] = {"loss": 0.5}
    original = local_round.train_round
    for contract in (table_contract, measured):
        worker = make_worker(contract, path)
        with monkeypatch.context() as patch:
            patch.setattr(
                "silotune.client.worker.worker.train_round", lambda *a: (original(*a)[0], extra)
            )
            header = Train(contract=contract.hash, run="r", round=1)
            wire = worker.handle(messages.pack(Message(header, worker.model.initial_arrays())))
        found = messages.unpack(wire).header
        assert isinstance(found, Refusal)
        assert found.code == "E502"
