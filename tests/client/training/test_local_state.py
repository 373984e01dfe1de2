"""What a site keeps of a run, the corrections of drift that rest on it, and sites of lower rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.client.privacy.accountant import mechanism_of
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.training.local_state import LocalState
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.contract.schedule import RoundPlan
from silotune.common.errors import ContractError
from silotune.common.models.factory import build
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Arrays, Message, Refusal, Train, Update
from silotune.server.rounds.exchange import SILENT, drive_round
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore
from tests import tiny
from tests.federation import EXACT, SITES, ask, of_method, play, team, worker_of

PLAIN = {"mode": "none", "expected_units": 24.0}


@pytest.fixture(scope="module")
def keys() -> dict[str, Keys]:
    return {site: Keys.in_memory() for site in SITES}


def with_last(contract: Contract, **changes: Any) -> Contract:
    *before, last = contract.model_dump(mode="json")["phases"]
    return contract.changed(phases=[*before, last | changes])


def run_of(
    contract: Contract, folder: Path, keys: dict[str, Keys]
) -> tuple[FederatedRun, dict[str, Worker], list[Message]]:
    """A whole run, its workers, and what they replied."""
    workers, seen = team(contract, "classification", "bert", folder, keys), []

    def handle(site: str, wire: bytes) -> bytes:
        reply = workers[site].handle(wire)
        seen.append(messages.unpack(reply))
        return reply

    handles = {s: lambda wire, s=s: handle(s, wire) for s in SITES}
    initial = build(contract, tiny.folder_of("bert"), EXACT).initial_arrays()
    run = FederatedRun(contract, RunStore.create(folder / "run", contract), "run-1", initial)
    while not run.done:
        assert not drive_round(run.stages(SITES), handles).failed
    return run, workers, seen


def own_of(worker: Worker, run: str = "run-1") -> LocalState:
    return worker.local_state(run, worker.contract.rounds + 1)


# --- tensors that do not leave -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "personal", "stays", "leaves"),
    [
        ("ffa", "head", ("head.",), ("lora_B",)),
        ("ffa", "adapter", ("lora_B",), ("head.",)),
        ("fedsa", None, ("lora_B",), ("head.", "lora_A")),
        ("fedsa", "head", ("head.", "lora_B"), ("lora_A",)),
        ("rolora", "head", ("head.",), ("lora_A", "lora_B")),
    ],
)
@pytest.mark.parametrize("mode", ["dp", "none"])
def test_what_is_a_sites_own_does_not_leave(
    method: str,
    personal: str | None,
    stays: tuple[str, ...],
    leaves: tuple[str, ...],
    mode: str,
    keys: dict[str, Keys],
    tmp_path: Path,
) -> None:
    plain = of_method(method, keys, **({} if mode == "dp" else {"privacy": PLAIN}))
    contract = with_last(plain, personal=personal)
    run, workers, seen = run_of(contract, tmp_path / "run", keys)
    head = len(SITES) * contract.phases[0].rounds
    sent = {name for message in seen[head:] for name in message.arrays}
    assert all(any(part in name for name in sent) for part in leaves)
    assert not any(part in name for name in sent for part in stays)
    released = run.registry.adapter()
    models = [own_of(worker).model(released) for worker in workers.values()]
    for name in released:
        differ = any(not np.array_equal(models[0][name], other[name]) for other in models[1:])
        assert differ == any(part in name for part in stays), name
    assert set(contract.sendings) == {
        contract.round_plan(number).sends for number in range(1, contract.rounds + 1)
    }


def test_a_reply_with_a_tensor_that_should_stay_does_not_leave(
    keys: dict[str, Keys], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out knows by itself what a round sends, whatever the worker gives it."""
    contract = with_last(of_method("fedsa", keys), personal=None)
    worker = worker_of(
        contract,
        "classification",
        "bert",
        tmp_path,
        "north",
        PrivacyLedger.in_memory("north", keys["north"]),
    )
    planned = Contract.round_plan
    monkeypatch.setattr(
        Contract, "round_plan", lambda self, n: replace(planned(self, n), stays=frozenset())
    )
    reply = ask(worker, contract.rounds, tiny.moved(worker.model))
    assert isinstance(reply.header, Update)  # then the contract says that it is sent
    monkeypatch.setattr(RoundPlan, "sends", frozenset({"head", "A"}))
    reply = ask(worker, contract.rounds - 1, tiny.moved(worker.model))
    assert isinstance(reply.header, Refusal)


def test_what_stays_is_noised_as_what_leaves(keys: dict[str, Keys], tmp_path: Path) -> None:
    """Two sites with the same rows and other noise: their own tensors are as far apart as the
    plan's noise says, and so is what they sent."""
    contract = with_last(of_method("fedsa", keys), rounds=1, adapter_lr=1.0, head_lr=1.0)
    owns: list[LocalState] = []
    sent: list[Arrays] = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        worker = worker_of(
            contract,
            "classification",
            "bert",
            folder,
            "north",
            PrivacyLedger.in_memory("north", keys["north"]),
        )
        worker.source = type(worker.source)(site="north", insecure_seed=seed)
        start = tiny.moved(worker.model)
        reply = ask(worker, contract.rounds, start)
        own = own_of(worker, "r")
        owns.append(own)
        sent.append(reply.arrays)
    mechanism = mechanism_of(contract, worker.plan, contract.rounds)
    p = contract.privacy
    step = mechanism.noise_multiplier * p.clip_norm / (p.expected_units * mechanism.sampling_rate)
    expected = math.sqrt(2 * mechanism.steps) * step
    for first, second in ((owns[0].tensors, owns[1].tensors), (sent[0], sent[1])):
        apart = np.concatenate([(first[n] - second[n]).ravel() for n in first])
        # Samples differ, too, but a gradient is small beside the noise here.
        assert apart.std() == pytest.approx(expected, rel=0.25)


def test_a_head_of_its_own_is_a_head_trained_alone(keys: dict[str, Keys], tmp_path: Path) -> None:
    """With an adapter that stands still each site's head comes to what plain steps at the site by
    itself come to, and the mean of its later iterates is what is used."""
    plain = of_method("ffa", keys, privacy=PLAIN)
    last = {"adapter_lr": 1e-9, "head_lr": 0.5, "rounds": 4}
    shared = with_last(plain, personal="head", **last)
    shared = shared.changed(
        phases=[shared.model_dump(mode="json")["phases"][1] | {"budget_share": 1.0}],
        aggregation={"averaging_start": 0.5},
    )
    run, workers, _ = run_of(shared, tmp_path / "shared", keys)
    single = with_last(shared, personal=None).changed(
        sites=[{"name": "north", "public_key": keys["north"].public}], quorum=1
    )
    worker = worker_of(
        single,
        "classification",
        "bert",
        tmp_path,
        "north",
        PrivacyLedger.in_memory("north", keys["north"]),
    )
    initial = worker.model.initial_arrays()
    alone = FederatedRun(single, RunStore.create(tmp_path / "alone", single), "run-1", initial)
    while not alone.done:
        drive_round(alone.stages(["north"]), {"north": worker.handle})
    found = own_of(workers["north"]).model(run.registry.adapter())
    for name in ("head.weight", "head.bias"):
        np.testing.assert_allclose(found[name], alone.registry.adapter()[name], atol=1e-5)
        assert np.abs(found[name]).max() > 1e-3
    assert own_of(workers["north"]).averaged == 2


def test_copies_go_from_each_alone_to_one_for_all(keys: dict[str, Keys], tmp_path: Path) -> None:
    """The server's model is the mean of the sites' copies, and the pull says how far from it they
    stay."""
    apart = []
    for place, pull in enumerate((1e-9, 1.0, 8.0)):
        contract = with_last(
            of_method("ffa", keys, privacy=PLAIN),
            personal="mean-regularised",
            proximal_mu=pull,
            head_lr=0.1,
            adapter_lr=0.1,
            rounds=6,
            local_steps=2,
        ).changed(aggregation={"averaging_start": 0.9})
        run, workers, _ = run_of(contract, tmp_path / str(place), keys)
        copies = [own_of(worker).tensors for worker in workers.values()]
        released = run.registry.adapter()
        for name in copies[0]:
            mean = np.mean([copy[name] for copy in copies], axis=0)
            np.testing.assert_allclose(released[name], mean, atol=1e-5)
        apart.append(
            sum(
                float(np.abs(copy["head.weight"] - released["head.weight"]).max())
                for copy in copies
            )
        )
    assert apart[0] > 1.3 * apart[1] > 1.3 * 1.3 * apart[2] > 0


# --- the ledger --------------------------------------------------------------------------------


def test_what_stays_outlives_the_process_and_is_of_released_rounds(
    keys: dict[str, Keys], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that starts again goes on where it was; a round that was lost left nothing; what is
    gone or changed on disk is refused before anything is charged."""
    contract = with_last(of_method("fedsa", keys), rounds=5)
    home = Keys.create(tmp_path / "keys")
    contract = contract.changed(
        sites=[
            {"name": site, "public_key": home.public if site == "north" else keys[site].public}
            for site in SITES
        ]
    )
    PrivacyLedger.create(tmp_path / "state", home, "north")

    def started() -> Worker:
        return worker_of(
            contract,
            "classification",
            "bert",
            tmp_path,
            "north",
            PrivacyLedger.open(tmp_path / "state", home),
        )

    worker, first = started(), contract.phases[0].rounds + 1
    start = tiny.moved(worker.model)
    assert isinstance(ask(worker, first, start).header, Update)
    kept = own_of(worker, "r")
    assert kept.tensors
    worker = started()
    assert all(np.array_equal(own_of(worker, "r").tensors[n], a) for n, a in kept.tensors.items())
    # The next round's charge stands, and its reply is lost.
    with monkeypatch.context() as patch:
        patch.setattr(PrivacyLedger, "append", crash_at_release(PrivacyLedger.append))
        assert isinstance(ask(worker, first + 1, start).header, Refusal)
    assert len(worker.ledger.charges) == 2
    worker = started()
    assert all(np.array_equal(own_of(worker, "r").tensors[n], a) for n, a in kept.tensors.items())
    for file in (tmp_path / "state" / "replies").iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    refused = ask(started(), first + 2, start).header
    assert isinstance(refused, Refusal)
    assert refused.code == "E212"
    assert len(started().ledger.charges) == 2


def crash_at_release(append: Any) -> Any:
    def wrapped(self: PrivacyLedger, kind: type, **facts: Any) -> Any:
        if kind.__name__ == "Released":
            raise OSError("no space left on device")
        return append(self, kind, **facts)

    return wrapped


def test_a_plain_run_leaves_nothing(keys: dict[str, Keys], tmp_path: Path) -> None:
    _, workers, _ = run_of(of_method("ffa", keys), tmp_path / "run", keys)
    for worker in workers.values():
        assert own_of(worker) == LocalState()
        assert not any(released.local_state for released in worker.ledger.releases.values())


# --- scaffold ----------------------------------------------------------------------------------


def controlled(keys: dict[str, Keys], control: str | None = "scaffold", **more: Any) -> Contract:
    contract = with_last(
        of_method("ffa", keys, **more),
        drift_correction=control,
        local_steps=4,
        rounds=5,
        head_lr=0.3,
        adapter_lr=0.1,
    )
    weights = {"north": 1.0, "south": 2.0, "east": 0.5}
    return contract.changed(
        sites=[
            {"name": site, "public_key": keys[site].public, "weight": weights[site]}
            for site in SITES
        ]
    )


@pytest.mark.parametrize(("mode", "masked"), [("dp", False), ("dp", True), ("none", False)])
def test_corrections_add_up_to_nothing(
    mode: str, masked: bool, keys: dict[str, Keys], tmp_path: Path
) -> None:
    """So neither a correction nor its noise is in the weighted mean. The server learns the mean
    gradient from the masked sum alone."""
    more: dict[str, Any] = {} if mode == "dp" else {"privacy": PLAIN}
    contract = controlled(keys, **more)
    if masked:
        contract = contract.changed(secure_aggregation={"bound": 64.0})
    workers = team(contract, "classification", "bert", tmp_path / "w", keys)
    handles = {site: worker.handle for site, worker in workers.items()}
    initial = build(contract, tiny.folder_of("bert"), EXACT).initial_arrays()
    run = FederatedRun(contract, RunStore.create(tmp_path / "run", contract), "run-1", initial)
    seen = 0
    while not run.done:
        asked, number = run.server_state.request_tensors(), run.server_round
        total: Arrays = {}
        for site, worker in workers.items():
            share = np.float32(contract.weight_share(site))
            for name, array in (
                worker.local_state("run-1", number).corrections(asked, initial).items()
            ):
                total[name] = total.get(name, np.zeros_like(array)) + share * array
                seen += bool(np.abs(array).max() > 1e-4)
        for array in total.values():
            assert np.abs(array).max() < (2e-3 if masked else 2e-5)
        assert not drive_round(run.stages(SITES), handles).failed
    assert seen > 10


def test_scaffold_drifts_less(keys: dict[str, Keys], tmp_path: Path) -> None:
    """Four local steps on three sites' own rows, against one step with all: the corrected rounds
    come nearer to where many plain rounds of one step come."""
    ends = {}
    for name, control, steps, rounds, rate in (
        ("goal", None, 1, 240, 1.0),
        ("plain", None, 8, 60, 0.5),
        ("scaffold", "scaffold", 8, 60, 0.5),
    ):
        contract = tiny.contract_of("classification", "one-hot").changed(
            privacy=PLAIN,
            quorum=3,
            aggregation={"server_momentum": 0.0, "averaging_start": 0.9},
            sites=[{"name": site, "public_key": keys[site].public} for site in SITES],
            phases=[
                {
                    "trains": "head",
                    "rounds": rounds,
                    "sampling_rate": 1.0,
                    "budget_share": 1.0,
                    "local_steps": steps,
                    "head_lr": rate,
                    "drift_correction": control,
                }
            ],
        )
        adapter, _, _ = play(contract, "classification", "one-hot", tmp_path / name, keys)
        ends[name] = np.concatenate([a.ravel() for _, a in sorted(adapter.items())])
    away = {name: np.linalg.norm(end - ends["goal"]) for name, end in ends.items()}
    assert away["scaffold"] < 0.5 * away["plain"]


def test_corrections_begin_anew_after_a_round_without_some_site(
    keys: dict[str, Keys], tmp_path: Path
) -> None:
    contract = controlled(keys, privacy=PLAIN).changed(quorum=2)
    workers = team(contract, "classification", "bert", tmp_path / "w", keys)
    handles: dict[str, Any] = {site: worker.handle for site, worker in workers.items()}
    initial = build(contract, tiny.folder_of("bert"), EXACT).initial_arrays()
    registry = RunStore.create(tmp_path / "run", contract)
    run, first = FederatedRun(contract, registry, "run-1", initial), contract.phases[0].rounds + 1
    told = []
    while not run.done:
        asked = run.server_state.request_tensors()
        told.append(any(name.startswith("control.") for name in asked))
        gone = {"east": lambda _: SILENT} if run.server_round == first + 1 else {}
        drive_round(run.stages(SITES), handles | gone)
        if run.server_round == first + 4:  # another server takes the run up
            registry.close()
            registry = RunStore.open(tmp_path / "run", contract)
            run = FederatedRun(contract, registry, "run-1", initial)
            assert run.restore() == first + 3
    assert told[first - 1 :] == [False, True, False, True, True]


def test_a_server_may_send_all_mean_gradients_or_none(
    keys: dict[str, Keys], tmp_path: Path
) -> None:
    contract = controlled(keys, privacy=PLAIN)
    worker = worker_of(
        contract,
        "classification",
        "bert",
        tmp_path,
        "north",
        PrivacyLedger.in_memory("north", keys["north"]),
    )
    start = tiny.moved(worker.model)
    number = contract.phases[0].rounds + 1
    names = [n for n in start if n.startswith("head.") or n.endswith("lora_B")]
    whole = {f"control.{name}": np.zeros_like(start[name]) for name in names}
    for bad, code in (
        (dict(list(whole.items())[1:]), "E502"),
        (whole | {"control.x": whole["control.head.bias"]}, "E502"),
        (whole | {"control.head.bias": np.full_like(start["head.bias"], np.nan)}, "E508"),
    ):
        reply = ask(worker, number, start | bad).header
        assert isinstance(reply, Refusal)
        assert reply.code == code
    assert not worker.ledger.charges
    assert isinstance(ask(worker, number, start | whole).header, Update)
    plain = contract.phases[0].rounds
    assert isinstance(
        ask(worker, plain, {n: a for n, a in (start | whole).items() if "head" in n}).header,
        Refusal,
    )


# --- ranks -------------------------------------------------------------------------------------


def ranked(keys: dict[str, Keys], method: str = "ffa", **more: Any) -> Contract:
    ranks = {"north": 1, "south": None, "east": 3}
    return of_method(method, keys, **more).changed(
        adapter={"rank": 4, "alpha": 16.0},
        sites=[
            {"name": site, "public_key": keys[site].public, "rank": ranks[site]} for site in SITES
        ],
    )


@pytest.mark.parametrize("method", ["ffa", "fedsvd", "fedavg", "flexlora", "fedsa"])
def test_a_site_changes_no_more_than_its_rank(
    method: str, keys: dict[str, Keys], tmp_path: Path
) -> None:
    contract = ranked(keys, method, privacy=PLAIN)
    run, workers, seen = run_of(contract, tmp_path / "run", keys)
    moved = dict.fromkeys(SITES, 0)
    for message in seen:
        assert isinstance(message.header, Update)
        rank = contract.at(message.header.site).adapter.rank  # type: ignore[union-attr]
        for name, array in message.arrays.items():
            if name.endswith(("lora_A", "lora_B")):
                assert array.shape == run.adapter[name].shape
                rows = array if name.endswith("lora_A") else array.T
                assert not rows[rank:].any()
                moved[message.header.site] += bool(rows[:rank].any())
    assert all(moved.values())
    # What a site computes with is the same scale times its part of B A.
    for worker in workers.values():
        scales = {m.scaling["default"] for m in worker.model.modules() if hasattr(m, "lora_A")}
        assert scales == {4.0}


def test_sites_of_lower_rank_under_masks(keys: dict[str, Keys], tmp_path: Path) -> None:
    plain = ranked(keys)
    masked = plain.changed(secure_aggregation={"bound": 16.0})
    first, facts, _ = play(masked, "classification", "bert", tmp_path / "masked", keys)
    second, _, _ = play(plain, "classification", "bert", tmp_path / "plain", keys)
    assert not any(f.failed for f in facts)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-3)


# --- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "last", "more", "why"),
    [
        ("ffa", {"personal": "mean-regularised"}, {}, "needs proximal_mu"),
        (
            "ffa",
            {"personal": "mean-regularised", "proximal_mu": 0.1},
            {"server_momentum": 0.9},
            "plain mean",
        ),
        (
            "ffa",
            {"personal": "mean-regularised", "proximal_mu": 0.1},
            {"robust": {"rule": "median"}},
            "plain mean",
        ),
        (
            "ffa",
            {"personal": "mean-regularised", "proximal_mu": 0.1},
            {"max_update_norm": 1.0},
            "plain mean",
        ),
        (
            "ffa",
            {"personal": "mean-regularised", "proximal_mu": 0.1},
            {"gate": {"metric": "auc", "max_degradation": 0.1}},
            "plain mean",
        ),
        ("ffa", {"personal": "mean-regularised", "proximal_mu": 0.5}, {}, "overshoot"),
        ("ffa", {"proximal_mu": 0.5, "local_steps": 2}, {}, "overshoot"),
        (
            "ffa",
            {"personal": "mean-regularised", "proximal_mu": 0.1, "adam": {}},
            {},
            "not the gradient",
        ),
        ("fedsvd", {"personal": "mean-regularised", "proximal_mu": 0.1}, {}, "does not go with"),
        ("fedavg", {"personal": "adapter"}, {}, "does not go with"),
        ("fedsvd", {"drift_correction": "scaffold", "local_steps": 2}, {}, "does not go with"),
        (
            "ffa",
            {"drift_correction": "scaffold", "local_steps": 2, "rounds": 1},
            {},
            "several rounds",
        ),
        ("ffa", {"drift_correction": "scaffold"}, {}, "several plain local steps"),
        (
            "ffa",
            {"drift_correction": "scaffold", "local_steps": 2, "proximal_mu": 0.1},
            {},
            "several plain",
        ),
        ("fedsa", {}, {"gate": {"metric": "auc", "max_degradation": 0.1}}, "no site's model"),
        ("ffa", {"personal": "head"}, {"early_stop": {"metric": "auc"}}, "no site's model"),
        (
            "ffa",
            {"drift_correction": "scaffold", "local_steps": 2},
            {"robust": {"rule": "median"}},
            "add up",
        ),
    ],
)
def test_impossible_pairs(
    method: str, last: dict[str, Any], more: dict[str, Any], why: str, keys: dict[str, Keys]
) -> None:
    contract = of_method(method, keys)
    with pytest.raises(ContractError, match=why):
        with_last(contract.changed(aggregation=more), **last)


def test_other_impossible_plans(keys: dict[str, Keys]) -> None:
    contract = of_method("ffa", keys)
    head = contract.model_dump(mode="json")["phases"][0]
    both = contract.model_dump(mode="json")["phases"][1]
    with pytest.raises(ContractError, match="last phase"):
        contract.changed(
            phases=[both | {"personal": "head", "budget_share": 0.5}, both | {"budget_share": 0.5}]
        )
    with pytest.raises(ContractError, match="nothing to federate"):
        contract.changed(phases=[head | {"personal": "head", "budget_share": 1.0}], adapter=None)
    with pytest.raises(ContractError, match="not what this phase trains"):
        contract.changed(phases=[head | {"personal": "adapter", "budget_share": 1.0}], adapter=None)
    sites = [{"name": "north", "rank": 9}, {"name": "south"}, {"name": "east"}]
    with pytest.raises(ContractError, match="rank = 9"):
        contract.changed(sites=sites)
    with pytest.raises(ContractError, match="needs LoRA"):
        contract.changed(sites=sites, adapter=None, phases=[head | {"budget_share": 1.0}])


@pytest.mark.parametrize(
    ("method", "last", "more"),
    [
        ("fedex", {}, {}),
        ("ffa", {}, {"robust": {"rule": "median"}}),
        ("ffa", {"drift_correction": "scaffold", "local_steps": 2}, {}),
        ("ffa", {"personal": "head"}, {}),
    ],
)
def test_what_zeros_of_a_lower_rank_would_spoil(
    method: str, last: dict[str, Any], more: dict[str, Any], keys: dict[str, Keys]
) -> None:
    with_last(of_method(method, keys).changed(aggregation=more), **last)  # of one rank it may be
    contract = ranked(keys)
    with pytest.raises(ContractError, match="one rank"):
        with_last(contract, **last).changed(aggregation={"method": method} | more)


def test_somebody_must_train_each_rank(keys: dict[str, Keys]) -> None:
    with pytest.raises(ContractError, match="nobody would train the rest"):
        ranked(keys).changed(sites=[{"name": site, "rank": 2} for site in SITES])


def test_the_mean_of_copies_holds_when_a_site_is_missing(
    keys: dict[str, Keys], tmp_path: Path
) -> None:
    """A copy that has not moved counts in the mean as it is."""
    contract = with_last(
        of_method("ffa", keys, privacy=PLAIN),
        personal="mean-regularised",
        proximal_mu=1.0,
        head_lr=0.2,
        adapter_lr=0.2,
        rounds=5,
    ).changed(quorum=2, aggregation={"averaging_start": 0.9})
    workers = team(contract, "classification", "bert", tmp_path / "w", keys)
    handles: dict[str, Any] = {site: worker.handle for site, worker in workers.items()}
    initial = build(contract, tiny.folder_of("bert"), EXACT).initial_arrays()
    run = FederatedRun(contract, RunStore.create(tmp_path / "run", contract), "run-1", initial)
    before = contract.phases[0].rounds
    while run.server_round < contract.rounds:
        gone = {"east": lambda _: SILENT} if run.server_round == before + 2 else {}
        drive_round(run.stages(SITES), handles | gone)
    copies = [own_of(worker).tensors for worker in workers.values()]
    for name in copies[0]:
        mean = np.mean([copy[name] for copy in copies], axis=0)
        np.testing.assert_allclose(run.adapter[name], mean, atol=1e-5)


def test_a_request_that_asks_again_gets_the_same_bytes(
    keys: dict[str, Keys], tmp_path: Path
) -> None:
    """Also where what the round before left is gone, and the latest round counts, not the latest
    charge."""
    contract = of_method("fedsa", keys)
    worker = worker_of(
        contract,
        "classification",
        "bert",
        tmp_path,
        "north",
        PrivacyLedger.in_memory("north", keys["north"]),
    )
    start, first = tiny.moved(worker.model), contract.phases[0].rounds + 1

    def asked(number: int, attempt: int = 1) -> bytes:
        header = Train(contract=contract.hash, run="r", round=number, attempt=attempt)
        return worker.handle(messages.pack(Message(header, start)))

    asked(first)
    last = asked(first + 1)
    kept = own_of(worker, "r")
    assert isinstance(messages.unpack(asked(first, 2)).header, Update)
    assert own_of(worker, "r").content() == kept.content()
    charges = len(worker.ledger.charges)
    files = worker.ledger.files
    files._in_memory = {n: content for n, content in files._in_memory.items() if content == last}
    assert asked(first + 1) == last
    assert isinstance(messages.unpack(asked(first + 2)).header, Refusal)
    assert len(worker.ledger.charges) == charges
