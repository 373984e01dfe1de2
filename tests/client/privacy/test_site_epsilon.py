"""Each site its own ε, noise that decays over a phase, and what part of a plan each piece takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import dp_accounting  # type: ignore[import-untyped]
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped]

from silotune.client.privacy import accountant as accounting
from silotune.client.privacy.accountant import (
    Mechanism,
    inverse_variance_weights,
    mechanism_of,
    plan,
    plan_epsilon,
    rounds_in,
    shares,
)
from silotune.client.privacy.budget import mechanism_of as charged
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import PlannedSteps
from silotune.client.site import policy as policies
from silotune.client.site.policy import Policy, permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Target
from silotune.common.errors import ContractError, RefusalError
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Message, Refusal, Train, Update
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore

Rows = Callable[..., Path]
MakeWorker = Callable[..., Worker]


@pytest.fixture
def silos(table_contract: Contract) -> Contract:
    """north as agreed (8, 1e-4), south less, east less and with its own δ, west more."""
    return table_contract.changed(
        sites=[
            {"name": "north"},
            {"name": "south", "epsilon": 2.0},
            {"name": "east", "epsilon": 3.0, "delta": 1e-6},
            {"name": "west", "epsilon": 12.0},
        ]
    )


TARGETS = {"north": (8.0, 1e-4), "south": (2.0, 1e-4), "east": (3.0, 1e-6), "west": (12.0, 1e-4)}


def ask(worker: Worker, number: int = 1, attempt: int = 1, run: str = "r") -> Any:
    header = Train(contract=worker.contract.hash, run=run, round=number, attempt=attempt)
    wire = messages.pack(Message(header, worker.model.initial_arrays()))
    return messages.unpack(worker.handle(wire)).header


def oracle(history: list[Mechanism], delta: float) -> float:
    """Epsilon by dp-accounting's accountant, on a grid of its own."""
    accountant = PLDAccountant(value_discretization_interval=5e-4)
    for m in history:
        step = dp_accounting.PoissonSampledDpEvent(
            m.sampling_rate, dp_accounting.GaussianDpEvent(m.noise_multiplier)
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, m.steps))
    return float(accountant.get_epsilon(delta))


# --- each site its own epsilon ---------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_a_sites_noise_is_what_its_own_target_needs(
    silos: Contract,
    write_rows: Rows,
    tmp_path: Path,
    make_worker: MakeWorker,
    name: str,
) -> None:
    target, delta = TARGETS[name]
    assert silos.target_of(name) == Target(target, delta)
    worker = make_worker(silos, write_rows(tmp_path / "rows.csv", 60), name)
    for number in (1, 2, 3):
        assert isinstance(ask(worker, number), Update)
    history = [charged(charge) for charge in worker.ledger.charges.values()]
    (noise,) = {m.noise_multiplier for m in history}
    assert noise == pytest.approx(accounting.noise_for(target, delta, 0.5, 3), rel=1e-5)
    # The last tenth of delta is the filter's, for what may come after this run.
    assert oracle(history, 0.9 * delta) == pytest.approx(target, rel=1e-4)
    # And it is the least noise that does.
    less = [m._replace(noise_multiplier=m.noise_multiplier * 0.999) for m in history]
    assert oracle(less, 0.9 * delta) > target


def test_less_epsilon_is_more_noise(silos: Contract) -> None:
    noise = {name: plan(silos, silos.target_of(name))[0].noise_multiplier for name in TARGETS}
    assert noise["west"] < noise["north"] < noise["south"]
    assert noise["north"] < noise["east"]


@pytest.mark.parametrize("name", TARGETS)
def test_a_run_stops_at_the_sites_own_epsilon(
    silos: Contract, write_rows: Rows, tmp_path: Path, name: str
) -> None:
    """A large budget for ever does not carry a run beyond its own ε, attempt after attempt."""
    target, delta = TARGETS[name]
    policy = permissive_policy(silos, name, write_rows(tmp_path / "rows.csv", 60), None)
    large = policies.Budgets.Budget(epsilon=100.0, delta=delta)
    policy = policy.model_copy(update={"budgets": policies.Budgets(record=large)})
    worker = Worker(policy, silos, PrivacyLedger.in_memory(name))
    replies = [ask(worker, 1 + k % 3, attempt=1 + k // 3) for k in range(9)]
    granted = [reply for reply in replies if isinstance(reply, Update)]
    assert len(granted) == silos.rounds
    assert {r.code for r in replies if isinstance(r, Refusal)} == {"E210"}
    spent = [reply.epsilon or 0.0 for reply in granted]
    assert spent == sorted(spent)
    assert max(spent) <= target
    assert max(spent) == pytest.approx(target, rel=1e-4)
    assert plan_epsilon([charged(c) for c in worker.ledger.charges.values()], delta) <= target
    assert isinstance(ask(worker, run="another"), Update)  # its own budget for ever has room


def reply(run: FederatedRun, site: str, spent: float | None) -> bytes:
    return messages.pack(
        Message(
            Update(
                contract=run.contract.hash,
                site=site,
                run="r",
                round=run.server_round,
                attempt=1,
                epsilon=spent,
                metrics={},
                request=run.digest(),
                receipt=messages.Receipt(sequence=1, head="0" * 64, signature="0" * 128),
            ),
            {
                n: np.ones(shape, np.float32)
                for n, shape in {"head.bias": (2,), "head.weight": (2, 6)}.items()
            },
        )
    )


@pytest.mark.parametrize(
    ("name", "spent", "fits"),
    [
        ("north", 8.0, True),
        ("north", 8.001, False),
        ("south", 2.0, True),
        ("south", 2.001, False),
        ("south", 8.0, False),
        ("east", 3.0, True),
        ("east", 3.1, False),
        ("west", 12.0, True),
        ("west", 9.0, True),
        ("west", 12.01, False),
        ("south", 0.0, True),
        ("south", None, False),
    ],
)
def test_the_server_refuses_more_than_the_site_may_spend(
    silos: Contract, tmp_path: Path, name: str, spent: float | None, fits: bool
) -> None:
    initial = {"head.bias": np.zeros(2, np.float32), "head.weight": np.zeros((2, 6), np.float32)}
    run = FederatedRun(
        silos.changed(quorum=1), RunStore.create(tmp_path / "run", silos), "r", initial
    )
    run.begin()
    for site in TARGETS:
        run.accept(site, 1, reply(run, site, spent if site == name else 1.0))
    facts = run.finish()
    assert (name in facts.sites) is fits
    assert dict(facts.failed) == ({} if fits else {name: "E502"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epsilon": 0.0}, "sites.1.epsilon"),
        ({"epsilon": 101.0}, "sites.1.epsilon"),
        ({"delta": 0.01}, "sites.1.delta"),
        ({"delta": 0.0}, "sites.1.delta"),
        ({"epsilon": math.nan}, "sites.1.epsilon"),
    ],
)
def test_a_sites_target_has_the_bounds_of_any(
    table_contract: Contract, change: dict[str, float], told: str
) -> None:
    with pytest.raises(ContractError) as error:
        table_contract.changed(sites=[{"name": "north"} | change, {"name": "south"}])
    assert [told in problem for problem in error.value.problems] == [True]


def test_a_roster_without_targets_has_the_hash_it_had(table_contract: Contract) -> None:
    named = table_contract.changed(sites=[{"name": "north", "epsilon": None}, {"name": "south"}])
    assert named.hash == table_contract.hash
    other = table_contract.changed(sites=[{"name": "north", "epsilon": 8.0}, {"name": "south"}])
    assert other.hash != table_contract.hash
    assert other.target_of("north") == table_contract.target_of("north")


# --- the owner's own epsilon for a run -------------------------------------------------------

SITE = """
name = "south"
[data]
file = "rows.csv"
duplicate_records = "keep"
[budgets.record]
epsilon = 8.0
delta = 1e-4
[run]
epsilon = {own}
[permits]
contracts = ["{hash}"]
min_records = 1
masked_only = false
"""


def written(contract: Contract, folder: Path, own: str) -> Policy:
    text = SITE.replace("{own}", own).replace("{hash}", contract.hash)
    (folder / "site.toml").write_text(text)
    return policies.load(folder / "site.toml")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("0.5", 0.5),
        ("1.99", 1.99),
        ("2.0", 2.0),
        ("2.1", 2.0),
        ("100.0", 2.0),
    ],
)
def test_the_owner_can_lower_a_runs_epsilon_and_never_raise_it(
    silos: Contract, write_rows: Rows, tmp_path: Path, own: str, expected: float
) -> None:
    write_rows(tmp_path / "rows.csv", 60)
    policy = written(silos, tmp_path, own)
    assert policy.target(silos) == Target(expected, 1e-4)
    worker = Worker(policy, silos, PrivacyLedger.in_memory("south"))
    spent = [ask(worker, number).epsilon for number in (1, 2, 3)]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(expected, rel=1e-4)
    assert spent[-1] <= expected
    for charge in worker.ledger.charges.values():
        assert charge.noise_multiplier == pytest.approx(
            accounting.noise_for(expected, 1e-4, 0.5, 3), rel=1e-5
        )
    assert isinstance(ask(worker, 1, attempt=2), Refusal)


def test_nobody_else_has_to_agree_to_less(silos: Contract, tmp_path: Path) -> None:
    policy = written(silos, tmp_path, "0.5")
    assert policy.refusals(silos) == []
    less = silos.changed(sites=[{"name": "south", "epsilon": 0.25}], quorum=1)
    assert policy.target(less) == Target(0.25, 1e-4)


@pytest.mark.parametrize("own", ["0.0", "-1.0", "nan", "inf", "101.0", '"1"', "true"])
def test_an_epsilon_that_is_none_is_told_with_its_line(
    silos: Contract, tmp_path: Path, own: str
) -> None:
    with pytest.raises(ContractError, match=r"'run\.epsilon' .*\(.*/site\.toml:\d+\)"):
        written(silos, tmp_path, own)


def test_a_run_does_not_go_on_when_the_owner_changes_its_epsilon(
    silos: Contract, write_rows: Rows, tmp_path: Path
) -> None:
    """The exact bound is of the first plan; another one would be chosen after replies."""
    write_rows(tmp_path / "rows.csv", 60)
    ledger = PrivacyLedger.in_memory("south")
    assert ask(Worker(written(silos, tmp_path, "2.0"), silos, ledger)).epsilon > 1.2
    for changed in ("1.6", "1.2"):
        refusal = ask(Worker(written(silos, tmp_path, changed), silos, ledger), 2)
        assert isinstance(refusal, Refusal)
        assert refusal.code == "E213"
    assert len(ledger.charges) == 1
    again = ask(Worker(written(silos, tmp_path, "2.0"), silos, ledger), 2)
    assert isinstance(again, Update)


def test_a_delta_that_is_looser_than_the_budgets_is_refused(
    table_contract: Contract, tmp_path: Path
) -> None:
    """The site's own δ in the roster counts, not [privacy]'s."""
    loose = table_contract.changed(sites=[{"name": "north"}, {"name": "south", "delta": 1e-3}])
    (refusal,) = written(loose, tmp_path, "8.0").refusals(loose)
    assert refusal.code == "E205"
    assert "δ = 0.001 is larger than the budget's 0.0001" in str(refusal)
    strict = table_contract.changed(
        privacy={"delta": 1e-3}, sites=[{"name": "north"}, {"name": "south", "delta": 1e-5}]
    )
    assert written(strict, tmp_path, "8.0").refusals(strict) == []


def test_a_target_beyond_the_budget_for_ever_does_not_start(
    silos: Contract, write_rows: Rows, tmp_path: Path
) -> None:
    """west may spend 12 in a run by the contract; its owner gives 8 for ever."""
    write_rows(tmp_path / "rows.csv", 60)
    (tmp_path / "site.toml").write_text(
        SITE.replace("south", "west").replace("{own}", "12.0").replace("{hash}", silos.hash)
    )
    policy = policies.load(tmp_path / "site.toml")
    with pytest.raises(RefusalError, match="exceeds the lifetime budget") as refusal:
        Worker(policy, silos, PrivacyLedger.in_memory("west"))
    assert refusal.value.code == "E210"
    lower = policy.model_copy(update={"run": policies.Run(epsilon=8.0)})
    assert isinstance(ask(Worker(lower, silos, PrivacyLedger.in_memory("west"))), Update)


# --- noise that decays -----------------------------------------------------------------------

DECAY, STEPS = 0.8, 3


@pytest.fixture
def decaying(table_contract: Contract) -> Contract:
    phase = {"trains": "head", "sampling_rate": 0.3, "head_lr": 0.5}
    return table_contract.changed(
        phases=[
            {**phase, "rounds": 5, "local_steps": STEPS, "budget_share": 0.6, "noise_decay": DECAY},
            {**phase, "rounds": 4, "local_steps": 2, "budget_share": 0.4},
        ]
    )


def test_each_round_has_that_multiple_of_the_noise_before(decaying: Contract) -> None:
    found = plan(decaying)
    assert [m.steps for m in found] == [STEPS] * 5 + [8]
    assert {m.sampling_rate for m in found} == {0.3}
    for before, after in pairwise(found[:5]):
        assert after.noise_multiplier / before.noise_multiplier == pytest.approx(DECAY)


def test_together_they_cost_the_same_epsilon(decaying: Contract) -> None:
    """The whole budget, no more; and by another accountant."""
    for target in (None, Target(2.0, 1e-6)):
        epsilon_, delta = target or Target(8.0, 1e-4)
        found = plan(decaying, target)
        assert epsilon_ * (1 - 1e-5) <= plan_epsilon(found, delta) <= epsilon_
        assert oracle(found, 0.9 * delta) == pytest.approx(epsilon_, rel=1e-3)


def test_the_phases_keep_their_shares(decaying: Contract, table_contract: Contract) -> None:
    """The sum of steps / sigma^2 of each phase is what it is without decay, for equal s."""
    even = decaying.changed(
        phases=[p | {"noise_decay": None} for p in decaying.model_dump()["phases"]]
    )
    parts = []
    for found in (plan(decaying), plan(even)):
        zcdp = [m.steps / m.noise_multiplier**2 for m in found]
        parts.append(sum(zcdp[:-1]) / sum(zcdp))
    assert parts == pytest.approx([0.6, 0.6])
    none = decaying.changed(
        phases=[
            p | ({"noise_decay": 1.0} if p["noise_decay"] else {})
            for p in decaying.model_dump()["phases"]
        ]
    )
    assert [m.noise_multiplier for m in plan(none)[:5]] == pytest.approx(
        [plan(even)[0].noise_multiplier] * 5
    )


def test_each_round_is_given_its_own_mechanism(decaying: Contract) -> None:
    found = plan(decaying)
    for number in range(1, 6):
        assert mechanism_of(decaying, found, number) == found[number - 1]
    for number in range(6, 10):
        assert mechanism_of(decaying, found, number) == found[5]._replace(steps=2)
    with pytest.raises(ValueError, match="not in the plan"):
        mechanism_of(decaying, found, 10)
    by_round = [mechanism_of(decaying, found, number) for number in range(1, 10)]
    assert accounting.by_round(decaying, found) == by_round
    assert plan_epsilon(by_round, 1e-4) == plan_epsilon(found, 1e-4)


def test_a_worker_charges_and_uses_the_rounds_own_noise(
    decaying: Contract,
    write_rows: Rows,
    tmp_path: Path,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[Mechanism] = []
    original = vars(__import__("silotune.client.worker.worker", fromlist=["x"]))["train_round"]

    def spy(contract: Any, phase: Any, mechanism: Mechanism, *more: Any) -> Any:
        used.append(mechanism)
        return original(contract, phase, mechanism, *more)

    monkeypatch.setattr("silotune.client.worker.worker.train_round", spy)
    worker = make_worker(decaying, write_rows(tmp_path / "rows.csv", 60))
    spent = [ask(worker, number).epsilon for number in range(1, 10)]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(8.0, rel=1e-4)
    wanted = [mechanism_of(decaying, plan(decaying), number) for number in range(1, 10)]
    assert used == wanted
    assert [charged(charge) for charge in worker.ledger.charges.values()] == wanted


def test_the_last_and_dearest_round_cannot_be_had_instead_of_the_first(
    decaying: Contract, write_rows: Rows, tmp_path: Path, make_worker: MakeWorker
) -> None:
    """A server that asks for the round with the least noise again and again is stopped at ε."""
    worker = make_worker(decaying, write_rows(tmp_path / "rows.csv", 60))
    replies = [ask(worker, 5, attempt=k) for k in range(1, 12)]
    granted = [header.epsilon or 0.0 for header in replies if isinstance(header, Update)]
    assert 1 <= len(granted) < 9
    assert max(granted) <= 8.0
    assert {h.code for h in replies if isinstance(h, Refusal)} == {"E210"}


def test_how_many_whole_rounds_a_beginning_is(decaying: Contract) -> None:
    found = plan(decaying)
    assert rounds_in(decaying, found) == 9
    assert rounds_in(decaying, []) == 0
    assert rounds_in(decaying, found[:2]) == 2
    assert rounds_in(decaying, [*found[:2], found[2]._replace(steps=2)]) == 2
    assert rounds_in(decaying, found[:5]) == 5
    for steps, rounds in ((1, 5), (2, 6), (3, 6), (7, 8), (8, 9)):
        assert rounds_in(decaying, [*found[:5], found[5]._replace(steps=steps)]) == rounds


@pytest.mark.parametrize(
    ("decay", "rounds", "fits"),
    [
        (0.5, 10, True),
        (0.5, 11, False),
        (0.9, 66, True),
        (0.9, 67, False),
        (1.0, 1000, True),
        (0.49, 2, False),
        (1.01, 2, False),
        (0.0, 2, False),
    ],
)
def test_noise_does_not_decay_to_nothing(
    table_contract: Contract, decay: float, rounds: int, fits: bool
) -> None:
    phase = {
        "trains": "head",
        "rounds": rounds,
        "sampling_rate": 0.1,
        "head_lr": 0.5,
        "noise_decay": decay,
    }
    if fits:
        assert table_contract.changed(phases=[phase]).rounds == rounds
        return
    with pytest.raises(ContractError, match="noise_decay"):
        table_contract.changed(phases=[phase])


def test_a_phase_has_no_more_steps_than_a_charge_can_name(table_contract: Contract) -> None:
    phase = {"trains": "head", "rounds": 1000, "sampling_rate": 0.1, "head_lr": 0.5}
    most = table_contract.changed(phases=[phase | {"local_steps": 1000}])
    PlannedSteps(**plan(most)[0]._asdict())
    with pytest.raises(ContractError, match=r"rounds times local_steps is 1,001,000; a phase has"):
        table_contract.changed(phases=[phase | {"local_steps": 1001}])


def test_decay_is_for_noise_that_is_there(decaying: Contract) -> None:
    found = plan(decaying.changed(privacy={"mode": "none"}))
    assert {m.noise_multiplier for m in found} == {0.0}
    assert [m.steps for m in found] == [STEPS] * 5 + [8]


# --- shares ----------------------------------------------------------------------------------


def test_the_shares_add_up_and_are_the_zcdp_budgets_without_sampling(
    table_contract: Contract,
) -> None:
    """At q = 1 the RDP of a Gaussian is linear in 1 / sigma^2: shares are exactly the budgets."""
    phase = {"trains": "head", "sampling_rate": 1.0, "head_lr": 0.5}
    contract = table_contract.changed(
        phases=[
            {**phase, "rounds": 2, "budget_share": 0.5},
            {**phase, "rounds": 7, "budget_share": 0.3},
            {**phase, "rounds": 4, "budget_share": 0.2, "noise_decay": 0.7},
        ]
    )
    found = plan(contract)
    parts = shares(found, 1e-4)
    assert parts[:2] == pytest.approx([0.5, 0.3])
    assert sum(parts[2:]) == pytest.approx(0.2)
    for k in range(3, len(parts)):
        assert parts[k] / parts[k - 1] == pytest.approx(0.7**-2)


def test_the_shares_of_a_sampled_plan_are_what_each_part_takes_alone(decaying: Contract) -> None:
    """At the plan's best order: what one part takes is what the plan costs less without it."""
    found = plan(decaying)
    parts = shares(found, 1e-4)
    assert sum(parts) == pytest.approx(1.0)
    order = accounting.best_order(found, 1e-4)
    whole = accounting.epsilon_at(order, found, 1e-4)
    costs = [
        whole - accounting.epsilon_at(order, found[:k] + found[k + 1 :], 1e-4)
        for k in range(len(found))
    ]
    np.testing.assert_allclose(parts, np.array(costs) / sum(costs), rtol=1e-6)


def test_no_other_weights_have_less_noise_in_the_mean(silos: Contract) -> None:
    found = inverse_variance_weights(silos)
    assert found["west"] == 1.0 == max(found.values())
    assert found["south"] < found["east"] < found["north"] < 1
    noise = np.array([plan(silos, silos.target_of(name))[0].noise_multiplier for name in found])

    def variance(weights: np.ndarray) -> float:
        return float((weights**2 * noise**2).sum() / weights.sum() ** 2)

    best = variance(np.array(list(found.values())))
    assert best < 0.9 * variance(np.ones(4))
    rng = np.random.default_rng(0)
    assert all(variance(rng.uniform(0.01, 1, 4)) >= best for _ in range(500))
    assert set(inverse_variance_weights(silos.changed(privacy={"mode": "none"})).values()) == {1.0}


def test_the_weights_are_told_where_sites_differ(
    silos: Contract, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    file = tmp_path / "c.json"
    alone = silos.changed(sites=[{"name": "north"}], quorum=1)
    for contract, told in ((silos, True), (alone, False)):
        file.write_text(contract.model_dump_json(exclude_none=True))
        code, text, _ = run("privacy", "plan", "--contract", str(file))
        assert code == 0
        assert ("least noise in the mean: north 0." in text) == told
