"""Whatever one unit holds, it moves the clipped sum by at most the clip norm: thousands of pairs of
neighbouring data sets, wild numbers, records and entities, one label a record or one a token.

Each way to break that bound is done on purpose below, and must be seen by the same measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from silotune.client.training.dp_optimizer import DPOptimizer, private_gradient
from silotune.client.training.noise import NoiseSource
from silotune.client.training.per_sample_gradients import by_expanding
from silotune.client.training.privacy_units import (
    GROUP,
    Group,
    UnitBatch,
    Units,
    of_entities,
    of_records,
)
from silotune.common.contract.privacy import Entity
from silotune.common.data.records import Table
from silotune.common.models.batching import Block, blocks_of
from silotune.common.tasks import classification, token_classification

CLIPS = [1e-4, 3e-3, 1.0, 47.0, 1e3]
BOUND = 1 + 1e-5  # of the clip norm
EXACT = 1 + 1e-12  # the same where each gradient keeps its bits: only this measurement's rounding


class Silent(NoiseSource):
    """A source whose noise is zero."""

    def normal(self, shape: tuple[int, ...]) -> Any:
        return np.zeros(shape)


class Seen(DPOptimizer):
    """Keeps the sum as it was before the noise, flat and in float64."""

    total: Tensor

    def __init__(self, parameters: Sequence[nn.Parameter], clip: float) -> None:
        super().__init__(
            torch.optim.SGD(parameters, lr=1.0),
            source=Silent(site="a"),
            noise_multiplier=1e-6,
            clip_norm=clip,
            divisor=1.0,
        )

    def add_noise(self) -> None:
        self.total = torch.cat([p.summed_grad.reshape(-1) for p in self.params]) * self.unit
        super().add_noise()


def clipped_sum(gradients: Tensor, shapes: Iterable[tuple[int, ...]], clip: float) -> Tensor:
    """Of units' gradients [units, all], as one batch."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = Seen(parameters, clip)
    optimizer.begin()
    parts = torch.split(gradients, [p.numel() for p in parameters], dim=1)
    for p, part in zip(parameters, parts, strict=True):
        p.grad_sample = part.clone().view(-1, *p.shape)  # type: ignore[attr-defined]
    optimizer.clip_and_accumulate()
    optimizer.add_noise()
    return optimizer.total


def changes(gradients: Tensor, shapes: list[tuple[int, ...]], clip: float) -> Tensor:
    """By how many clip norms the sum changes as each unit is left out: [units]."""
    whole = clipped_sum(gradients, shapes, clip)
    assert bool(whole.isfinite().all())
    kept = ~torch.eye(len(gradients), dtype=torch.bool)
    return torch.stack(
        [(whole - clipped_sum(gradients[keep], shapes, clip)).norm() / clip for keep in kept]
    )


# --- gradients of every kind -------------------------------------------------------------------

SHAPES = [(7, 3), (7,), (1, 1), (40, 5)]
SIZE = sum(math.prod(shape) for shape in SHAPES)


def wild(clip: float, seed: int) -> Tensor:
    """64 gradients: of all sizes, dense and sparse, zero, denormal, at the clip norm, infinite."""
    g = torch.Generator().manual_seed(seed)
    found = torch.randn(64, SIZE, generator=g)
    found[:32] *= 10 ** (torch.rand(32, 1, generator=g) * 76 - 40)
    found[32:40] *= (
        clip
        / found[32:40].norm(dim=1, keepdim=True)
        * (1 + torch.tensor([-1e-3, -1e-6, -6e-8, 0, 6e-8, 1e-6, 1e-3, 1.0])[:, None])
    )
    found[40:44] = 0.0
    for row in range(4):
        found[40 + row, row * 60] = 1e38 if row % 2 else -clip
    found[44] = 0.0
    found[45] = torch.full((SIZE,), 3e38)
    found[46] = torch.full((SIZE,), 1e-45)
    found[47, ::2] = 0.0
    found[48] = math.nan
    found[49, 5] = math.inf
    found[50, 100] = -math.inf
    found[51, 22], found[51, 7] = math.inf, math.nan
    found[52:] *= clip * 10 ** (torch.rand(12, 1, generator=g) * 4 - 3)
    found[60:] = found[60:].sign() * clip  # all alike, as far as possible from a sparse one
    return found


@pytest.mark.parametrize("clip", CLIPS)
def test_gradients_of_every_kind(clip: float) -> None:
    """640 pairs each. The bound is reached: a gradient that is clipped loses almost nothing."""
    found = torch.cat([changes(wild(clip, seed), SHAPES, clip) for seed in range(10)])
    assert float(found.max()) <= EXACT
    assert int((found > 0.99).sum()) > len(found) / 3
    assert int((found == 0).sum()) >= 10 * 5  # what is zero or not finite changes nothing


def halves(size: int, clip: float) -> Tensor:
    """A gradient at the clip norm of which each entry is just above half a unit: all round up."""
    optimizer = Seen([nn.Parameter(torch.zeros(size))], clip)
    whole = math.floor(clip / math.sqrt(size) / optimizer.unit) - 1
    return torch.full((2, size), (whole + 0.5001) * optimizer.unit) * torch.tensor([[1.0], [0.0]])


@pytest.mark.parametrize("clip", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("size", [10, 1000, 1_000_000])
def test_many_parameters(size: int, clip: float) -> None:
    """Rounding adds up to half a unit for each of them, and is taken off the clip norm first."""
    g = torch.Generator().manual_seed(size)
    found = torch.stack(
        [
            torch.randn(size, generator=g) * 10,
            torch.full((size,), clip),
            torch.zeros(size),
            torch.rand(size, generator=g).sign() * 1e30,
            *halves(size, clip),
        ]
    )
    moved = changes(found, [(size,)], clip)
    assert float(moved.max()) <= EXACT
    assert float(moved.max()) > 0.999


def test_neighbours_that_swap_or_add_one() -> None:
    """Adding is leaving out seen from the other side; with another in its place it is twice."""
    clip = 0.5
    found = wild(clip, 77)
    rest = clipped_sum(found[:-1], SHAPES, clip)
    for row in wild(clip, 78):
        more = clipped_sum(torch.cat([found[:-1], row[None]]), SHAPES, clip)
        assert float((more - rest).norm()) <= EXACT * clip
        both = clipped_sum(torch.cat([found, row[None]]), SHAPES, clip)
        assert float((both - rest).norm()) <= 2 * EXACT * clip


# --- records, end to end -----------------------------------------------------------------------


class Toy:
    """A two-layer network on made-up rows with wild weights and inputs."""

    def __init__(self, n: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.linears = [self.first, self.second]
        self.parameters = [p for linear in self.linears for p in linear.parameters()]
        for p in self.parameters:
            p.data = torch.randn(p.shape, generator=g) * 10 ** (seed % 4 * 6 - 3)
        self.x = torch.randn(n, 5, generator=g) * 10 ** (torch.rand(n, 1, generator=g) * 8 - 4)
        self.x[0], self.x[1] = 0.0, 3e38
        self.x[2, 1], self.x[3] = math.inf, 1e-42
        self.y = torch.randint(3, (n,), generator=g)
        self.weights = torch.ones(n)

    def losses(self, index: Tensor) -> Tensor:
        logits = self.second(torch.tanh(self.first(self.x[index])))
        return classification.per_example_loss(logits, self.y[index]) * self.weights[index]

    def total(self, groups: Iterable[Group], clip: float) -> Tensor:
        optimizer = Seen(self.parameters, clip)
        private_gradient(self.linears, optimizer, groups, self.losses)
        assert all(bool(p.grad.isfinite().all()) for p in self.parameters if p.grad is not None)
        return optimizer.total


def in_blocks(rows: Tensor) -> Iterable[Block]:
    """Blocks of 8, filled up: what a client computes at once."""
    return blocks_of(rows, torch.ones_like(rows), 8)


def leaving_one_out(total: Callable[[Tensor], Tensor], n: int, clip: float) -> Tensor:
    """By how many clip norms the sum of n units changes as each of them is left out: [n]."""
    index = torch.arange(n)
    whole = total(index)
    return torch.stack([(whole - total(index[index != i])).norm() / clip for i in range(n)])


@pytest.mark.parametrize("clip", CLIPS)
def test_records_end_to_end(clip: float) -> None:
    """80 pairs each, through the whole step."""
    moved = []
    for seed in range(4):
        toy, units = Toy(20, seed), of_records(20)
        moved.append(
            leaving_one_out(
                lambda kept: toy.total(units.groups(kept, in_blocks), clip),  # noqa: B023
                20,
                clip,
            )
        )
    assert float(torch.cat(moved).max()) <= EXACT
    assert float(torch.cat(moved).max()) > 0.99


# --- entities, end to end ----------------------------------------------------------------------

SIZES = [1, 3, 12, 2, 7] * 8  # records of each entity: more than GROUP of them
ROWS = sum(SIZES)
Combine = Literal["mean", "sum"]
Keep = Literal["first", "last"]


def entity(cap: int, combine: Combine, keep: Keep = "first") -> Entity:
    return Entity(key=("person",), max_records_per_entity=cap, select=keep, reduce=combine)


class People(Toy):
    """The toy with rows of 40 people, mixed up."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(ROWS, seed)
        g = torch.Generator().manual_seed(seed)
        owners = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
        self.owners = owners[torch.randperm(ROWS, generator=g)]
        self.weights[::3] = 1e7  # gradients far beyond any clip norm, beside small ones

    def units(self, spec: Entity, rows: Tensor) -> Units:
        """Of a file that holds these rows."""
        lines = [(2 + i, [f"p{int(self.owners[row])}"]) for i, row in enumerate(rows)]
        return of_entities(Table("people.csv", ["person"], lines), spec)

    def of_file(self, spec: Entity, rows: Tensor, clip: float) -> Tensor:
        """The clipped sum over everybody in a file of these rows."""
        toy, units = People.__new__(People), self.units(spec, rows)
        toy.__dict__ = self.__dict__ | {
            "x": self.x[rows],
            "y": self.y[rows],
            "weights": self.weights[rows],
        }
        return toy.total(units.groups(torch.arange(len(units)), in_blocks), clip)

    def leaving_out(self, spec: Entity, clip: float) -> Tensor:
        """By how many clip norms the sum changes without each person: [people]."""
        whole = self.of_file(spec, torch.arange(ROWS), clip)
        return torch.stack(
            [
                (whole - self.of_file(spec, torch.nonzero(self.owners != who)[:, 0], clip)).norm()
                / clip
                for who in range(len(SIZES))
            ]
        )


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("clip", [1e-4, 1.0, 1e3])
def test_entities_end_to_end(clip: float, combine: Combine) -> None:
    """80 pairs each; a whole person with up to 12 records comes or goes."""
    assert len(SIZES) > GROUP
    moved = torch.cat([People(seed).leaving_out(entity(5, combine), clip) for seed in (0, 1)])
    assert float(moved.max()) <= BOUND
    assert float(moved.max()) > 0.99


def test_a_cap_is_not_what_bounds_a_person() -> None:
    """Clipping is: without a cap a person with 12 records moves the sum by no more."""
    moved = People().leaving_out(entity(1000, "sum"), 1.0)
    assert 0.99 < float(moved.max()) <= BOUND


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_records_beyond_the_cap_change_nothing(keep: Keep, combine: Combine) -> None:
    people, spec = People(), entity(3, combine, keep)
    expected = people.of_file(spec, torch.arange(ROWS), 1.0)
    inside = torch.zeros(ROWS, dtype=torch.bool)
    inside[people.units(spec, torch.arange(ROWS)).members] = True
    assert int(inside.sum()) == sum(min(size, 3) for size in SIZES)
    people.x[~inside], people.weights[~inside] = 7.0, 1e6
    assert torch.equal(people.of_file(spec, torch.arange(ROWS), 1.0), expected)
    assert torch.equal(people.of_file(spec, torch.nonzero(inside)[:, 0], 1.0), expected)
    people.x[torch.nonzero(inside)[4]] += 1.0
    assert not torch.equal(people.of_file(spec, torch.arange(ROWS), 1.0), expected)


def test_an_entitys_gradient_is_clipped_whole() -> None:
    """Its records may cancel, or add up to no number at all: then it counts as zero."""
    toy = Toy(8, 0)
    toy.x[:] = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    toy.weights = torch.tensor([1e6, -1e6, 3e38, 3e38, 3e38, 3e38, 3e38, 1.0])
    toy.x[0] = toy.x[1]
    toy.x[2:7], toy.y[:7] = 1.0, 0
    rows, one = torch.arange(8), torch.ones(8)
    for row in range(7):
        moved = toy.total([Group(1, [UnitBatch(rows[row : row + 1], 1)])], 1.0)
        assert 0.99 < float(moved.norm()) <= EXACT
    owners = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2])
    both = toy.total([Group(3, [UnitBatch(rows, 8, owners, one)])], 1.0)
    alone = toy.total([Group(1, [UnitBatch(rows[7:], 1, owners[:1], one[:1])])], 1.0)
    assert torch.equal(both, alone)


# --- sequences and tokens ----------------------------------------------------------------------

LENGTHS = [16, 1, 2, 9, 16, 4, 3, 12, 7, 2, 5, 16]
N, WIDTH, VOCABULARY, LABELS, HIDDEN = len(LENGTHS), 16, 30, 3, 16
POISON = VOCABULARY - 1
TASKS = [("bert", "sequence"), ("bert", "tokens"), ("llama", "tokens"), ("llama", "next")]
TokenLoss = Callable[[Tensor, Tensor], Tensor]


class Language:
    """A tiny transformer with LoRA and a head, all of its trained weights times `scale`."""

    def __init__(self, kind: str, head: str, scale: float = 1.0) -> None:
        torch.manual_seed(1)
        g = torch.Generator().manual_seed(1)
        common: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "max_position_embeddings": 32,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
            "attn_implementation": "eager",
            "use_cache": False,
        }
        if kind == "bert":
            self.body: Any = BertModel(BertConfig(**common), add_pooling_layer=False)
            layers, targets = self.body.encoder.layer, ["query", "value", "dense"]
            embeddings = self.body.embeddings.word_embeddings
        else:
            self.body = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=1)).model
            layers, targets = self.body.layers, ["q_proj", "v_proj", "down_proj"]
            embeddings = self.body.embed_tokens
        inject_adapter_in_model(
            LoraConfig(r=2, lora_alpha=4.0, target_modules=targets),  # type: ignore[arg-type]
            layers,
        )
        self.body.requires_grad_(False).eval()
        self.kind = head
        self.head = nn.Linear(HIDDEN, VOCABULARY if head == "next" else LABELS)
        self.linears = [
            self.head,
            *(
                m
                for name, m in layers.named_modules()
                if name.endswith("lora_B.default") and isinstance(m, nn.Linear)
            ),
        ]
        self.parameters = [p for linear in self.linears for p in linear.parameters()]
        for p in self.parameters:
            p.data = 0.3 * scale * torch.randn(p.shape, generator=g)
            p.requires_grad_()
        embeddings.weight.data[POISON] = 3e38
        self.ids = torch.randint(1, POISON, (N, WIDTH), generator=g)
        self.tags = torch.randint(LABELS, (N, WIDTH), generator=g)
        self.mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
        self.token_loss: TokenLoss = token_classification.per_example_loss

    def losses(self, index: Tensor) -> Tensor:
        ids, mask = self.ids[index], self.mask[index]
        states = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.kind == "sequence":
            pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            return classification.per_example_loss(self.head(pooled), self.tags[index, 0])
        if self.kind == "tokens":
            tags = self.tags[index].masked_fill(mask == 0, token_classification.IGNORED)
            return self.token_loss(self.head(states), tags)
        return token_classification.next_token_loss(self.head(states), ids, mask)

    def total(self, kept: Tensor, clip: float) -> Tensor:
        optimizer = Seen(self.parameters, clip)
        private_gradient(
            self.linears, optimizer, of_records(N).groups(kept, in_blocks), self.losses
        )
        return optimizer.total


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e18])
@pytest.mark.parametrize(("kind", "head"), TASKS)
def test_language_models(kind: str, head: str, scale: float) -> None:
    """60 pairs each; the gradients come once, and records are taken out of them. One overflows."""
    task = Language(kind, head, scale)
    task.ids[4, 0] = POISON
    gradients = by_expanding(task.linears, torch.arange(N), task.losses)
    found = torch.cat([gradients[p].flatten(1) for p in task.parameters], dim=1)
    assert not bool(found[4].isfinite().all())
    shapes = [tuple(p.shape) for p in task.parameters]
    for clip in CLIPS:
        moved = changes(found, shapes, clip)
        assert float(moved.max()) <= EXACT
        assert float(moved[4]) == 0.0
        if clip <= 3e-3 and scale == 1.0:
            assert float(moved.max()) > 0.99


@pytest.mark.parametrize("clip", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize(("kind", "head"), TASKS)
def test_language_models_end_to_end(kind: str, head: str, clip: float) -> None:
    """12 pairs each, in blocks of 8: a record's company changes no bit of its gradient."""
    task = Language(kind, head)
    task.ids[4, 0] = POISON
    moved = leaving_one_out(lambda kept: task.total(kept, clip), N, clip)
    assert float(moved.max()) <= BOUND
    assert float(moved[4]) == 0.0
    if clip < 1:
        assert float(moved.max()) > 0.99


# --- the bound broken on purpose ---------------------------------------------------------------


def token_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """What libraries compute: the mean over the batch's tokens, here times its examples."""
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=token_classification.IGNORED,
        reduction="none",
    ).view(labels.shape)
    return losses.sum(dim=1) / (labels != token_classification.IGNORED).sum() * len(labels)


@pytest.mark.parametrize(("kind", "head"), TASKS[1:])
def test_a_mean_over_a_batchs_tokens_is_seen(
    monkeypatch: pytest.MonkeyPatch, kind: str, head: str
) -> None:
    """One long text makes all the short ones of its batch lighter."""
    monkeypatch.setitem(globals(), "in_blocks", lambda rows: [Block(rows, len(rows))])

    def worst(task: Language) -> float:
        task.ids[1:], task.tags[1:] = task.ids[1], task.tags[1]  # so that they pull together
        task.mask[1:] = (torch.arange(WIDTH) < 2).long()
        index = torch.arange(N)
        found = by_expanding(task.linears, index[1:], task.losses)
        clip = float(torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)[0])
        whole, without = task.total(index, clip), task.total(index[1:], clip)
        return float((whole - without).norm()) / clip

    assert worst(Language(kind, head)) <= BOUND
    task = Language(kind, head)
    task.token_loss = token_mean
    monkeypatch.setattr(token_classification, "per_example_loss", token_mean)
    assert worst(task) > 2


def no_clipping(self: DPOptimizer) -> None:
    for p in self.params:
        p.summed_grad += p.grad_sample.double().nan_to_num(0, 0, 0).sum(0) / self.unit


def clip_each_tensor(self: DPOptimizer) -> None:
    for p in self.params:
        own = p.grad_sample.flatten(1).double().nan_to_num(0, 0, 0)
        factors = (
            (self.effective_clip_norm / own.norm(dim=1, keepdim=True))
            .clamp(max=1.0)
            .nan_to_num(1.0)
        )
        p.summed_grad += (own * factors / self.unit).round().sum(0).view_as(p)


def factors_of(self: DPOptimizer, most: float) -> Tensor:
    whole = torch.cat([p.grad_sample.flatten(1) for p in self.params], dim=1).double()
    norms = whole.norm(dim=1)
    return torch.where(norms.isfinite(), (most / norms).clamp(max=1.0) / self.unit, 0.0)


def rounded(how: Callable[[Tensor], Tensor], exactly: bool) -> Callable[[Any], None]:
    def broken(self: DPOptimizer) -> None:
        factors = factors_of(self, self.max_grad_norm if exactly else self.effective_clip_norm)
        for p in self.params:
            own = p.grad_sample.flatten(1).double().nan_to_num(0, 0, 0)
            p.summed_grad += how(own * factors[:, None]).sum(0).view_as(p)

    return broken


BREAKS: dict[str, tuple[Callable[[Any], None], Callable[[], None]]] = {
    "no clipping": (no_clipping, lambda: test_gradients_of_every_kind(1.0)),
    "no clipping, records": (no_clipping, lambda: test_records_end_to_end(1.0)),
    "no clipping, entities": (no_clipping, lambda: test_entities_end_to_end(1.0, "sum")),
    "each tensor": (clip_each_tensor, lambda: test_gradients_of_every_kind(1.0)),
    "each tensor, records": (clip_each_tensor, lambda: test_records_end_to_end(1e-4)),
    "each tensor, tokens": (
        clip_each_tensor,
        lambda: test_language_models_end_to_end("llama", "next", 1e-4),
    ),
    "up, from the clip norm": (
        rounded(lambda x: x.sign() * x.abs().ceil(), True),
        lambda: test_many_parameters(1000, 1.0),
    ),
    "to the nearest, from the clip norm": (
        rounded(torch.round, True),
        lambda: test_many_parameters(1000, 1.0),
    ),
    "up, from below": (
        rounded(lambda x: x.sign() * x.abs().ceil(), False),
        lambda: test_many_parameters(1_000_000, 1.0),
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_clipping_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    broken, measure = BREAKS[name]
    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", broken)
    with pytest.raises(AssertionError):
        measure()


def test_the_measurements_need_nothing_but_right_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutations' own arithmetic, done right, passes what they fail."""
    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", rounded(torch.round, False))
    for _, measure in BREAKS.values():
        measure()


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_clipping_an_entitys_records_one_by_one_is_seen(
    monkeypatch: pytest.MonkeyPatch, combine: Combine
) -> None:
    """With the cap at 5, a person who has so many then moves the sum by up to five clip norms."""
    original = Units.groups

    def broken(self: Units, drawn: Tensor, blocks: Any) -> Iterable[Group]:
        for _, parts in original(self, drawn, blocks):
            for part in parts:
                yield Group(part.n, [UnitBatch(part.rows, part.n)])

    monkeypatch.setattr(Units, "groups", broken)
    moved = People().leaving_out(entity(5, combine), 1e-4)
    assert float(moved.max()) > 2
    with pytest.raises(AssertionError):
        test_entities_end_to_end(1e-4, combine)


def test_a_fake_record_in_an_empty_batch_is_seen() -> None:
    """One real record against none: with a fake in its place the sums differ by up to 2 C."""
    toy = Toy(8, 0)
    toy.x[:] = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    units, none, clip = of_records(8), torch.arange(0), 1e-3

    def total(kept: Tensor) -> Tensor:
        return toy.total(units.groups(kept, in_blocks), clip)

    assert not bool(total(none).any())
    alone = [total(torch.tensor([i])) for i in range(8)]
    assert all(0.99 * clip < float(one.norm()) <= EXACT * clip for one in alone)
    assert max(float((one - alone[0]).norm()) for one in alone) > 1.2 * clip
