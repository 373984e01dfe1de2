"""Rounds of real workers for every task: what leaves a site is the phase's tensors and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.common.errors import RefusalError
from silotune.common.models.base import Network
from silotune.common.models.batching import Block
from silotune.common.models.factory import build
from silotune.common.protocol import messages, packing
from silotune.common.protocol.messages import Arrays, Message, Refusal, Train, Update
from silotune.common.protocol.tensors import trained_names
from silotune.server.rounds.evaluation import PublicTest
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore
from tests import tiny
from tests.federation import EXACT, SITES, Answer, ask, of_method, play, team, worker_of


@pytest.mark.parametrize("unit", ["record", "entity"])
@pytest.mark.parametrize(("kind", "model"), tiny.CASES)
def test_a_run_of_every_task(kind: str, model: str, unit: str, tmp_path: Path) -> None:
    contract = tiny.contract_of(kind, model, unit=unit)
    worker = worker_of(contract, kind, model, tmp_path)
    arrays = worker.model.initial_arrays()
    for number in range(1, contract.rounds + 1):
        plan = contract.round_plan(number)
        sent = {n: a for n, a in arrays.items() if n.startswith("head.") or plan.phase.adapts}
        reply = ask(worker, number, sent)
        assert isinstance(reply.header, Update)
        assert sorted(reply.arrays) == trained_names(arrays, plan.trains)
        if kind == "language":
            assert all(name.endswith(".lora_B") for name in reply.arrays)
        for name, change in reply.arrays.items():
            assert change.shape == arrays[name].shape
            assert np.isfinite(change).all()
            assert change.any()
            arrays[name] = arrays[name] + change
        assert reply.header.metrics == {}
        assert 0 < (reply.header.epsilon or 0) <= contract.privacy.epsilon
    assert reply.header.epsilon == pytest.approx(contract.privacy.epsilon, rel=1e-4)
    # Another run finds no budget left.
    wire = messages.pack(Message(Train(contract=contract.hash, run="s", round=1), sent))
    other = messages.unpack(worker.handle(wire)).header
    assert isinstance(other, Refusal)


@pytest.mark.parametrize(
    ("kind", "released"),
    [
        ("classification", ("loss", "accuracy")),
        ("multi-label", ("loss", "accuracy")),
        ("tokens", ("loss", "accuracy")),
        ("regression", ("loss",)),
        ("bi", ("loss", "accuracy")),
        ("language", ("loss", "accuracy")),
    ],
)
def test_metrics_that_a_contract_pays_for(
    kind: str, released: tuple[str, ...], tmp_path: Path
) -> None:
    """Without privacy they are the means over the units of what the task's objective says."""
    model = "llama" if kind == "language" else "bert"
    contract = tiny.contract_of(
        kind,
        model,
        releases=[{"metric": m, "share": 0.1, "bound": 9.0} for m in released],
    ).changed(privacy={"mode": "none", "expected_units": 24.0})
    worker = worker_of(contract, kind, model, tmp_path)
    arrays = tiny.moved(worker.model)
    number, trains = contract.rounds, contract.phases[-1].trains
    reply = ask(worker, number, arrays).header
    assert isinstance(reply, Update)
    network, data = worker.model, worker.data
    network.load(arrays)
    values: dict[str, list[float]] = {"loss": [], "accuracy": []}
    for block, n in network.micro_batches(
        data.encoded, data.units.members, adapter=trains != "head"
    ):
        outputs = network(data.encoded, block, adapter=True)
        targets = network.targets(data.encoded, data.labels, block)
        values["loss"] += network.objective.losses(outputs, targets)[:n].tolist()
        if "accuracy" in released:
            values["accuracy"] += network.objective.correct(outputs, targets)[:n].tolist()
    assert set(reply.metrics) == set(released)
    for name in released:
        assert reply.metrics[name] == pytest.approx(np.mean(values[name]), rel=1e-3)


def test_without_noise_a_task_of_each_kind_is_learnt(tmp_path: Path) -> None:
    """The steps go downhill: the loss on the records themselves gets smaller."""
    for kind, model in tiny.CASES:
        rates = {"head_lr": 0.2} | ({} if model == "one-hot" else {"adapter_lr": 0.1})
        contract = tiny.contract_of(kind, model).changed(
            privacy={"mode": "none", "expected_units": 24.0}
        )
        (*_, last) = contract.model_dump(mode="json")["phases"]
        rates = {k: v for k, v in rates.items() if last[k] is not None}
        phase = last | rates | {"rounds": 1, "local_steps": 12, "budget_share": 1.0}
        contract = contract.changed(phases=[phase])
        worker = worker_of(contract, kind, model, tmp_path)
        arrays = worker.model.initial_arrays()
        reply = ask(worker, 1, arrays)
        after = arrays | {n: arrays[n] + c for n, c in reply.arrays.items()}
        test = PublicTest(contract, worker.model, {"own": tmp_path / "north.csv"})
        losses = [test.metrics(a, model != "one-hot")["loss"] for a in (arrays, after)]
        assert losses[1] < losses[0], (kind, model)  # type: ignore[operator]


# --- masked ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("tokens", "bert"),
        ("regression", "bert"),
        ("language", "llama"),
    ],
)
def test_a_masked_run_gives_the_adapter_of_an_unmasked_one(
    kind: str, model: str, tmp_path: Path
) -> None:
    keys = {site: Keys.in_memory() for site in SITES}
    plain = tiny.contract_of(kind, model).changed(
        sites=[{"name": site, "public_key": keys[site].public} for site in SITES], quorum=3
    )
    masked = plain.changed(secure_aggregation={"bound": 16.0})
    first, facts, seen = play(masked, kind, model, tmp_path / "masked", keys)
    second, _, others = play(plain, kind, model, tmp_path / "plain", keys)
    assert [sorted(f.sites) for f in facts] == [sorted(SITES)] * plain.rounds
    assert not any(f.failed for f in facts)
    masks = [message for message in seen if message.header.kind == "masked"]
    assert len(masks) == len(SITES) * plain.rounds
    assert not any(message.arrays for message in seen)  # nothing in the clear
    assert sum(bool(message.arrays) for message in others) == len(SITES) * plain.rounds
    # A unit of the ring a site and round, and what momentum makes of it.
    off = 3 * 2.8 * len(SITES) / 2 / packing.factor(masked, 1.0) + 1e-6
    initial = build(plain, tiny.folder_of(model), EXACT).initial_arrays()
    for name in trained_names(initial, plain.round_plan(plain.rounds).trains):
        assert float(np.abs(first[name] - second[name]).max()) <= off
        assert float(np.abs(second[name] - initial[name]).max()) > 10 * off


# --- methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "exact"),
    [
        ("ffa", True),
        ("fedsvd", True),
        ("rolora", True),
        ("fedavg", False),
        ("flexlora", False),
        ("fedex", False),
    ],
)
def test_a_run_of_each_method_and_what_averaging_loses(
    method: str, exact: bool, tmp_path: Path
) -> None:
    """Each round trains the factors that its method says; where all sites share one of them the
    mean of the products is the product of the means, and else it is not."""
    keys = {site: Keys.in_memory() for site in SITES}
    contract = of_method(method, keys, privacy={"mode": "none", "expected_units": 24.0})
    adapter, facts, seen = play(contract, "classification", "bert", tmp_path / "run", keys)
    assert facts[0].residual is None  # the head's
    if method in ("flexlora", "fedex"):  # which lose nothing of it
        assert all(fact.residual is None for fact in facts)
    else:
        # While B is zero A's gradients are, too.
        assert facts[1].residual == pytest.approx(0, abs=1e-6)
        for fact in facts[2:]:
            assert fact.residual is not None
            assert (fact.residual < 1e-6) == exact
    trained = [
        {name.rsplit(".", 1)[-1] for name in message.arrays if "lora" in name}
        for message in seen
        if message.arrays
    ]
    rounds = [trained[at] for at in range(0, len(trained), len(SITES))]
    both, b, a = {"lora_A", "lora_B"}, {"lora_B"}, {"lora_A"}
    expected = {"rolora": [b, a, b, a], "ffa": [b] * 4, "fedsvd": [b] * 4}
    assert rounds[1:] == expected.get(method, [both] * 4)
    assert not any("residual" in name for message in seen for name in message.arrays)
    if method in ("fedsvd", "flexlora"):
        for name, array in adapter.items():
            if name.endswith("lora_A"):
                np.testing.assert_allclose(array @ array.T, np.eye(len(array)), atol=1e-4)


@pytest.mark.parametrize("method", ["fedsvd", "rolora", "fedavg", "flexlora", "fedex"])
def test_a_run_of_a_method_is_taken_up_again_where_it_was(method: str, tmp_path: Path) -> None:
    """After each round another server reads the files and goes on, to the same bits."""
    keys = {site: Keys.in_memory() for site in SITES}
    contract = of_method(method, keys, privacy={"mode": "none", "expected_units": 24.0})
    contract = contract.changed(
        aggregation={"server_momentum": 0.0 if method in ("flexlora", "fedex") else 0.9}
    )
    whole, _, _ = play(contract, "classification", "bert", tmp_path / "whole", keys)
    folder = tmp_path / "broken"
    workers = team(contract, "classification", "bert", folder, keys)
    handles: dict[str, Answer] = {site: worker.handle for site, worker in workers.items()}
    initial = build(contract, tiny.folder_of("bert"), EXACT).initial_arrays()
    registry = RunStore.create(folder / "run", contract)
    for number in range(contract.rounds):
        run = FederatedRun(contract, registry, "run-1", initial)
        assert run.restore() == number
        drive_round(run.stages(list(handles)), handles)
        registry.close()
        registry = RunStore.open(folder / "run", contract)
    found = registry.adapter()
    assert found.keys() == whole.keys()
    assert all(found[name].tobytes() == whole[name].tobytes() for name in whole)


def test_fedex_is_the_mean_of_the_sites_models(tmp_path: Path) -> None:
    """One round of both factors: every adapted layer does to an input what the mean of the sites'
    layers does, and with plain averages it does not."""
    keys = {site: Keys.in_memory() for site in SITES}
    off = {}
    for method in ("fedex", "fedavg"):
        contract = of_method(method, keys, privacy={"mode": "none", "expected_units": 24.0})
        phase = contract.model_dump(mode="json")["phases"][1] | {"rounds": 1, "budget_share": 1.0}
        contract = contract.changed(phases=[phase])
        folder = tmp_path / method
        workers = team(contract, "classification", "bert", folder, keys)
        network = build(contract, tiny.folder_of("bert"), EXACT)
        start, moved = tiny.moved(network), []

        def answer(
            wire: bytes, site: str, workers: Any = workers, start: Any = start, moved: Any = moved
        ) -> bytes:
            reply: bytes = workers[site].handle(wire)
            change = messages.unpack(reply).arrays
            if change:
                moved.append(start | {n: start[n] + c for n, c in change.items()})
            return reply

        handles: dict[str, Answer] = {s: lambda wire, s=s: answer(wire, s) for s in SITES}
        run = FederatedRun(contract, RunStore.create(folder / "run", contract), "r", start)
        while not run.done:
            assert not drive_round(run.stages(list(handles)), handles).failed
        layer = next(n for n in start if n.endswith("query.lora_A")).removesuffix(".lora_A")

        def weight(arrays: Arrays, layer: str = layer, scale: float = 4.0) -> Any:
            return scale * (arrays[f"{layer}.lora_B"] @ arrays[f"{layer}.lora_A"]) + arrays.get(
                f"{layer}.residual", np.float32(0)
            )

        mean = np.mean([weight(arrays) for arrays in moved], axis=0)
        off[method] = np.linalg.norm(weight(run.registry.adapter()) - mean) / np.linalg.norm(
            mean - weight(start)
        )
        if method == "fedex":  # and so does the network itself
            arrays = run.registry.adapter()
            network.load(arrays)
            module = dict(network._named_layers())[layer]
            x = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32)
            found = module(torch.from_numpy(x)).numpy(force=True)
            plain = module.base_layer.base
            base = plain.weight.numpy(force=True) + weight(arrays)
            np.testing.assert_allclose(found, x @ base.T + plain.bias.numpy(force=True), atol=1e-5)
    assert off["fedex"] < 1e-5
    assert off["fedavg"] > 1e-3


def test_fedsvd_is_ffa_in_other_coordinates_through_real_workers(tmp_path: Path) -> None:
    """Without noise, for noise is drawn in coordinates: A is orthonormal from the beginning."""
    keys = {site: Keys.in_memory() for site in SITES}
    adapters = []
    for method in ("ffa", "fedsvd"):
        contract = of_method(method, keys, privacy={"mode": "none", "expected_units": 24.0})
        contract = contract.changed(aggregation={"server_momentum": 0.9})
        adapters.append(play(contract, "classification", "bert", tmp_path / method, keys)[0])
    first, second = adapters
    for name in first:
        if name.endswith("lora_B"):
            low = name.removesuffix("B") + "A"
            product = first[name] @ first[low]
            assert np.abs(product).max() > 1e-3
            np.testing.assert_allclose(second[name] @ second[low], product, atol=1e-5)
        elif name.startswith("head."):
            np.testing.assert_allclose(second[name], first[name], atol=1e-5)


@pytest.mark.parametrize("method", ["fedsvd", "rolora", "fedavg"])
def test_a_masked_run_of_a_method_of_sums(method: str, tmp_path: Path) -> None:
    keys = {site: Keys.in_memory() for site in SITES}
    plain = of_method(method, keys)
    masked = plain.changed(secure_aggregation={"bound": 16.0})
    first, facts, seen = play(masked, "classification", "bert", tmp_path / "masked", keys)
    second, _, _ = play(plain, "classification", "bert", tmp_path / "plain", keys)
    assert not any(f.failed for f in facts)
    assert not any(message.arrays for message in seen)
    assert all(fact.residual is None for fact in facts)  # nobody can know
    for name in first:
        if method != "fedsvd":
            np.testing.assert_allclose(first[name], second[name], atol=1e-3)
        elif name.endswith("lora_B"):
            # A rounding of the ring turns its coordinates a little, and the noise is drawn in them:
            # the products are near each other, beside how far they have come.
            low = name.removesuffix("B") + "A"
            products = [run[name] @ run[low] for run in (first, second)]
            apart = np.linalg.norm(products[0] - products[1])
            assert apart < 0.1 * np.linalg.norm(products[0])


def test_a_robust_rule_leaves_out_a_site_that_says_anything(tmp_path: Path) -> None:
    """One of three sends its change a thousand times over; the median does not follow."""
    keys = {site: Keys.in_memory() for site in SITES}
    plain = of_method("ffa", keys, privacy={"mode": "none", "expected_units": 24.0})
    robust = plain.changed(aggregation={"robust": {"rule": "median"}})
    found = {}
    for name, contract in (("plain", plain), ("robust", robust)):
        initial = build(contract, tiny.folder_of("bert"), EXACT).initial_arrays()
        folder = tmp_path / name
        workers = team(contract, "classification", "bert", folder, keys)

        def poisoned(wire: bytes, site: str = "east", workers: Any = workers) -> bytes:
            reply = messages.unpack(workers[site].handle(wire))
            if not isinstance(reply.header, Update):
                return messages.pack(reply)
            arrays = {n: np.float32(1000) * a for n, a in reply.arrays.items()}
            return messages.pack(
                messages.signed(Message(reply.header, arrays), workers[site].ledger.identity.sign)
            )

        handles = {site: workers[site].handle for site in SITES} | {"east": poisoned}
        run = FederatedRun(contract, RunStore.create(folder / "run", contract), "r", initial)
        while not run.done:
            assert not drive_round(run.stages(list(handles)), handles).failed
        found[name] = max(float(np.abs(a).max()) for a in run.registry.adapter().values())
    assert found["plain"] > 100
    assert found["robust"] < 10


def test_a_proximal_term_holds_local_steps_back(tmp_path: Path) -> None:
    """Equal gradients g, rate h and n steps go n h g; with mu h = 1 every step goes back all the
    way that came before, so that the round comes no further than one step."""
    keys = {site: Keys.in_memory() for site in SITES}
    moved = {}
    for proximal_mu in (None, 10.0):
        contract = of_method("ffa", keys, privacy={"mode": "none", "expected_units": 24.0})
        phase = contract.model_dump(mode="json")["phases"][0] | {
            "head_lr": 0.1,
            "local_steps": 8,
            "budget_share": 1.0,
            "proximal_mu": proximal_mu,
        }
        contract = contract.changed(phases=[phase], adapter=None)
        folder = tmp_path / str(proximal_mu)
        folder.mkdir()
        worker = worker_of(contract, "classification", "bert", folder)
        reply = ask(worker, 1, worker.model.initial_arrays())
        moved[proximal_mu] = float(np.linalg.norm(reply.arrays["head.weight"]))
    assert 0 < moved[10.0] < 0.3 * moved[None]


@pytest.mark.parametrize("mode", ["dp", "none"])
def test_blocks_are_filled_wherever_records_are_private(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one shape keep a record from moving the roundings of others. Where nothing is
    private they are not needed: the gradient is the same but for roundings, with fewer rows."""
    keys = {site: Keys.in_memory() for site in SITES}
    more: dict[str, Any] = (
        {} if mode == "dp" else {"privacy": {"mode": "none", "expected_units": 24.0}}
    )
    contract = of_method("ffa", keys, **more)
    worker = worker_of(
        contract,
        "classification",
        "bert",
        tmp_path,
        "north",
        PrivacyLedger.in_memory("north", keys["north"]),
    )
    network, sizes = worker.model, []
    batches = Network.micro_batches

    def seen(self: Network, *args: Any, **kwargs: Any) -> Iterator[Block]:
        for block in batches(self, *args, **kwargs):
            sizes.append((len(block.rows), block.n))
            yield block

    monkeypatch.setattr(Network, "micro_batches", seen)
    start = tiny.moved(network)
    reply = ask(worker, contract.rounds, start)
    assert sum(n for _, n in sizes) <= 24
    if mode == "dp":
        assert {rows for rows, _ in sizes} == {EXACT.micro_batch}
        return
    assert all(rows == n for rows, n in sizes)
    assert network.private
    monkeypatch.setattr(Network, "batch_invariant", lambda *_: nullcontext())
    filled = worker_of(
        contract,
        "classification",
        "bert",
        tmp_path,
        "north",
        PrivacyLedger.in_memory("north", keys["north"]),
    )
    again = ask(filled, contract.rounds, start)
    for name, change in reply.arrays.items():
        np.testing.assert_allclose(change, again.arrays[name], atol=1e-5)


# --- permissions -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "model"), tiny.CASES)
def test_a_site_takes_part_in_the_tasks_and_models_that_it_permits(kind: str, model: str) -> None:
    contract = tiny.contract_of(kind, model)
    policy = permissive_policy(contract, "north", Path("rows.csv"), None)

    def refusals(**permits: Any) -> list[str]:
        own = policy.model_copy(update={"permits": policy.permits.model_copy(update=permits)})
        found = own.refusals(contract)
        assert all(isinstance(refusal, RefusalError) for refusal in found)
        return [str(refusal) for refusal in found]

    assert refusals() == []
    (sentence,) = refusals(tasks=("nothing",))
    assert f"task '{contract.task.kind}' is not in permits.tasks" in sentence
    if model == "one-hot":
        assert refusals(models=("0" * 64,)) == []
        return
    assert refusals(models=(tiny.sha256(tiny.folder_of(model)),)) == []
    (sentence,) = refusals(models=("0" * 64,))
    assert "its model's SHA-256 is not in permits.models" in sentence
