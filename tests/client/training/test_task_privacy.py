"""For every task, unit and model: one unit moves the sum by at most the clip norm, and no other's
part of it by as much as a rounding; and rounds of real workers carry it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from silotune.client.privacy.accountant import Mechanism
from silotune.client.site.policy import permissive_policy
from silotune.client.training import local_round, selftest
from silotune.client.training.dataset import Dataset
from silotune.client.training.dp_optimizer import DPOptimizer, private_gradient
from silotune.client.training.local_round import train_round
from silotune.client.training.noise import NoiseSource
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.schedule import TensorGroups
from silotune.common.errors import DataError, RefusalError
from silotune.common.models.adapted import Adapted
from silotune.common.models.base import Network
from silotune.common.models.factory import build
from silotune.common.protocol.tensors import trained_names
from silotune.common.tasks import classification, token_classification
from tests import tiny

Patch = pytest.MonkeyPatch
CLIP = 0.1
EXACT = Performance(bf16="off", device="cpu", micro_batch=4)
UNITS = ["record", "entity"]
Rows = list[dict[str, str]]


class Silent(NoiseSource):
    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.zeros(shape)


class Summed(DPOptimizer):
    """Leaves the clipped sum before any noise, in whole units, in `.total`."""

    total: Tensor

    def add_noise(self) -> None:
        self.total = torch.cat([p.summed_grad.flatten() for p in self.params])
        super().add_noise()


def model_of(contract: Contract, kind: str, performance: Performance = EXACT) -> Network:
    return build(contract, None if kind == "one-hot" else tiny.folder_of(kind), performance)


def phases_of(contract: Contract) -> tuple[TensorGroups, ...]:
    return contract.trainings


def clipped_sum(
    model: Network,
    data: Dataset,
    trains: TensorGroups,
    units: list[int] | None = None,
    dropout_mask: Tensor | None = None,
) -> tuple[Tensor, Summed]:
    """The sum over some units, as training takes it, in whole units of the optimizer's."""
    tensors, adapter_active = model.named_tensors(), trains != {"head"}
    names = trained_names(tensors, trains)
    with model.requiring(names):  # Opacus' optimizer takes no others
        optimizer = Summed(
            torch.optim.SGD([tensors[name] for name in names], lr=1.0),
            source=Silent(site="x"),
            noise_multiplier=1e-6,
            clip_norm=CLIP,
            divisor=1.0,
        )

    def losses(index: Tensor) -> Tensor:
        outputs = model(data.encoded, index, adapter=adapter_active, dropout_mask=dropout_mask)
        return model.objective.losses(outputs, model.targets(data.encoded, data.labels, index))

    drawn = torch.arange(len(data.units)) if units is None else torch.tensor(units)
    groups = data.units.groups(
        drawn, lambda rows: model.micro_batches(data.encoded, rows, adapter=adapter_active)
    )
    with model.requiring(names):
        private_gradient(
            model.trained_modules(trains),
            optimizer,
            groups,
            losses,
            gradients=model.performance.gradients,
        )
    return optimizer.total, optimizer


def without(rows: Rows, unit: int, of: str) -> Rows:
    if of == "record":
        return rows[:unit] + rows[unit + 1 :]
    return [row for row in rows if row["person"] != f"p{unit}"]


def base_of(model: Network) -> list[Tensor]:
    """The frozen weights that the adapted layers stand on."""
    if not isinstance(model, Adapted):
        return []
    return list(model.backbone.base.parameters())


def check_sensitivity(
    contract: Contract, model: Network, kind: str, dropout_mask: Tensor | None = None, n: int = 20
) -> None:
    rows, of = tiny.rows_of(kind, n), contract.privacy.unit
    frozen = {tensor: tensor.clone() for tensor in base_of(model)}
    model.load(tiny.moved(model))
    data = tiny.load(rows, contract, model)
    for trains in phases_of(contract):
        whole, optimizer = clipped_sum(model, data, trains, dropout_mask=dropout_mask)
        assert optimizer.units == len(data.units) == (n if of == "record" else 6)
        assert optimizer.unclipped < optimizer.units  # or nothing is tried here
        for unit in (0, 3, 5):
            alone, _ = clipped_sum(model, data, trains, [unit], dropout_mask)
            norm = float(alone.norm()) * optimizer.unit
            assert 0 < norm <= CLIP
            less = tiny.load(without(rows, unit, of), contract, model)
            rest, _ = clipped_sum(model, less, trains, dropout_mask=dropout_mask)
            # To the bit: what is left out is this unit's part and nothing else.
            assert torch.equal(whole - rest, alone)
    # All models of this process are made on these weights, and all lanes.
    for tensor, before in frozen.items():
        assert torch.equal(tensor, before)
        assert tensor.grad is None
        assert not tensor.requires_grad


# --- every task, unit and model ----------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("kind", "model"), tiny.CASES)
def test_one_unit_moves_the_sum_by_its_own_clipped_part(kind: str, model: str, unit: str) -> None:
    contract = tiny.contract_of(kind, model, unit=unit)
    check_sensitivity(contract, model_of(contract, model), kind)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("tokens", "bert"),
        ("bi", "bert"),
        ("regression", "llama"),
        ("language", "llama"),
    ],
)
@pytest.mark.parametrize(
    "performance",
    [
        {"bf16": "on"},
        {"bf16": "off", "gradients": "hooks"},
        {"bf16": "off", "checkpointing": True, "micro_batch": 7},
    ],
    ids=["bf16", "hooks", "checkpointing"],
)
def test_so_it_is_with_other_engines(kind: str, model: str, performance: dict[str, Any]) -> None:
    contract = tiny.contract_of(kind, model)
    settings = Performance.model_validate({"device": "cpu", "micro_batch": 4} | performance)
    check_sensitivity(contract, model_of(contract, model, settings), kind)


METHODS: dict[str, dict[str, Any]] = {
    "rslora": {"rank": 2, "targets": "…"},
    "core": {"rank": 3, "targets": "…"},
    "ia3": {"targets": "…"},
    "prefix": {"length": 3},
    "prompt": {"length": 3},
}


def with_method(contract: Contract, method: str, model: str) -> Contract:
    adapter = {"kind": method, "layers": 2, **METHODS[method]}
    if "targets" in adapter:
        adapter["targets"] = tiny.TARGETS[model]
    return Contract.model_validate(contract.model_dump(mode="json") | {"adapter": adapter})


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("classification", "bert"),
        ("tokens", "llama"),
        ("language", "llama"),
    ],
)
def test_so_it_is_with_other_adapters(kind: str, model: str, method: str, unit: str) -> None:
    contract = with_method(tiny.contract_of(kind, model, unit=unit), method, model)
    network = model_of(contract, model)
    check_sensitivity(contract, network, kind)
    selftest.check(contract, network)


@pytest.mark.parametrize("rank", [1, 5, 7, 9, 11, 16])
def test_so_it_is_with_a_core_of_any_rank(rank: int) -> None:
    """A row of 5 numbers begins where memory is not aligned, and its product rounds otherwise."""
    contract = with_method(tiny.contract_of("classification", "bert"), "core", "bert")
    contract = contract.changed(adapter={"rank": rank})
    network = model_of(contract, "bert")
    check_sensitivity(contract, network, "classification")
    selftest.check(contract, network)


@pytest.mark.parametrize("kind", ["lora", "core"])
def test_a_rank_beyond_a_layers_size_is_told(kind: str) -> None:
    contract = tiny.contract_of("classification", "bert")
    adapter = {"kind": kind, "rank": 17, "layers": 2, "targets": ["query"]}
    contract = Contract.model_validate(contract.model_dump(mode="json") | {"adapter": adapter})
    with pytest.raises(DataError, match="more than the 16 inputs or outputs"):
        model_of(contract, "bert")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("rolora", "A"),
        ("fedavg", "adapter+A"),
        ("flexlora", "adapter+A"),
        ("fedsvd", "adapter"),
        ("fedex", "adapter+A"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("classification", "bert"),
        ("tokens", "llama"),
        ("language", "llama"),
        ("bi", "bert"),
    ],
)
def test_so_it_is_with_whichever_factor_of_lora_is_trained(
    kind: str, model: str, method: str, trained: str, unit: str
) -> None:
    contract = tiny.contract_of(kind, model, unit=unit)
    phases = [p | {"rounds": 2} for p in contract.model_dump(mode="json")["phases"]]
    contract = contract.changed(
        phases=phases, aggregation={"method": method, "server_momentum": 0.0}
    )
    head = set() if kind == "language" else {"head"}
    assert head | set(trained.split("+")) in contract.trainings
    network = model_of(contract, model)
    check_sensitivity(contract, network, kind)
    selftest.check(contract, network)


@pytest.mark.parametrize("method", ["core", "ia3", "prefix", "prompt"])
def test_other_adapters_need_the_expanded_engine(method: str) -> None:
    contract = with_method(tiny.contract_of("classification", "bert"), method, "bert")
    hooks = EXACT.model_copy(update={"gradients": "hooks"})
    with pytest.raises(DataError, match="expanded"):
        model_of(contract, "bert", hooks)


@pytest.mark.parametrize("method", ["rslora", "core", "ia3"])
def test_at_first_the_adapter_changes_nothing(method: str) -> None:
    """So that phases that train the head alone and those behind them go together."""
    contract = with_method(tiny.contract_of("classification", "bert"), method, "bert")
    model = model_of(contract, "bert")
    data = tiny.load(tiny.rows_of("classification", 6), contract, model)
    model.load(model.initial_arrays())
    for row in range(6):
        index = torch.tensor([row])
        before, after = (model.features(data.encoded, index, adapter=a) for a in (False, True))
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression"])
def test_so_it_is_with_a_hidden_layer(kind: str, unit: str) -> None:
    contract = tiny.contract_of(kind, "one-hot", unit=unit).changed(model={"hidden": 5})
    check_sensitivity(contract, model_of(contract, "one-hot"), kind)


@pytest.mark.parametrize("unit", UNITS)
def test_so_it_is_with_weighed_labels_and_smoothing(unit: str) -> None:
    """A weight makes a gradient longer before it is clipped, not after."""
    contract = tiny.contract_of("classification", "bert", unit=unit).changed(
        task={"class_weights": [0.1, 1.0, 50.0], "label_smoothing": 0.2}
    )
    check_sensitivity(contract, model_of(contract, "bert"), "classification")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("settings", [{}, {"bf16": "on"}, {"gradients": "hooks"}])
def test_so_it_is_with_weighed_tags(unit: str, settings: dict[str, Any]) -> None:
    contract = weighed_tags(unit)
    check_sensitivity(
        contract, model_of(contract, "bert", EXACT.model_copy(update=settings)), "tokens"
    )


def weighed_tags(unit: str = "record") -> Contract:
    return tiny.contract_of("tokens", "bert", unit=unit).changed(
        task={"class_weights": [0.1, 1.0, 50.0, 1.0, 1.0]}
    )


@pytest.mark.parametrize("engine", ["expanded", "hooks", "ghost"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("kind", "model"), tiny.CASES)
def test_the_self_test_passes(
    kind: str, model: str, unit: str, engine: str, monkeypatch: Patch
) -> None:
    if (unit, engine) == ("entity", "ghost"):
        return  # which ghost clipping does not have
    monkeypatch.setattr(selftest, "_passed", WeakKeyDictionary())
    contract = tiny.contract_of(kind, model, unit=unit)
    network = model_of(contract, model, EXACT.model_copy(update={"gradients": engine}))
    if (kind, engine) == ("bi", "ghost"):  # Opacus knows no module that is used twice
        policy = permissive_policy(contract, "north", Path("rows.csv"), None, network.performance)
        assert "pairs read apart" in str(policy.refusals(contract)[0])
    else:
        selftest.check(contract, network)


def mean_of_the_batchs_tokens(patch: Patch) -> None:
    """As transformers' own loss: a long text takes weight from all others."""

    def broken(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=token_classification.IGNORED,
            reduction="none",
        ).view(labels.shape)
        return losses.sum(dim=1) / (labels != token_classification.IGNORED).sum() * len(labels)

    for module in ("token_classification", "language_modeling"):
        patch.setattr(f"silotune.common.tasks.{module}.per_example_loss", broken)


def weights_of_the_batch(patch: Patch) -> None:
    """As torch's weighted mean: a rare label takes weight from all others."""
    original = classification.per_example_loss
    patch.setattr(
        classification,
        "per_example_loss",
        lambda logits, labels, smoothing: (
            original(logits, labels, smoothing) / (1.0 + labels.float().mean())
        ),
    )


def negatives_of_the_batch(patch: Patch) -> None:
    """As a contrastive loss: each pair against the others' candidates."""

    def broken(_: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets * (outputs[:, 0].logsumexp(0) - outputs[:, 0])

    patch.setattr("silotune.common.tasks.ranking.RankingObjective.losses", broken)


def weights_of_the_batchs_tokens(patch: Patch) -> None:
    """As torch's own loss with weights: over what the tokens of the batch weigh."""

    def broken(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        assert weights is not None
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            weights,
            ignore_index=token_classification.IGNORED,
            reduction="none",
        ).view(labels.shape)
        return (
            losses.sum(dim=1)
            / weights[labels[labels != token_classification.IGNORED]].sum()
            * len(labels)
        )

    patch.setattr(token_classification, "per_example_loss", broken)


def test_the_self_test_is_by_the_contracts_weights(monkeypatch: Patch) -> None:
    monkeypatch.setattr(selftest, "_passed", WeakKeyDictionary())
    contract = weighed_tags()
    model = model_of(contract, "bert")
    selftest.check(contract, model)
    selftest._passed.clear()
    weights_of_the_batchs_tokens(monkeypatch)
    with pytest.raises(RefusalError, match="self-test"):
        selftest.check(contract, model)


@pytest.mark.parametrize(
    ("kind", "model", "mutation"),
    [
        ("tokens", "bert", mean_of_the_batchs_tokens),
        ("language", "llama", mean_of_the_batchs_tokens),
        ("classification", "bert", weights_of_the_batch),
        ("bi", "bert", negatives_of_the_batch),
        ("cross", "llama", negatives_of_the_batch),
    ],
)
def test_the_self_test_refuses_a_loss_that_knows_its_batch(
    kind: str, model: str, mutation: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(selftest, "_passed", WeakKeyDictionary())
    mutation(monkeypatch)
    contract = tiny.contract_of(kind, model)
    with pytest.raises(RefusalError, match="self-test") as refusal:
        selftest.check(contract, model_of(contract, model))
    assert refusal.value.code == "E208"


# --- records at the edges ----------------------------------------------------------------------

EDGES: dict[str, dict[str, str]] = {
    "tokens": {"text": "", "label": ""},
    "language": {"text": "", "label": "burn"},
    "classification": {"text": ""},
    "bi": {"question": "", "answer": ""},
    "cross": {"question": "", "answer": ""},
}


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("tokens", "bert"),
        ("classification", "bert"),
        ("bi", "bert"),
        ("cross", "bert"),
        ("language", "llama"),
    ],
)
def test_an_empty_record_moves_no_other(kind: str, model: str) -> None:
    contract = tiny.contract_of(kind, model)
    network = model_of(contract, model)
    network.load(tiny.moved(network))
    rows = tiny.rows_of(kind, 8)
    empty = [rows[0], rows[1] | EDGES[kind], *rows[2:]]
    for trains in phases_of(contract):
        found, optimizer = clipped_sum(network, tiny.load(empty, contract, network), trains)
        rest, _ = clipped_sum(
            network, tiny.load(without(rows, 1, "record"), contract, network), trains
        )
        assert float((found - rest).norm()) * optimizer.unit <= CLIP
        alone = tiny.load(empty[1:2], contract, network)
        assert torch.equal(found - rest, clipped_sum(network, alone, trains)[0])


# --- dropout and schedule ----------------------------------------------------------------------


def changed_phases(contract: Contract, **phase: Any) -> Contract:
    phases = contract.model_dump(mode="json")["phases"]
    return contract.changed(phases=[own | phase for own in phases])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("classification", "bert"),
        ("tokens", "bert"),
        ("bi", "llama"),
        ("regression", "one-hot"),
    ],
)
def test_dropout_is_one_public_mask_for_all_records_of_a_step(
    kind: str, model: str, unit: str, monkeypatch: Patch
) -> None:
    contract = changed_phases(tiny.contract_of(kind, model, unit=unit), dropout=0.25)
    network = model_of(contract, model)
    adapter, seen = tiny.moved(network), []
    original = Network.forward

    def spy(self: Network, *args: Any, dropout_mask: Tensor | None = None, **more: Any) -> Tensor:
        assert dropout_mask is not None
        seen.append(dropout_mask.clone())
        return original(self, *args, dropout_mask=dropout_mask, **more)

    monkeypatch.setattr(Network, "forward", spy)
    masks: list[list[Tensor]] = []
    for rows in (tiny.rows_of(kind, 20), tiny.rows_of(kind, 9, seed=1)):
        data = tiny.load(rows, contract, network)
        for place in (1, 2):
            seen.clear()
            train_round(
                contract,
                replace(contract.round_plan(contract.rounds), round_in_phase=place),
                Mechanism(1e-3, 1.0, 3),
                network,
                data,
                adapter,
                Silent(site="x"),
                CLIP,
            )
            steps: list[Tensor] = []
            for mask in seen:
                if not steps or not torch.equal(mask, steps[-1]):
                    steps.append(mask)
            assert len(steps) == 3  # within a step all blocks have the same
            masks.append(steps)
    # Of the round and step alone: other records have the same masks, other rounds others.
    for first, second in ((0, 2), (1, 3)):
        assert all(torch.equal(a, b) for a, b in zip(masks[first], masks[second], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    values = torch.cat([mask for steps in masks[:2] for mask in steps])
    assert set(np.round(values.tolist(), 5)) == {0.0, 1.33333}
    (head,) = network.trained_modules({"head"})[:1]
    assert len(masks[0][0]) == head.in_features
    if len(values) >= 96:
        assert 0.1 < float((values == 0).float().mean()) < 0.4
    check_sensitivity(contract, network, kind, dropout_mask=masks[0][0])


def change(contract: Contract, model: Network, rows: Rows, place: int) -> NDArray[np.float64]:
    data = tiny.load(rows, contract, model)
    found, _ = train_round(
        contract,
        replace(contract.round_plan(contract.rounds), round_in_phase=place),
        Mechanism(1e-3, 1.0, 1),
        model,
        data,
        tiny.moved(model),
        Silent(site="x"),
        CLIP,
    )
    return np.concatenate([found[n].astype(float).ravel() for n in sorted(found)])


def test_a_round_with_dropout_and_schedule_stays_within_the_clip_norm(monkeypatch: Patch) -> None:
    monkeypatch.setattr("silotune.client.training.dp_optimizer.NOISE_ROUNDING_LOG2", -40)
    rows = tiny.rows_of("tokens", 16)
    plain = tiny.contract_of("tokens", "bert")
    schedule = {"shape": "linear", "warmup_rounds": 1, "final_factor": 0.5}
    contract = changed_phases(plain, dropout=0.5, schedule=schedule, rounds=4)
    model = model_of(contract, "bert")
    for place, factor in ((1, 0.5), (2, 1.0), (3, 5 / 6), (4, 2 / 3)):
        whole, rest = (change(contract, model, kept_rows, place) for kept_rows in (rows, rows[1:]))
        moved = np.linalg.norm(whole - rest) * contract.privacy.expected_units
        assert 0 < moved <= CLIP * factor * (1 + 1e-5)
        unscheduled = change(changed_phases(contract, schedule=None), model, rows, place)
        np.testing.assert_allclose(whole, factor * unscheduled, rtol=1e-5, atol=1e-9)


def test_without_dropout_there_is_no_mask() -> None:
    contract = tiny.contract_of("tokens", "bert")
    assert local_round._dropout_mask(contract.phases[0], model_of(contract, "bert"), (1, 0)) is None
