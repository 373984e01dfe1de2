"""`silotune.privacy.plan`: the worker's own plan, in figures and in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from silotune import Contract, privacy
from silotune.client.privacy import accountant
from silotune.client.worker.worker import Worker
from silotune.common.errors import UsageError
from silotune.common.protocol.messages import Update
from tests import tiny
from tests.federation import ask


def test_the_plan_is_the_workers(table_contract: Contract) -> None:
    found = privacy.plan(table_contract)
    mechanisms = accountant.plan(table_contract)
    assert found.noise_multiplier == tuple(m.noise_multiplier for m in mechanisms)
    assert (found.steps, found.sampling_rate) == ((3,), (0.5,))
    assert found.noise_by_round == found.noise_multiplier * 3
    assert found.epsilon == accountant.plan_epsilon(mechanisms, 1e-4)
    assert list(found.epsilon_by_round) == sorted(found.epsilon_by_round)
    assert found.epsilon_by_round[-1] == found.epsilon <= 8.0
    assert (found.delta, found.unit, found.accountant) == (1e-4, "record", "exact composition")
    with pytest.raises(FrozenInstanceError):
        found.epsilon = 1.0  # type: ignore[misc]


def test_phases_and_decaying_noise() -> None:
    phase = {"trains": "head", "sampling_rate": 1.0, "head_lr": 1.0, "budget_share": 0.5}
    contract = tiny.contract_of(
        "classification",
        "one-hot",
        phases=[
            phase | {"rounds": 2, "local_steps": 3},
            phase | {"rounds": 3, "noise_decay": 0.9},
        ],
    )
    found = privacy.plan(contract)
    assert found.steps == (6, 3)
    first, second, *decayed = found.noise_by_round
    assert (first, decayed[0]) == found.noise_multiplier
    assert first == second
    assert decayed[1] == pytest.approx(0.9 * decayed[0])
    mechanisms = accountant.plan(contract)
    assert found.epsilon_by_round[1] == accountant.plan_epsilon(mechanisms[:1], found.delta)


def test_epsilon_by_round_is_what_a_worker_reports(
    table_contract: Contract,
    write_rows: Callable[..., Path],
    make_worker: Callable[..., Worker],
    tmp_path: Path,
) -> None:
    worker = make_worker(table_contract, write_rows(tmp_path / "rows.csv", 80))
    reported = []
    for number in range(1, table_contract.rounds + 1):
        reply = ask(worker, number, worker.model.initial_arrays()).header
        assert isinstance(reply, Update)
        reported.append(reply.epsilon)
    assert privacy.plan(table_contract).epsilon_by_round == pytest.approx(reported)


def test_in_words(table_contract: Contract) -> None:
    found = privacy.plan(table_contract)
    assert repr(found).startswith("PrivacyPlan of small: ε ≤ 8.00, δ = 0.0001 per record and site")
    assert f"noise multiplier {found.noise_multiplier[0]:.3f}, 3 steps" in repr(found)
    html = found._repr_html_()
    assert "δ = 0.0001" in html
    assert f"<td>{found.noise_multiplier[0]:.3f}</td>" in html


def test_a_sites_own_limits(table_contract: Contract) -> None:
    own = table_contract.changed(sites=[{"name": "north"}, {"name": "south", "epsilon": 1.0}])
    south, all_ = privacy.plan(own, "south"), privacy.plan(own, "north")
    assert south.epsilon <= 1.0 < all_.epsilon
    assert south.noise_multiplier[0] > all_.noise_multiplier[0]
    assert "small at south: ε ≤ 1.00" in repr(south)


def test_without_privacy_nothing_is_claimed(table_contract: Contract) -> None:
    found = privacy.plan(table_contract.changed(privacy={"mode": "none"}))
    assert found.noise_multiplier == (0.0,)
    assert math.isinf(found.epsilon)
    assert "no differential privacy" in repr(found)


def test_wrong_arguments(table_contract: Contract) -> None:
    with pytest.raises(UsageError, match=r"contract is a str, .* Contract\.load"):
        privacy.plan("heart.toml")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"site = 'nort' is no site .* Did you mean 'north'"):
        privacy.plan(table_contract, "nort")
