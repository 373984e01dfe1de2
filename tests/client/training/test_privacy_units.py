"""The privacy unit "entity": grouping, one clipped gradient each, sampling, ledger and policy.

Each way to break it, in MUTATIONS, must be seen by a property here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from silotune.client.operations import preflight
from silotune.client.privacy.accountant import Mechanism
from silotune.client.privacy.budget import Limit
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import FIRST, Adopted, chained
from silotune.client.site import policy as policies
from silotune.client.site import signed_policy
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import Budgets, Policy, permissive_policy
from silotune.client.training import (
    dataset,
    dp_optimizer,
    local_round,
    privacy_units,
    released_metrics,
    selftest,
)
from silotune.client.training.local_round import train_round
from silotune.client.training.noise import NoiseSource
from silotune.client.training.privacy_units import Group, UnitBatch, Units
from silotune.client.worker.worker import Worker
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Entity
from silotune.common.data.records import Table
from silotune.common.errors import DataError, RefusalError
from silotune.common.models.batching import BUCKET, Block
from silotune.common.models.encoder import Encoder
from silotune.common.models.factory import build
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Arrays, Message, Refusal, Train, Update
from silotune.common.tasks.classification import per_example_loss

Rows = list[tuple[str, int, str, int]]  # patient, age, smoker, outcome
CLIP, EXPECTED = 1.0, 50.0
RATE = EXPECTED  # so that a change is the sum itself, as exact as a float32
BOUND = 0.6  # of the released loss: an entity's mean can lie on either side
HEADER = "patient,age,smoker,outcome"
RELEASES = [
    {"metric": "loss", "share": 0.1, "bound": BOUND},
    {"metric": "accuracy", "share": 0.05},
]
# Entities of 1 to 4 rows, interleaved, whose rows differ; 'c' has rows that pull both ways.
ROWS: Rows = [
    ("a", 30, "yes", 1),
    ("b", 70, "no", 0),
    ("c", 30, "no", 0),
    ("a", 30, "yes", 1),
    ("c", 30, "no", 1),
    ("d", 70, "yes", 1),
    ("a", 70, "yes", 1),
    ("c", 70, "no", 0),
    ("e", 30, "no", 1),
    ("a", 30, "no", 0),
    ("d", 70, "yes", 1),
    ("d", 70, "yes", 1),
]


class Silent(NoiseSource):
    """A source whose noise is zero: what is released is the clipped sum itself."""

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.zeros(shape)


def written(path: Path, rows: Rows, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def by_entity(contract: Contract, **entity: Any) -> Contract:
    """`contract` protecting patients, with everybody sampled and one step a round."""
    return contract.changed(
        privacy={
            "unit": "entity",
            "entity": {"key": ["patient"], "max_records_per_entity": 3} | entity,
        },
        phases=[{"trains": "head", "rounds": 3, "sampling_rate": 1.0, "head_lr": RATE}],
        releases=RELEASES,
    )


@pytest.fixture
def entities(table_contract: Contract) -> Contract:
    return by_entity(table_contract)


def weights(seed: int = 3) -> Arrays:
    """A head away from zero, so that records' gradients have different norms."""
    rng = np.random.default_rng(seed)
    return {
        "head.weight": rng.normal(0, 0.8, (2, 6)).astype(np.float32),
        "head.bias": rng.normal(0, 0.5, 2).astype(np.float32),
    }


def ask(worker: Worker, number: int = 1, run: str = "r") -> Message:
    header = Train(contract=worker.contract.hash, run=run, round=number)
    return messages.unpack(worker.handle(messages.pack(Message(header, weights()))))


@dataclass
class Sum:
    """A round's noiseless sums: of clipped gradients, of losses, of right answers."""

    gradient: NDArray[np.float64]
    loss: float
    accuracy: float


@dataclass
class Released:
    """released(rows, **entity): one round of a real worker, its noise silent, as sums again."""

    contract: Contract
    file: Path
    make_worker: Callable[..., Worker]

    def __call__(self, rows: Rows, **entity: Any) -> Sum:
        worker = self.make_worker(by_entity(self.contract, **entity), written(self.file, rows))
        worker.source = Silent(site="north")
        reply = ask(worker)
        assert isinstance(reply.header, Update)
        change = [reply.arrays[name].astype(float).ravel() for name in sorted(reply.arrays)]
        metrics = reply.header.metrics
        return Sum(
            -np.concatenate(change) * EXPECTED / RATE,
            metrics["loss"] * EXPECTED,
            metrics["accuracy"] * EXPECTED,
        )


@pytest.fixture
def released(
    table_contract: Contract,
    tmp_path: Path,
    make_worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> Released:
    monkeypatch.setattr(dp_optimizer, "NOISE_ROUNDING_LOG2", -40)
    return Released(table_contract, tmp_path / "rows.csv", make_worker)


def of_record(age: int, smoker: str, outcome: int) -> tuple[NDArray[np.float64], float, float]:
    """Gradient (bias, weight), loss and whether it is right, by the formulas of the softmax."""
    w = {name: a.astype(np.float64) for name, a in weights().items()}
    x = np.zeros(6)
    x[int(age >= 50)] = x[3 + ["yes", "no"].index(smoker)] = 2.0 / np.sqrt(2)
    logits = w["head.weight"] @ x + w["head.bias"]
    p = np.exp(logits) / np.exp(logits).sum()
    off = p - np.eye(2)[outcome]
    return (
        np.concatenate([off, np.outer(off, x).ravel()]),
        float(-np.log(p[outcome])),
        float(p.argmax() == outcome),
    )


def by_hand(
    rows: Rows, *, max_records_per_entity: Any = 3, select: Any = "first", reduce: Any = "mean"
) -> Sum:
    """Entity by entity: its rows within the cap, their gradients put together, clipped once."""
    total = Sum(np.zeros(14), 0.0, 0.0)
    for patient in dict.fromkeys(row[0] for row in rows):
        own = [of_record(*row[1:]) for row in rows if row[0] == patient]
        most = max_records_per_entity
        own = own[:most] if select == "first" else own[-most:]
        g = np.sum([r[0] for r in own], axis=0) / (len(own) if reduce == "mean" else 1)
        total.gradient = total.gradient + g * min(1.0, CLIP / float(np.linalg.norm(g)))
        total.loss += min(float(np.mean([r[1] for r in own])), BOUND)
        total.accuracy += float(np.mean([r[2] for r in own]))
    return total


def agree(found: Sum, expected: Sum) -> None:
    np.testing.assert_allclose(found.gradient, expected.gradient, rtol=0, atol=1e-5)
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-5)


# --- properties that a mutation below must break ---------------------------------------------

CHOICES = [
    {"max_records_per_entity": cap, "select": keep, "reduce": combine}
    for cap in (1, 2, 3, 9)
    for keep in ("first", "last")
    for combine in ("mean", "sum")
]


def the_released_sums_are_those_by_hand(released: Released) -> None:
    for entity in CHOICES:
        agree(released(ROWS, **entity), by_hand(ROWS, **entity))


def an_entity_moves_the_gradients_by_at_most_the_clip_norm(released: Released) -> None:
    """Whoever is left out, and also somebody with many rows that all pull the same way."""
    crowd = [*ROWS, *[("z", 30, "yes", 0)] * 40]
    for entity in (
        {"max_records_per_entity": 50, "reduce": "sum"},
        {"max_records_per_entity": 50},
        {"max_records_per_entity": 2, "reduce": "sum"},
    ):
        whole = released(crowd, **entity)
        moved = []
        for patient in "acz":
            rest = released([row for row in crowd if row[0] != patient], **entity)
            moved.append(float(np.linalg.norm(whole.gradient - rest.gradient)))
        assert max(moved) <= CLIP * (1 + 1e-6)
        assert moved[-1] > 0.99 * CLIP  # or this would show nothing


def an_entity_moves_the_metrics_by_at_most_their_bounds(released: Released) -> None:
    crowd = [*ROWS, *[("z", 70, "no", 1)] * 40, *[("y", 70, "yes", 1)] * 40]
    whole = released(crowd, max_records_per_entity=50)
    for patient, of_loss in (("z", BOUND), ("y", BOUND), ("a", BOUND)):
        rest = released([row for row in crowd if row[0] != patient], max_records_per_entity=50)
        assert -1e-6 <= whole.loss - rest.loss <= of_loss + 1e-6
        assert -1e-6 <= whole.accuracy - rest.accuracy <= 1 + 1e-6


def rows_beyond_the_cap_change_nothing(released: Released) -> None:
    """Bit for bit, whatever they hold."""
    more: Rows = [("a", 70, "no", 1), ("c", 30, "yes", 1), ("d", 30, "no", 0)] * 3
    # 'c' and 'd' have three rows and 'a' four: all full, so what is added is beyond the cap.
    for keep, with_more in (("first", [*ROWS, *more]), ("last", [*more, *ROWS])):
        few, many = (
            released(rows, select=keep, max_records_per_entity=3) for rows in (ROWS, with_more)
        )
        assert np.array_equal(few.gradient, many.gradient)
        assert (few.loss, few.accuracy) == (many.loss, many.accuracy)


def entities_are_sampled_whole(released: Released) -> None:
    """Twenty patients with three equal rows each, unclipped: k rows give k times one gradient, and
    of a patient all or none are there."""
    contract = by_entity(released.contract, reduce="sum").changed(
        privacy={"clip_norm": 100.0},
        releases=[],
        phases=[{"trains": "head", "rounds": 1, "sampling_rate": 0.5, "head_lr": RATE}],
    )
    rows: Rows = [(f"p{k}", 70, "no", 1) for k in range(20)] * 3
    one = of_record(70, "no", 1)[0]
    model = build(contract, None)
    data = dataset.load(table(rows), contract, model)
    drawn = []
    for seed in range(60):
        change, _ = train_round(
            contract,
            contract.round_plan(1),
            Mechanism(1e-6, 0.5, 1),
            model,
            data,
            weights(),
            Silent(site="x", insecure_seed=seed),
            100.0,
        )
        total = np.concatenate([change[name].astype(float).ravel() for name in sorted(change)])
        drawn.append(-total @ one / (one @ one) * EXPECTED * 0.5 / RATE / 3)
    counts = np.round(drawn)
    np.testing.assert_allclose(drawn, counts, atol=1e-3)
    # Binomial(20, 1/2): mean 10, standard error sqrt(5 / 60).
    assert abs(counts.mean() - 10) < 4 * np.sqrt(5 / 60)
    assert 0.5 * 5 < counts.var() < 2 * 5


PROPERTIES: dict[str, Callable[[Released], None]] = {
    f.__name__: f
    for f in (
        the_released_sums_are_those_by_hand,
        an_entity_moves_the_gradients_by_at_most_the_clip_norm,
        an_entity_moves_the_metrics_by_at_most_their_bounds,
        rows_beyond_the_cap_change_nothing,
        entities_are_sampled_whole,
    )
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str, released: Released) -> None:
    PROPERTIES[name](released)


# --- mutations: the unit broken on purpose ---------------------------------------------------

Patch = pytest.MonkeyPatch


def each_record_clipped_by_itself(patch: Patch) -> None:
    original = dp_optimizer.private_gradient

    def broken(linears: Any, optimizer: Any, groups: list[Group], losses: Any, **more: Any) -> None:
        alone = [Group(p.n, [UnitBatch(p.rows, p.n)]) for group in groups for p in group.parts]
        original(linears, optimizer, alone, losses, **more)

    patch.setattr(local_round, "private_gradient", broken)


def an_entity_split_over_two_groups(patch: Patch) -> None:
    original = dp_optimizer.private_gradient

    def broken(linears: Any, optimizer: Any, groups: list[Group], losses: Any, **more: Any) -> None:
        split = []
        for units_, parts in groups:
            for p in parts:
                assert p.owners is not None
                assert p.weights is not None
                for half in (slice(0, None, 2), slice(1, None, 2)):
                    rows = p.rows[: p.n][half]
                    split.append(
                        Group(units_, [UnitBatch(rows, len(rows), p.owners[half], p.weights[half])])
                    )
        original(linears, optimizer, [g for g in split if g.parts[0].n], losses, **more)

    patch.setattr(local_round, "private_gradient", broken)


def records_added_up_in_the_metrics(patch: Patch) -> None:
    def broken(groups: Iterable[Group], of_rows: Callable[[UnitBatch], Tensor]) -> Iterator[Tensor]:
        for _, parts in groups:
            yield from map(of_rows, parts)

    patch.setattr(released_metrics, "_of_units", broken)


def no_cap(patch: Patch) -> None:
    original = privacy_units.of_entities
    patch.setattr(
        privacy_units,
        "of_entities",
        lambda table_, entity: original(
            table_, entity.model_copy(update={"max_records_per_entity": 10**6})
        ),
    )


def the_last_rows_for_the_first(patch: Patch) -> None:
    original = privacy_units.of_entities
    patch.setattr(
        privacy_units,
        "of_entities",
        lambda table_, entity: original(table_, entity.model_copy(update={"select": "last"})),
    )


def sums_for_means(patch: Patch) -> None:
    original = privacy_units.of_entities
    patch.setattr(privacy_units, "of_entities", lambda *a: replace(original(*a), mean=False))


def records_sampled(patch: Patch) -> None:
    original = Units.groups

    def broken(self: Units, drawn: Tensor, blocks_of: Any) -> Iterator[Group]:
        sizes = self.starts[1:] - self.starts[:-1]
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[drawn]
        kept = torch.bincount(owner, minlength=len(sizes))
        starts = torch.cat([torch.zeros(1, dtype=torch.long), kept.cumsum(0)])
        some = Units(self.members[drawn], starts, self.mean)
        return original(some, torch.arange(len(sizes))[kept > 0], blocks_of)

    patch.setattr(Units, "__len__", lambda self: len(self.members))
    patch.setattr(Units, "groups", broken)


MUTATIONS: dict[Callable[[Patch], None], str] = {
    each_record_clipped_by_itself: "an_entity_moves_the_gradients_by_at_most_the_clip_norm",
    an_entity_split_over_two_groups: "an_entity_moves_the_gradients_by_at_most_the_clip_norm",
    records_added_up_in_the_metrics: "an_entity_moves_the_metrics_by_at_most_their_bounds",
    no_cap: "rows_beyond_the_cap_change_nothing",
    the_last_rows_for_the_first: "rows_beyond_the_cap_change_nothing",
    sums_for_means: "the_released_sums_are_those_by_hand",
    records_sampled: "entities_are_sampled_whole",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_broken_unit_is_caught(
    mutation: Callable[[Patch], None], released: Released, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(selftest, "check", lambda *_: None)  # it would see some of them first
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        PROPERTIES[MUTATIONS[mutation]](released)


# --- grouping --------------------------------------------------------------------------------


def table(rows: Iterable[tuple[object, ...]], header: str = HEADER) -> Table:
    return Table(
        "rows.csv",
        header.split(","),
        [(line, [str(cell) for cell in row]) for line, row in enumerate(rows, 2)],
    )


def grouped(found: Units) -> list[list[int]]:
    return [
        found.members[a:b].tolist()
        for a, b in zip(found.starts[:-1].tolist(), found.starts[1:].tolist(), strict=True)
    ]


def entity(**changes: Any) -> Entity:
    return Entity.model_validate({"key": ["patient"], "max_records_per_entity": 9} | changes)


def test_the_ways_of_writing_a_key_are_one_entity() -> None:
    keys = [" P-1", "p-1", "P-1 ", "p-2", "\uff30-1", "P-\u200b1", "4", "4.0", " 4e0 ", "P- 1"]
    found = privacy_units.of_entities(table([(key, 30, "yes", 1) for key in keys]), entity())
    assert grouped(found) == [[0, 1, 2, 4, 5], [3], [6, 7, 8], [9]]
    assert len(found) == 4


def test_the_columns_name_is_found_in_any_writing() -> None:
    found = privacy_units.of_entities(table(ROWS, " PATIENT,age,smoker,outcome"), entity())
    assert grouped(found) == grouped(privacy_units.of_entities(table(ROWS), entity()))


def test_several_key_columns_are_one_key() -> None:
    rows = [("1", "2"), ("12", ""), ("1", "2 "), ("2", "1"), ("1", "3")]
    full = [row for row in rows if all(row)]
    both = entity(key=["clinic", "number"])
    assert grouped(privacy_units.of_entities(table(full, "clinic,number"), both)) == [
        [0, 1],
        [2],
        [3],
    ]
    with pytest.raises(DataError, match="row 3"):
        privacy_units.of_entities(table(rows, "clinic,number"), both)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("first", [[0, 3], [1], [2, 4]]),
        ("last", [[3, 5], [1], [4, 6]]),
    ],
)
def test_the_cap_keeps_the_first_or_the_last(keep: str, expected: list[list[int]]) -> None:
    rows = [(p, 30, "yes", 1) for p in "abcacac"]
    assert (
        grouped(
            privacy_units.of_entities(table(rows), entity(max_records_per_entity=2, select=keep))
        )
        == expected
    )


def test_an_entitys_rows_do_not_depend_on_anybody_elses() -> None:
    """However the others' rows stand between hers, and whether they are there at all."""
    mine = [("p", age, "yes", 1) for age in range(20, 30)]
    others = [(f"o{k % 4}", 80, "no", 0) for k in range(20)]
    rng = np.random.default_rng(0)
    for keep, kept in (("first", [20, 21, 22]), ("last", [27, 28, 29])):
        for _ in range(20):
            places = np.sort(rng.choice(30, 10, replace=False)).tolist()
            rest, rows = iter(rng.permutation(len(others)).tolist()), []
            for k in range(30):
                rows.append(mine[places.index(k)] if k in places else others[next(rest)])
            found = grouped(
                privacy_units.of_entities(
                    table(rows), entity(max_records_per_entity=3, select=keep)
                )
            )
            (hers,) = [g for g in found if rows[g[0]][0] == "p"]
            assert [rows[k][1] for k in hers] == kept
            assert all(len({rows[k][0] for k in g}) == 1 for g in found)
        alone = privacy_units.of_entities(
            table(mine), entity(max_records_per_entity=3, select=keep)
        )
        assert [mine[k][1] for k in grouped(alone)[0]] == kept


def test_the_order_of_other_entities_rows_changes_no_bit(released: Released) -> None:
    """Only 'a' keeps her order; all sums are exact, so the released ones are equal."""
    rng = np.random.default_rng(1)
    first = released(ROWS, max_records_per_entity=2)
    for _ in range(3):
        order: list[str] = rng.permutation([row[0] for row in ROWS]).tolist()
        own = {p: iter([row for row in ROWS if row[0] == p]) for p in "abcde"}
        again = released([next(own[p]) for p in order], max_records_per_entity=2)
        assert np.array_equal(first.gradient, again.gradient)
        assert (first.loss, first.accuracy) == (again.loss, again.accuracy)


@pytest.mark.parametrize("blank", ["", "  ", "\u200b", "NaN"])
def test_an_empty_key_is_refused_by_row_number(
    entities: Contract, tmp_path: Path, make_worker: Callable[..., Worker], blank: str
) -> None:
    rows = [*ROWS, (blank, 77, "yes", 1), ("secret-f", 30, "no", 0), (blank, 30, "no", 0)]
    with pytest.raises(DataError) as error:
        make_worker(entities, written(tmp_path / "rows.csv", rows))
    assert error.value.code == "E302"
    told = str(error.value)
    assert told == (
        "rows.csv: the key of the privacy unit (patient) is empty: rows 14, 16. Give these rows a "
        "key, or remove them."
    )
    assert "secret" not in error.value.local + told


def test_of_many_empty_keys_some_are_shown() -> None:
    with pytest.raises(DataError, match=r"rows 2, 3, .*, 11 and 15 more\. ") as error:
        privacy_units.of_entities(table([("", 30, "yes", 1)] * 25), entity())
    assert "12" not in str(error.value)
    with pytest.raises(DataError, match="row 2\\. "):
        privacy_units.of_entities(table([("", 30, "yes", 1)]), entity())


def test_a_key_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match=r"Key column 'patient_id' is not in rows\.csv") as error:
        privacy_units.of_entities(table(ROWS), entity(key=["patient_id"]))
    assert error.value.code == "E302"


def test_a_group_holds_whole_units_and_no_unit_twice() -> None:
    """Over many entities, blocks of three rows: each unit in one group, each row once, its weight
    one over the entity's size."""
    rng = np.random.default_rng(2)
    sizes = torch.from_numpy(rng.integers(1, 9, 150))
    starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    found = Units(torch.from_numpy(rng.permutation(int(starts[-1]))), starts, True)
    drawn = torch.arange(0, 150, 2)

    def blocks_of(index: Tensor) -> Iterator[Block]:
        for part in torch.split(index[torch.argsort(index % 2, stable=True)], 3):
            yield Block(torch.cat([part, part[:1].expand(3 - len(part))]), len(part))

    seen: list[int] = []
    total = 0
    for group in found.groups(drawn, blocks_of):
        assert 1 <= group.units <= privacy_units.GROUP
        gathered: dict[int, float] = {}
        for rows, n, owners, scale in group.parts:
            assert owners is not None
            assert scale is not None
            assert len(owners) == len(scale) == n
            for row, owner, weight in zip(
                rows[:n].tolist(), owners.tolist(), scale.tolist(), strict=True
            ):
                unit = int(drawn[total + owner])
                assert row in found.members[starts[unit] : starts[unit + 1]].tolist()
                gathered[owner] = gathered.get(owner, 0.0) + weight
                seen.append(row)
        assert sorted(gathered) == list(range(group.units))
        assert list(gathered.values()) == pytest.approx([1.0] * group.units)
        total += group.units
    assert total == len(drawn)
    wanted = [m for u in drawn.tolist() for m in found.members[starts[u] : starts[u + 1]].tolist()]
    assert sorted(seen) == sorted(wanted)
    assert list(found.groups(drawn[:0], blocks_of)) == []


def test_how_many_units_there_are_is_what_is_sampled(
    entities: Contract, tmp_path: Path, make_worker: Callable[..., Worker], monkeypatch: Patch
) -> None:
    asked: list[tuple[int, float]] = []
    original = NoiseSource.poisson_sample

    def spy(self: NoiseSource, n: int, rate: float) -> NDArray[np.int64]:
        asked.append((n, rate))
        return original(self, n, rate)

    monkeypatch.setattr(NoiseSource, "poisson_sample", spy)
    ask(make_worker(entities, written(tmp_path / "rows.csv", ROWS)))
    assert asked == [(5, 1.0)]


# --- the encoder: an entity's rows lie in different blocks -----------------------------------


@pytest.mark.download
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_rows_of_different_lengths_make_one_gradient(
    lora_contract: Contract, encoder_folder: Path, monkeypatch: Patch, combine: str
) -> None:
    """Two buckets and blocks of two rows; by hand each record's gradient is autograd's alone."""
    monkeypatch.setattr("silotune.client.training.dp_optimizer.NOISE_ROUNDING_LOG2", -40)
    clip, label = 0.1, {"label_column": "outcome"}
    contract = Contract.model_validate(
        lora_contract.model_dump(mode="json")
        | {
            "input": {"kind": "text", "column": "note"},
            "task": lora_contract.model_dump(mode="json")["task"] | label,
            "privacy": {
                "expected_units": 4.0,
                "clip_norm": clip,
                "unit": "entity",
                "entity": {"key": ["patient"], "max_records_per_entity": 9, "reduce": combine},
            },
            "phases": [
                {
                    "trains": "head+adapter",
                    "rounds": 1,
                    "sampling_rate": 1.0,
                    "head_lr": 1.0,
                    "adapter_lr": 1.0,
                }
            ],
        }
    )
    short, long = "pain in the chest", " ".join(["pain in the left arm"] * 5)
    people = ["ann", "bob", "ann", "ann", "eve", "ann", "bob", "ann"]
    texts = [long, short, short, short + " today", long, long + " too", long, "no pain"]
    rows = [(p, t, str(k % 2)) for k, (p, t) in enumerate(zip(people, texts, strict=True))]
    exact = Performance(bf16="off", micro_batch=2)
    model = build(contract, encoder_folder, exact)
    assert isinstance(model, Encoder)
    rng = np.random.default_rng(0)
    adapter = {
        n: a if n.endswith("lora_A") else rng.normal(0, 0.05, a.shape).astype(np.float32)
        for n, a in model.initial_arrays().items()
    }

    def change(kept: list[tuple[str, str, str]]) -> NDArray[np.float64]:
        data = dataset.load(table(kept, "patient,note,outcome"), contract, model)
        assert data.encoded.starts is not None
        found, _ = train_round(
            contract,
            contract.round_plan(1),
            Mechanism(1e-3, 1.0, 1),
            model,
            data,
            adapter,
            Silent(site="x"),
            clip,
        )
        return -4.0 * np.concatenate([found[n].astype(float).ravel() for n in sorted(found)])

    data = dataset.load(table(rows, "patient,note,outcome"), contract, model)
    assert data.encoded.starts is not None
    lengths = data.encoded.lengths(torch.arange(len(rows)))
    hers = lengths[torch.tensor([p == "ann" for p in people])]
    assert len(set((-(-hers // BUCKET)).tolist())) == 2  # or nothing is tried here
    (group,) = data.units.groups(
        torch.arange(3), lambda r: model.micro_batches(data.encoded, r, adapter=True)
    )
    assert sum(0 in (p.owners.tolist() if p.owners is not None else ()) for p in group.parts) >= 3

    model.load(adapter)
    tensors = model.named_tensors()
    names = sorted(n for n in tensors if not n.endswith("lora_A"))
    alone = []
    for k in range(len(rows)):
        index = torch.tensor([k])
        loss = per_example_loss(model(data.encoded, index, adapter=True), data.labels[index])
        g = torch.autograd.grad(loss.sum(), [tensors[n] for n in names])
        alone.append(torch.cat([x.flatten() for x in g]).double().numpy())
    expected = np.zeros_like(alone[0])
    norms = []
    for person in ("ann", "bob", "eve"):
        own = [g for g, p in zip(alone, people, strict=True) if p == person]
        g = np.sum(own, axis=0) / (len(own) if combine == "mean" else 1)
        norms.append(float(np.linalg.norm(g)))
        expected += g * min(1.0, clip / norms[-1])
    assert max(norms) > 3 * clip
    whole = change(rows)
    # float32 products through a layer, in blocks of other sizes.
    assert float(np.linalg.norm(whole - expected)) < 1e-3 * clip
    without = change([row for row in rows if row[0] != "ann"])
    assert float(np.linalg.norm(whole - without)) <= clip * (1 + 1e-5)


# --- ledger and budget -----------------------------------------------------------------------


def named(
    contract: Contract,
    path: Path,
    *,
    key: tuple[str, ...] = ("patient",),
    units_: tuple[str, ...] = ("record", "entity"),
    **permits: Any,
) -> Policy:
    """A policy with a budget for each of `units_` and the records known by `key`."""
    found = permissive_policy(contract, "north", path, None)
    p = contract.privacy
    budget = Budgets.Budget(epsilon=p.epsilon, delta=p.delta)
    return found.model_copy(
        update={
            "data": found.data.model_copy(update={"key": key}),
            "budgets": Budgets(**dict.fromkeys(units_, budget)),
            "permits": found.permits.model_copy(update=permits),
        }
    )


def test_a_charge_names_the_unit_and_the_entitys_budget_is_the_limit(
    entities: Contract, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.csv", ROWS)
    tight = Budgets(
        record=Budgets.Budget(epsilon=100.0, delta=1e-3),
        entity=Budgets.Budget(epsilon=entities.privacy.epsilon, delta=1e-4),
    )
    policy = named(entities, path).model_copy(update={"budgets": tight})
    worker = Worker(policy, entities, PrivacyLedger.in_memory("north"))
    assert worker.limit == Limit(8.0, 1e-4)
    for number in (1, 2, 3):
        assert isinstance(ask(worker, number).header, Update)
    (again,) = [ask(worker, 1, run="other").header]
    assert isinstance(again, Refusal)
    assert again.code == "E210"
    charges = list(worker.ledger.charges.values())
    assert [c.unit for c in charges] == ["entity"] * 3
    assert {c.rows for c in charges} == {len(ROWS)}
    assert len(worker.record_set.fingerprints) == 5
    less = tight.model_copy(update={"entity": Budgets.Budget(epsilon=7.9, delta=1e-4)})
    with pytest.raises(RefusalError, match="exceeds the lifetime budget") as refusal:
        Worker(
            policy.model_copy(update={"budgets": less}), entities, PrivacyLedger.in_memory("north")
        )
    assert refusal.value.code == "E210"


@pytest.mark.parametrize("change", ["renamed", "reordered", "corrected", "one row each", "fewer"])
def test_an_entitys_spending_follows_its_key(
    entities: Contract, tmp_path: Path, change: str
) -> None:
    ledger = PrivacyLedger.in_memory("north")
    worker = Worker(named(entities, written(tmp_path / "rows.csv", ROWS)), entities, ledger)
    for number in (1, 2, 3):
        ask(worker, number)
    other: dict[str, Rows] = {
        "renamed": ROWS,
        "reordered": ROWS[::-1],
        "corrected": [(f" {p.upper()} ", 90 - age, s, 1 - y) for p, age, s, y in ROWS],
        "one row each": [(p, 55, "yes", 1) for p in "abcde"],
        "fewer": [*[row for row in ROWS if row[0] == "e"], ("new", 30, "no", 1)],
    }
    path = written(tmp_path / "other.csv", other[change])
    again = entities.changed(name="again")
    with pytest.raises(RefusalError, match="lifetime budget of these records") as refusal:
        Worker(named(again, path), again, ledger)
    assert refusal.value.code == "E210"
    assert len(ledger.charges) == 3
    fresh = written(tmp_path / "fresh.csv", [(f"n{p}", a, s, y) for p, a, s, y in ROWS])
    assert Worker(named(again, fresh), again, ledger).budget.spent(1e-4).epsilon == 0


@pytest.mark.parametrize("key", [(), ("patient",)])
@pytest.mark.parametrize("first", ["record", "entity"])
def test_records_are_used_with_one_unit_for_ever(
    entities: Contract, table_contract: Contract, tmp_path: Path, first: str, key: tuple[str, ...]
) -> None:
    """A record's ε bounds no person's, and the other way: E210, with a sentence that says why."""
    path = written(tmp_path / "rows.csv", ROWS)
    by_record = {
        "record": (table_contract, named(table_contract, path, key=key)),
        "entity": (entities, named(entities, path)),
    }
    second = "entity" if first == "record" else "record"
    ledger = PrivacyLedger.in_memory("north")
    contract, policy = by_record[first]
    header = Train(contract=contract.hash, run="r", round=1)
    worker = Worker(policy, contract, ledger)
    reply = worker.handle(messages.pack(Message(header, weights())))
    assert isinstance(messages.unpack(reply).header, Update)
    contract, policy = by_record[second]
    with pytest.raises(RefusalError) as refusal:
        Worker(policy, contract, ledger)
    assert refusal.value.code == "E210"
    assert str(refusal.value) == (
        f"These records were charged by the unit '{first}' before; what that cost a unit "
        f"'{second}' of this plan has no bound. Keep to one unit and one key."
    )
    assert len(ledger.charges) == 1


def test_other_entities_are_not_held_to_a_unit_that_was_not_theirs(
    entities: Contract, tmp_path: Path
) -> None:
    ledger = PrivacyLedger.in_memory("north")
    path = written(tmp_path / "rows.csv", ROWS)
    by_record = entities.changed(privacy={"unit": "record", "entity": None})
    ask(Worker(named(by_record, path), by_record, ledger))
    fresh = written(tmp_path / "fresh.csv", [(f"n{p}", a, s, y) for p, a, s, y in ROWS])
    assert isinstance(ask(Worker(named(entities, fresh), entities, ledger)).header, Update)


def test_a_charge_by_another_key_bounds_nothing_for_this_entity(
    entities: Contract, tmp_path: Path
) -> None:
    """What a patient has spent does not bound what her household has: many patients are in it."""
    rows = [f"{k % 2},p{k},{30 + k},yes,1" for k in range(20)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["household,patient,age,smoker,outcome", *rows]) + "\n")
    ledger = PrivacyLedger.in_memory("north")
    patients = entities.changed(privacy={"epsilon": 2.0})
    ask(
        Worker(
            named(entities, path).model_copy(update={"permits": named(patients, path).permits}),
            patients,
            ledger,
        )
    )
    homes = by_entity(entities, key=["household"], max_records_per_entity=10).changed(
        privacy={"epsilon": 2.0}
    )
    policy = named(entities, path, key=("household",))
    policy = policy.model_copy(update={"permits": named(homes, path).permits})
    with pytest.raises(RefusalError) as refusal:
        Worker(policy, homes, ledger)
    assert refusal.value.code == "E210"


# --- policy ----------------------------------------------------------------------------------


def refused(policy: Policy, contract: Contract) -> list[tuple[str, str]]:
    return [(refusal.code, str(refusal)) for refusal in policy.refusals(contract)]


def test_a_policy_without_the_units_budget_refuses(
    entities: Contract, table_contract: Contract, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    assert refused(named(entities, path), entities) == []
    assert refused(named(entities, path, units_=("record",)), entities) == [
        (
            "E205",
            "The contract 'small': it protects the unit 'entity', for which site.toml has no "
            "[budgets.entity].",
        )
    ]
    assert refused(named(table_contract, path, units_=("entity",)), table_contract) == [
        (
            "E205",
            "The contract 'small': it protects the unit 'record', for which site.toml has no "
            "[budgets.record].",
        )
    ]
    # The entity's δ is the entity's budget's, not the record's.
    loose = Budgets(
        record=Budgets.Budget(epsilon=8.0, delta=1e-3),
        entity=Budgets.Budget(epsilon=8.0, delta=1e-5),
    )
    found = refused(named(entities, path).model_copy(update={"budgets": loose}), entities)
    assert [code for code, _ in found] == ["E205"]
    assert "δ = 0.0001 is larger than the budget's 1e-05" in found[0][1]


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ((), "data.key is empty"),
        (("age",), "data.key is age"),
        (("patient", "age"), "data.key is patient, age"),
    ],
)
def test_a_policy_with_another_key_refuses(
    entities: Contract, tmp_path: Path, key: tuple[str, ...], shown: str
) -> None:
    found = refused(named(entities, tmp_path / "rows.csv", key=key), entities)
    assert found == [("E205", f"The contract 'small': its entity is known by patient, {shown}.")]


def test_the_order_and_the_writing_of_key_columns_do_not_matter(
    entities: Contract, tmp_path: Path
) -> None:
    contract = by_entity(entities, key=["clinic", "patient"])
    policy = named(contract, tmp_path / "rows.csv", key=(" Patient", "CLINIC"))
    assert refused(policy, contract) == []


def test_ghost_clipping_has_no_gradient_of_an_entity(entities: Contract, tmp_path: Path) -> None:
    policy = named(entities, tmp_path / "rows.csv").model_copy(
        update={"performance": Performance(gradients="ghost")}
    )
    assert [code for code, _ in refused(policy, entities)] == ["E205"]
    allowed = policy.model_copy(
        update={"permits": policy.permits.model_copy(update={"allow_inexact_clipping": False})}
    )
    assert [code for code, _ in refused(allowed, entities)] == ["E205"] * 2


def test_min_records_counts_entities(entities: Contract, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", ROWS)
    Worker(named(entities, path, min_records=5), entities, PrivacyLedger.in_memory("north"))
    with pytest.raises(DataError, match=r"permits\.min_records = 6\.") as error:
        Worker(named(entities, path, min_records=6), entities, PrivacyLedger.in_memory("north"))
    assert error.value.code == "E304"
    assert "5" not in str(error.value)
    assert "12" not in str(error.value)


def test_rows_of_one_entity_are_no_repeated_records(entities: Contract, tmp_path: Path) -> None:
    """With unit "record" they would be refused (E307)."""
    path = written(tmp_path / "rows.csv", ROWS)
    policy = named(entities, path)
    refusing = policy.model_copy(
        update={"data": policy.data.model_copy(update={"duplicate_records": "refuse"})}
    )
    worker = Worker(refusing, entities, PrivacyLedger.in_memory("north"))
    with pytest.raises(DataError, match="the same record more than once"):
        refusing.check_records(worker.record_set, "record", worker.ledger)


SITE = """
name = "north"
[data]
file = "rows.csv"
key = ["patient"]
[budgets.{unit}]
epsilon = 8.0
delta = 1e-4
[permits]
"""


@pytest.mark.parametrize(
    ("unit", "limits"),
    [
        ("record", {"record": Limit(8.0, 1e-4)}),
        ("entity", {"entity": Limit(8.0, 1e-4)}),
    ],
)
def test_a_site_with_one_budget_stays_valid(
    tmp_path: Path, unit: str, limits: dict[str, Limit]
) -> None:
    """Every site.toml of older versions has [budgets.record] alone."""
    (tmp_path / "site.toml").write_text(SITE.replace("{unit}", unit))
    found = policies.load(tmp_path / "site.toml")
    assert found.limits == limits
    assert found.run.epsilon is None
    both = SITE.replace("{unit}", "record") + SITE[SITE.index("[budgets") :].replace(
        "{unit}", "entity"
    ).replace("8.0", "3.0").replace("[permits]", "")
    (tmp_path / "site.toml").write_text(both)
    assert policies.load(tmp_path / "site.toml").limits_in_words() == (
        "ε ≤ 8, δ = 0.0001 per record and ε ≤ 3, δ = 0.0001 per entity"
    )


def test_what_was_adopted_stands_in_the_ledger_for_every_unit(tmp_path: Path) -> None:
    keys = Keys.create(tmp_path / "keys")
    ledger = PrivacyLedger.create(tmp_path / "state", keys, "north")
    text = SITE.replace("{unit}", "entity") + "[budgets.record]\nepsilon = 9.0\ndelta = 1e-5\n"
    (tmp_path / "site.toml").write_text(text)
    signed_policy.sign(tmp_path / "site.toml", tmp_path / "keys" / "owner.key", 0)
    signed_policy.adopt(tmp_path / "site.toml", ledger, keys.owner)
    entry = PrivacyLedger.open(tmp_path / "state", keys).policy
    assert entry is not None
    limits = {(entry.unit, entry.epsilon, entry.delta)}
    limits |= {(e.unit, e.epsilon, e.delta) for e in entry.others}
    assert limits == {("record", 9.0, 1e-5), ("entity", 8.0, 1e-4)}


def test_a_ledger_of_an_older_version_verifies(tmp_path: Path, monkeypatch: Patch) -> None:
    """Its POLICY entries have no `others`."""
    keys = Keys.create(tmp_path / "keys")
    (tmp_path / "site.toml").write_text(SITE.replace("{unit}", "record"))
    signed_policy.sign(tmp_path / "site.toml", tmp_path / "keys" / "owner.key", 0)
    ledger = PrivacyLedger.create(tmp_path / "state", keys, "north")
    dump = Adopted.model_dump_json
    with monkeypatch.context() as old:
        old.setattr(Adopted, "model_dump_json", lambda self: dump(self, exclude={"others"}))
        adopted = signed_policy.adopt(tmp_path / "site.toml", ledger, keys.owner)
    ledger._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert b'"others"' not in (tmp_path / "state" / "ledger.sqlite").read_bytes()
    found = PrivacyLedger.open(tmp_path / "state", keys)
    assert found.policy is not None
    assert (found.policy.unit, found.policy.epsilon, found.policy.others) == ("record", 8.0, ())
    assert signed_policy.adopt(tmp_path / "site.toml", found, keys.owner) == adopted
    assert len(found.entries) == 2


def test_an_older_entrys_bytes_still_parse() -> None:
    """Written down as version 0.1 wrote them: nothing here computes what it should read."""
    body = (
        '{"sequence":1,"previous":"' + FIRST + '","at":1700000000.123,"state":"POLICY","serial":3,'
        '"policy":"' + "a" * 64 + '","unit":"record","epsilon":8.0,"delta":0.0001}'
    )
    entry = chained(body, 0, FIRST)
    assert isinstance(entry, Adopted)
    assert (entry.unit, entry.epsilon, entry.others) == ("record", 8.0, ())
    assert hashlib.sha256(body.encode()).hexdigest()  # the bytes are what is verified, not a dump
    assert json.loads(entry.model_dump_json())["others"] == []


# --- the self-test and `site check` ----------------------------------------------------------


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_the_self_test_sees_an_entity_that_is_not_clipped_as_a_whole(
    entities: Contract, combine: str, monkeypatch: Patch
) -> None:
    contract = by_entity(entities, reduce=combine)
    model = build(contract, None)
    selftest.check(contract, model)
    selftest._passed.clear()
    an_entity_split_over_two_groups(monkeypatch)
    monkeypatch.setattr(selftest, "private_gradient", vars(local_round)["private_gradient"])
    with pytest.raises(RefusalError, match="self-test") as refusal:
        selftest.check(contract, model)
    assert refusal.value.code == "E208"


def test_site_check_finds_an_empty_key(entities: Contract, tmp_path: Path) -> None:
    """ "Proves that the site can take part": here its worker would not start."""
    found = PrivacyLedger.create(tmp_path / "state", Keys.create(tmp_path / "keys"), "north")
    assert found.entries
    text = SITE.replace("{unit}", "entity") + f'contracts = ["{entities.hash}"]\nmin_records = 1\n'
    (tmp_path / "site.toml").write_text(text + 'metrics = ["loss", "accuracy"]\n')
    signed_policy.sign(tmp_path / "site.toml", tmp_path / "keys" / "owner.key", 0)
    written(tmp_path / "rows.csv", [*ROWS, ("", 70, "no", 1)]).chmod(0o600)
    (tmp_path / "contract.json").write_text(entities.model_dump_json())
    checks = preflight.check(SiteFolder(tmp_path / "site.toml"), tmp_path / "contract.json")
    problems = [c for c in checks if c.state == "problem"]
    assert [c.code for c in problems] == ["E302"]
