"""The worker: a closed set of requests, one charge a round, and nothing else leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from silotune.client.privacy import accountant
from silotune.client.privacy.accountant import Mechanism, merged, plan_epsilon
from silotune.client.privacy.budget import mechanism_of, plan_of
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site import policy as policies
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
    assert spent[-1] == pytest.approx(worker.contract.privacy.epsilon, rel=1e-6)
    assert spent[-1] == plan_epsilon(history(worker), worker.contract.privacy.delta)


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
    assert merged(history(worker)) == merged(worker.plan)


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


PHASE = {"trains": "head", "head_lr": 0.1}


@pytest.fixture
def phases(table_contract: Contract) -> Contract:
    return table_contract.changed(
        phases=[
            {**PHASE, "rounds": 6, "sampling_rate": 1.0, "budget_share": 0.7},
            {**PHASE, "rounds": 4, "sampling_rate": 0.1, "budget_share": 0.3},
        ]
    )


def test_an_adaptive_server_gets_the_steps_of_the_plan_and_no_more(
    phases: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    """Rounds of two phases in any mixture, attempt after attempt."""
    path = write_rows(tmp_path / "rows.csv", 20)
    rng = np.random.default_rng(0)
    for trial in range(4):
        worker = make_worker(phases, path, "north")
        share = rng.random()
        for attempt in range(1, 60):
            ask(worker, 1 if rng.random() < share else 7, attempt, run=f"r{trial}")
        assert merged(history(worker)) == merged(worker.plan)


def test_a_phase_ends_when_its_steps_are_taken_and_the_next_one_goes_on(
    phases: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    """A policy with room for more: an attempt takes a step of its own phase only."""
    policy = permissive_policy(phases, "north", write_rows(tmp_path / "rows.csv", 20), None)
    large = policies.Budgets.Budget(epsilon=90.0, delta=phases.privacy.delta)
    policy = policy.model_copy(update={"budgets": policies.Budgets(record=large)})
    worker = Worker(policy, phases, PrivacyLedger.in_memory("north"))
    for number, attempt in ((1, 1), (1, 2), (1, 3), (3, 1), (4, 1), (5, 1)):
        assert isinstance(ask(worker, number, attempt).header, Update)
    assert refused(ask(worker, 6)) == "E210"
    assert refused(ask(worker, 2)) == "E210"
    for number in range(7, 11):
        assert isinstance(ask(worker, number).header, Update)
    assert refused(ask(worker, 10, 2)) == "E210"
    assert merged(history(worker)) == merged(worker.plan)


def test_an_attempt_where_the_noise_decays_takes_the_next_step_of_the_phase(
    table_contract: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    contract = table_contract.changed(
        phases=[{**PHASE, "rounds": 3, "sampling_rate": 0.5, "noise_decay": 0.8}]
    )
    worker = make_worker(contract, write_rows(tmp_path / "rows.csv", 20))
    for number, attempt in ((2, 1), (2, 2), (3, 1)):
        assert isinstance(ask(worker, number, attempt).header, Update)
    assert history(worker) == [worker.rounds[1], worker.rounds[2], worker.rounds[0]]
    assert refused(ask(worker, 3, 2)) == "E210"


def test_the_first_charge_of_a_run_names_its_plan(worker: Worker) -> None:
    for number in (1, 2):
        ask(worker, number)
    first, second = worker.ledger.charges.values()
    assert plan_of(first) == worker.plan
    assert second.plan == ()


def test_a_plan_that_differs_in_its_last_digits_is_the_one_that_was_named(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of a library may have computed it."""
    ask(worker)
    nearly = [m._replace(noise_multiplier=m.noise_multiplier * (1 + 1e-7)) for m in worker.plan]
    monkeypatch.setattr(accountant, "plan", lambda *_: nearly)
    again = Worker(worker.policy, worker.contract, worker.ledger)
    assert again.plan == worker.plan
    assert isinstance(ask(again, 2).header, Update)
    assert isinstance(ask(again, 3).header, Update)


def test_a_run_that_died_in_its_first_round_locks_nothing(worker: Worker) -> None:
    """With a limit of just the contract's ε: another run takes the steps that it left."""
    ask(worker)
    again = Worker(worker.policy, worker.contract, worker.ledger)
    assert [isinstance(ask(again, n, run="second").header, Update) for n in (1, 2, 3)] == [
        True,
        True,
        False,
    ]
    assert merged(history(again)) == merged(again.plan)
    assert refused(ask(again, run="third")) == "E210"


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
