"""The worker: a closed set of requests, one charge a round, and nothing else leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from silotune.client.privacy.accountant import Mechanism, epsilon, epsilon_at
from silotune.client.privacy.budget import mechanism_of
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.worker import worker as workers
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.errors import CODES, DataError, ErrorCode, RefusalError
from silotune.common.protocol import messages
from silotune.common.protocol.messages import (
    Describe,
    Description,
    Message,
    Refusal,
    Train,
    Update,
)

Rows = Callable[..., Path]
MakeWorker = Callable[..., Worker]


def history(worker: Worker) -> list[Mechanism]:
    return [mechanism_of(charge) for charge in worker.ledger.charges.values()]


@pytest.fixture
def worker(
    table_contract: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> Worker:
    return make_worker(table_contract, write_rows(tmp_path / "rows.csv", 80), "north")


def ask(
    worker: Worker, round_number: int = 1, attempt: int = 1, run: str = "r", **arrays: np.ndarray
) -> Message:
    return messages.unpack(worker.handle(train(worker, round_number, attempt, run, **arrays)))


def train(
    worker: Worker, round_number: int = 1, attempt: int = 1, run: str = "r", **arrays: np.ndarray
) -> bytes:
    header = Train(contract=worker.contract.hash, run=run, round=round_number, attempt=attempt)
    adapter = worker.model.initial_arrays() | {k.replace("__", "."): v for k, v in arrays.items()}
    return messages.pack(Message(header, adapter))


def refused(reply: Message) -> str:
    assert isinstance(reply.header, Refusal)
    assert not reply.arrays
    return reply.header.code


def test_describe_says_who_and_nothing_more(worker: Worker) -> None:
    wire = messages.pack(Message(Describe(contract=worker.contract.hash, challenge="0" * 64)))
    header = messages.unpack(worker.handle(wire)).header
    assert isinstance(header, Description)
    assert set(header.model_dump()) == {"kind", "contract", "site", "signature"}


def test_the_whole_plan_spends_exactly_its_budget(worker: Worker) -> None:
    spent = []
    for number in (1, 2, 3):
        header = ask(worker, number).header
        assert isinstance(header, Update)
        spent.append(header.epsilon)
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(worker.contract.privacy.epsilon, rel=1e-4)
    assert spent[-1] == pytest.approx(epsilon(history(worker), worker.contract.privacy.delta))


def test_the_same_bytes_cost_nothing_again(worker: Worker) -> None:
    wire = train(worker)
    assert worker.handle(wire) == worker.handle(wire)
    assert len(history(worker)) == 1


def test_a_round_asked_again_with_other_bytes_is_refused(worker: Worker) -> None:
    ask(worker)
    assert refused(ask(worker, head__bias=np.ones(2, np.float32))) == "E202"
    assert len(history(worker)) == 1


def test_another_attempt_is_charged_and_has_fresh_noise(worker: Worker) -> None:
    first, second = ask(worker, 1, 1), ask(worker, 1, 2)
    assert len(history(worker)) == 2
    assert not np.array_equal(first.arrays["head.weight"], second.arrays["head.weight"])


def test_neither_attempts_nor_other_runs_get_past_the_budget(worker: Worker) -> None:
    codes = [ask(worker, 1, 1 + i // 2, run=f"r{i % 2}").header for i in range(10)]
    granted = [h for h in codes if isinstance(h, Update)]
    assert len(granted) == worker.contract.rounds
    assert {h.code for h in codes if isinstance(h, Refusal)} == {"E210"}
    assert epsilon(history(worker), worker.contract.privacy.delta) <= (
        worker.contract.privacy.epsilon * (1 + 1e-9)
    )


def test_it_is_charged_before_anything_is_computed(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        assert len(history(worker)) == 1
        raise MemoryError("the record 4711 broke it")

    monkeypatch.setattr(workers, "train_round", fails)
    assert refused(ask(worker)) == "E500"
    assert len(history(worker)) == 1


@pytest.mark.parametrize("number", [4, 1_000_000])
def test_a_round_outside_the_plan_is_refused(worker: Worker, number: int) -> None:
    assert refused(ask(worker, number)) == "E202"
    assert not history(worker)


def test_another_contract_is_refused(worker: Worker) -> None:
    wire = messages.pack(Message(Train(contract="0" * 64, run="r", round=1)))
    assert refused(messages.unpack(worker.handle(wire))) == "E201"


@pytest.mark.parametrize(
    ("bias", "code"),
    [
        (np.array([np.nan, 0], np.float32), "E508"),
        (np.array([np.inf, 0], np.float32), "E508"),
        (np.zeros(3, np.float32), "E502"),
        (np.zeros((1, 2), np.float32), "E502"),
    ],
)
def test_a_server_adapter_that_does_not_fit_is_refused(
    worker: Worker, bias: np.ndarray, code: str
) -> None:
    assert refused(ask(worker, head__bias=bias)) == code
    assert refused(ask(worker, extra=np.zeros(1, np.float32))) == "E502"
    assert not history(worker)


def test_what_is_no_request_is_refused(worker: Worker) -> None:
    reply = worker.handle(train(worker))
    for wire in (b"", b"hello", reply, train(worker)[:-1]):
        assert refused(messages.unpack(worker.handle(wire))) in CODES


def test_the_text_of_a_failure_stays_in_the_sites_log(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("Jane Doe, 1961")

    monkeypatch.setattr(workers, "train_round", fails)
    with caplog.at_level(logging.ERROR):
        wire = worker.handle(train(worker))
    assert b"Jane" not in wire
    header = messages.unpack(wire).header
    assert isinstance(header, Refusal)
    assert header.incident in caplog.text
    assert "Jane Doe" in caplog.text


def test_only_the_trained_tensors_leave(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    original = workers.train_round
    monkeypatch.setattr(
        workers,
        "train_round",
        lambda *a: ({**original(*a)[0], "records": np.ones((80, 2), np.float32)}, {}),
    )
    assert refused(ask(worker)) == "E502"


def test_a_nan_update_does_not_leave(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    original = workers.train_round
    monkeypatch.setattr(
        workers, "train_round", lambda *a: ({k: v * np.nan for k, v in original(*a)[0].items()}, {})
    )
    assert refused(ask(worker)) == "E508"


def test_the_divisor_and_the_rate_do_not_see_the_number_of_records(
    table_contract: Contract,
    write_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_worker: MakeWorker,
) -> None:
    """Without noise, twice the records (each twice) give twice the update: nothing divides by N."""
    monkeypatch.setattr("silotune.client.training.dp_optimizer.NOISE_ROUNDING_LOG2", -40)
    contract = table_contract.changed(
        phases=[{"trains": "head", "rounds": 3, "sampling_rate": 1.0, "head_lr": 0.5}]
    )
    once = write_rows(tmp_path / "once.csv", 60)
    header, *rows = once.read_text().splitlines()
    twice = tmp_path / "twice.csv"
    twice.write_text("\n".join([header, *rows, *rows]) + "\n")
    workers = [make_worker(contract, path, "north") for path in (once, twice)]
    monkeypatch.setattr(
        "silotune.client.training.noise.NoiseSource.normal", lambda self, shape: np.zeros(shape)
    )
    small, big = (ask(worker).arrays["head.weight"] for worker in workers)
    np.testing.assert_allclose(big, 2 * small, rtol=1e-5)


def test_a_servers_huge_weights_do_not_tell_who_is_there(
    table_contract: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    """Weights under which one kind of record overflows are refused whoever is there; the largest
    that are not refused bring an update, whoever is there."""
    everybody = write_rows(tmp_path / "rows.csv", 40)
    header, *rows = everybody.read_text().splitlines()
    others = tmp_path / "others.csv"
    others.write_text("\n".join([header, *(r for r in rows if ",yes," not in r)]) + "\n")
    weight = np.zeros((2, 6), np.float32)
    for size, kind in ((2.3e38, Refusal), (1e6, Update)):
        weight[0, 1] = weight[0, 3] = size
        for path in (everybody, others):
            worker = make_worker(table_contract, path, "north")
            assert isinstance(ask(worker, head__weight=weight).header, kind)
            assert len(history(worker)) == (kind is Update)


def test_an_adaptive_server_stays_within_a_fixed_order(
    table_contract: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    """Rounds of two phases in any mixture: the filter's order bounds whatever was granted."""
    phase = {"trains": "head", "head_lr": 0.1}
    contract = table_contract.changed(
        phases=[
            {**phase, "rounds": 6, "sampling_rate": 1.0, "budget_share": 0.7},
            {**phase, "rounds": 4, "sampling_rate": 0.1, "budget_share": 0.3},
        ]
    )
    path = write_rows(tmp_path / "rows.csv", 20)
    rng = np.random.default_rng(0)
    for trial in range(8):
        worker = make_worker(contract, path, "north")
        share = rng.random()
        for attempt in range(1, 60):
            ask(worker, 1 if rng.random() < share else 7, attempt, run=f"r{trial}")
        p = contract.privacy
        assert epsilon_at(worker.run_order, history(worker), p.delta) <= p.epsilon * (1 + 1e-9)
        assert len(history(worker)) < 59


def test_an_empty_sample_answers_with_noise(
    table_contract: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    contract = table_contract.changed(
        phases=[{"trains": "head", "rounds": 3, "sampling_rate": 1e-6, "head_lr": 0.5}]
    )
    update = ask(make_worker(contract, write_rows(tmp_path / "rows.csv", 5))).arrays
    values = np.concatenate([a.ravel() for a in update.values()])
    # One coordinate in 2,600 is zero: the noise lies on a grid of 2^-10 sigma.
    assert (values == 0).mean() < 0.5


@pytest.mark.parametrize("clipping", [{}, {"clip_only": True}])
def test_without_dp_only_where_the_owner_allows_it(
    table_contract: Contract,
    write_rows: Rows,
    tmp_path: Path,
    make_worker: MakeWorker,
    clipping: dict[str, bool],
) -> None:
    contract = table_contract.changed(privacy={"mode": "none", **clipping})
    path = write_rows(tmp_path / "rows.csv", 20)
    allowing = permissive_policy(contract, "north", path, None)
    policy = allowing.model_copy(
        update={"permits": allowing.permits.model_copy(update={"allow_without_dp": False})}
    )
    with pytest.raises(RefusalError, match="allow_without_dp") as refusal:
        Worker(policy, contract, PrivacyLedger.in_memory("north"))
    assert refusal.value.code == "E203"
    header = ask(make_worker(contract, path)).header
    assert isinstance(header, Update)
    assert header.epsilon is None


def test_a_site_outside_the_roster_does_not_start(
    table_contract: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    with pytest.raises(RefusalError, match="'east' is not in the contract's sites"):
        make_worker(table_contract, write_rows(tmp_path / "rows.csv", 5), "east")


def test_a_site_without_rows_does_not_start(
    table_contract: Contract, tmp_path: Path, make_worker: MakeWorker
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("age,smoker,outcome\n")
    with pytest.raises(DataError, match="has no rows") as error:
        make_worker(table_contract, path, "north")
    assert error.value.code == "E304"


def test_noise_that_can_be_removed_needs_a_ledger_in_memory(
    table_contract: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    path = write_rows(tmp_path / "rows.csv", 80)
    make_worker(table_contract, path, seed=1)
    ledger = PrivacyLedger.create(tmp_path / "state", Keys.create(tmp_path / "keys"), "north")
    with pytest.raises(RefusalError, match=r"insecure_seed .* ledger in memory") as refused_:
        make_worker(table_contract, path, seed=1, ledger=ledger)
    assert refused_.value.code is ErrorCode.DP_REQUIRED
    make_worker(table_contract, path, ledger=ledger)


def test_two_workers_with_one_seed_share_no_noise(
    table_contract: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    path = write_rows(tmp_path / "rows.csv", 40)
    a, b = (ask(make_worker(table_contract, path, s, seed=3)).arrays for s in ("north", "south"))
    assert not np.isin(a["head.weight"], b["head.weight"]).any()
