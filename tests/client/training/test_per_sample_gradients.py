"""Per-example gradients of transformers with LoRA equal a loop over records taken alone: for every
head, engine, attention and padding, with checkpointing, bfloat16 and micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from silotune.client.training import dp_optimizer
from silotune.client.training.dp_optimizer import DPOptimizer, private_gradient
from silotune.client.training.noise import NoiseSource
from silotune.client.training.per_sample_gradients import PER_EXAMPLE, ghost_sum
from silotune.client.training.privacy_units import Group, UnitBatch
from silotune.common.models.attention import fuse_lora, register_attention
from silotune.common.models.batching import blocks_of
from silotune.common.tasks import classification, token_classification

LENGTHS = [7, 1, 12, 4, 9, 2]  # tokens of each record
N, WIDTH, VOCABULARY, LABELS, HIDDEN = len(LENGTHS), max(LENGTHS), 40, 3, 16
POISON = VOCABULARY - 1  # a token that no record holds; its embedding can be made to overflow
TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
CASES = [
    ("bert", "sequence"),
    ("bert", "tokens"),
    ("bert", "regression"),
    ("llama", "sequence"),
    ("llama", "tokens"),
    ("llama", "regression"),
    ("llama", "next"),
    ("llama", "next, head frozen"),
]
ENGINES = [*PER_EXAMPLE, "ghost"]


class Silent(NoiseSource):
    """A source whose noise is zero, to see the clipped sum itself."""

    def normal(self, shape: tuple[int, ...]) -> Any:
        return np.zeros(shape)


class Task:
    """A tiny network with LoRA on all Linears of its layers, a head, and made-up records.

    Rows are padded behind to the longest of a batch and `more`, or to `width` if that is given.
    """

    def __init__(
        self, kind: str, head: str, attention: str = "eager", fused: bool = False, width: int = 0
    ) -> None:
        g = torch.Generator().manual_seed(0)
        self.head_kind, self.more, self.width, self.ahead = head, 0, width, 0
        self.network = network(kind, attention)
        config = LoraConfig(
            r=2,
            lora_alpha=4.0,
            lora_dropout=0.0,  # type: ignore[arg-type]
            target_modules=TARGETS[kind],
        )
        self.layers = self.network.encoder.layer if kind == "bert" else self.network.model.layers
        inject_adapter_in_model(config, self.layers)
        if fused:
            fuse_lora(self.layers)
        self.network.requires_grad_(False)
        b = [
            m
            for name, m in self.layers.named_modules()
            if name.endswith("lora_B.default") and isinstance(m, nn.Linear)
        ]
        sizes = {"sequence": LABELS, "tokens": LABELS, "regression": 1}
        self.head = nn.Linear(HIDDEN, sizes.get(head, VOCABULARY))
        self.linears: list[nn.Linear] = [*b, *([] if head == "next, head frozen" else [self.head])]
        for linear in [*b, self.head]:
            for p in linear.parameters():
                p.data = 0.2 * torch.randn(p.shape, generator=g)
                p.requires_grad_(linear in self.linears)
        self.parameters = [p for linear in self.linears for p in linear.parameters()]
        self.network.eval()
        self.ids = torch.randint(1, POISON, (N, WIDTH), generator=g)
        self.lengths = torch.tensor(LENGTHS)
        self.labels = torch.randint(LABELS, (N,), generator=g)
        self.tags = torch.randint(LABELS, (N, WIDTH), generator=g)
        self.tags[0, 3] = token_classification.IGNORED
        self.values = torch.randn(N, generator=g)

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        body = getattr(self.network, "model", self.network)
        found: Tensor = body(input_ids=ids, attention_mask=mask).last_hidden_state
        return found

    def losses(self, index: Tensor) -> Tensor:
        """Tokens before the first of a record and behind its last are padding."""
        width = (self.width or int(self.lengths[index].max()) + self.more) + self.ahead
        mask = torch.zeros(len(index), width, dtype=torch.long)
        ids, tags = torch.full_like(mask, 3), torch.full_like(mask, token_classification.IGNORED)
        for row, i in enumerate(index.tolist()):
            own = slice(self.ahead, self.ahead + int(self.lengths[i]))
            ids[row, own] = self.ids[i, : int(self.lengths[i])]
            tags[row, own] = self.tags[i, : int(self.lengths[i])]
            mask[row, own] = 1
        states = self.states(ids, mask).float()
        if self.head_kind == "tokens":
            return token_classification.per_example_loss(self.head(states), tags)
        if self.head_kind.startswith("next"):
            return token_classification.next_token_loss(self.head(states), ids, mask)
        pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        if self.head_kind == "regression":
            return torch.square(self.head(pooled)[:, 0] - self.values[index])
        return classification.per_example_loss(self.head(pooled), self.labels[index])

    def alone(self) -> Tensor:
        """The gradient of each record by itself, without padding: [N, all]."""
        return torch.stack(
            [
                flat(torch.autograd.grad(self.losses(torch.tensor([i])).sum(), self.parameters))
                for i in range(N)
            ]
        )

    def found(self, engine: str, index: Tensor) -> Tensor:
        """The same, by an engine: [n, all]."""
        gradients = PER_EXAMPLE[engine](self.linears, index, self.losses)
        assert set(gradients) == set(self.parameters)
        return torch.cat([gradients[p].flatten(1) for p in self.parameters], dim=1)


def network(kind: str, attention: str) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "attn_implementation": attention,
        "initializer_range": 0.2,  # or attention is uniform, and nobody would miss it
        "use_cache": False,
    }
    if kind == "bert":
        return BertModel(
            BertConfig(
                **common,
                num_attention_heads=2,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )
    return LlamaForCausalLM(LlamaConfig(**common, num_attention_heads=4, num_key_value_heads=2))


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Each row's difference is at most `tolerance` of the norm of the expected row."""
    assert found.shape == expected.shape
    error = (found - expected).norm(dim=-1)
    assert bool((error <= tolerance * expected.norm(dim=-1) + 1e-7).all()), error


def clipped(gradients: Tensor, clip: float) -> Tensor:
    factors: Tensor = (clip / gradients.norm(dim=1, keepdim=True)).clamp(max=1)
    return gradients * factors


@pytest.fixture(scope="module")
def alone() -> Callable[[str, str], Tensor]:
    """The loop over records for each case, by PEFT's own layers and eager attention."""
    known: dict[tuple[str, str], Tensor] = {}

    def get(kind: str, head: str) -> Tensor:
        if (kind, head) not in known:
            known[kind, head] = Task(kind, head).alone()
        return known[kind, head]

    return get


Alone = Callable[[str, str], Tensor]


# --- every head, engine and layer --------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("attention", "fused"),
    [("eager", False), ("eager", True), ("silotune", False), ("silotune", True)],
)
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_it_equals_a_loop(
    kind: str, head: str, attention: str, fused: bool, engine: str, alone: Alone
) -> None:
    """Rows of different lengths in one padded batch, against each row alone without padding.

    Float32 has 24 bits and two tiny layers add up few numbers: 2e-6 of a gradient's norm was seen.
    """
    register_attention()
    task, expected = Task(kind, head, attention, fused), alone(kind, head)
    moving = expected.norm(dim=1) > 0
    # A text of one token predicts nothing.
    assert moving.tolist() == [not head.startswith("next") or n > 1 for n in LENGTHS]
    index = torch.arange(N)
    if engine != "ghost":
        near(task.found(engine, index), expected)
        return
    clip = float(expected.norm(dim=1).median())
    norms, sums = ghost_sum(task.linears, index, N, task.losses, clip)
    torch.testing.assert_close(norms, expected.norm(dim=1), rtol=1e-5, atol=1e-6)
    assert set(sums) == set(task.parameters)
    by_hand = clipped(expected, clip).nan_to_num().sum(dim=0)
    near(flat(sums[p] for p in task.parameters), by_hand)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_company_and_padding_change_nothing(kind: str, head: str, engine: str) -> None:
    """Other records, their order and more padding behind move a gradient by roundings only."""
    register_attention()
    task = Task(kind, head, "silotune", fused=True)
    expected = task.alone()
    for rows, more in (([4, 1], 0), ([5, 1, 4, 4, 0], 3), ([2, 4], 9)):
        index = torch.tensor(rows)
        task.more = more
        if engine != "ghost":
            near(task.found(engine, index), expected[index])
            continue
        n = len(rows) - 1  # the last one only fills the block
        _, sums = ghost_sum(task.linears, index, n, task.losses, 1e-2)
        by_hand = clipped(expected[index[:n]], 1e-2).nan_to_num().sum(dim=0)
        near(flat(sums[p] for p in task.parameters), by_hand)


@pytest.mark.parametrize("attention", ["eager", "silotune"])
@pytest.mark.parametrize("head", ["next", "sequence", "tokens"])
def test_padding_before_a_text_changes_nothing(head: str, attention: str) -> None:
    """Llama's positions are relative, so that a text may begin later; padding's own queries then
    see nothing at all, which must not become NaN. Positions turn by more, hence 1e-4."""
    register_attention()
    task = Task("llama", head, attention)
    expected = task.alone()
    task.ahead = 5
    near(task.found("expanded", torch.arange(N)), expected, 1e-4)


def test_a_mean_over_a_batchs_tokens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop has the power to tell the token mean: a loss that libraries compute by default."""
    task = Task("llama", "next")
    expected = task.alone()

    def broken(logits: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=token_classification.IGNORED,
            reduction="none",
        )
        return (
            losses.view(labels.shape).sum(dim=1)
            / (labels != token_classification.IGNORED).sum()
            * len(labels)
        )

    monkeypatch.setattr(token_classification, "per_example_loss", broken)
    with pytest.raises(AssertionError):
        near(task.found("expanded", torch.arange(N)), expected, 0.1)


# --- a record that overflows -------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("kind", "head"), [("bert", "tokens"), ("llama", "next")])
@pytest.mark.parametrize("bad", [[2], [0], [5], [0, 2, 5], list(range(N))])
def test_a_record_that_overflows_is_left_out(
    kind: str, head: str, engine: str, bad: list[int]
) -> None:
    """Its own gradient is not finite, the others' are what they were, and the sum is theirs."""
    task = Task(kind, head, width=WIDTH)
    expected = clipped(task.alone(), 1e-2).nan_to_num()
    task.ids[bad, 0] = POISON
    body = getattr(task.network, "model", task.network)
    embeddings = body.embeddings.word_embeddings if kind == "bert" else body.embed_tokens
    embeddings.weight.data[POISON] = 3e38
    if head == "next":
        task.lengths[bad] = WIDTH  # so that the token is one to predict from
    index, good = torch.arange(N), [i for i in range(N) if i not in bad]
    if engine == "ghost":
        norms, sums = ghost_sum(task.linears, index, N, task.losses, 1e-2)
        assert len(norms) == len(good) or not good
        near(flat(sums[p] for p in task.parameters), expected[good].sum(dim=0))
    else:
        finite = task.found(engine, index).isfinite().all(dim=1)
        assert finite.tolist() == [i in good for i in range(N)]
        torch.testing.assert_close(
            clipped(task.found(engine, index)[good], 1e-2).nan_to_num(),
            expected[good],
            rtol=0,
            atol=1e-6,
        )
    grad = step(task, [UnitBatch(index, N)], engine, clip=1e-2)
    assert bool(grad.isfinite().all())
    tolerance = 2e-3 if engine == "ghost" else 1e-5  # dp.GHOST_SLACK
    assert float((grad - expected[good].sum(dim=0)).norm()) <= tolerance * 1e-2 * N


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_left_out_exactly(engine: str) -> None:
    """In blocks of a fixed size no bit of the sum tells that such a record was there."""
    task = Task("bert", "sequence", width=WIDTH)
    task.network.embeddings.word_embeddings.weight.data[POISON] = 3e38
    task.ids[4, 0] = POISON
    rest = torch.tensor([0, 1, 2, 3, 5])
    fill = torch.cat([rest, rest[:1]])
    with_it = step(task, [UnitBatch(torch.tensor([0, 1, 2, 3, 5, 4]), N)], engine, clip=1e-2)
    without = step(task, [UnitBatch(fill, N - 1)], engine, clip=1e-2)
    assert torch.equal(with_it, without)


def step(
    task: Task, parts: list[UnitBatch], engine: str = "expanded", clip: float = 1.0, units: int = 0
) -> Tensor:
    """The flat private gradient without noise; one group a part, or all parts in one of `units`."""
    optimizer = DPOptimizer(
        torch.optim.SGD(task.parameters, lr=1.0),
        source=Silent(site="a"),
        noise_multiplier=1e-6,
        clip_norm=clip,
        divisor=1.0,
    )
    groups = [Group(units, parts)] if units else [Group(part.n, [part]) for part in parts]
    private_gradient(task.linears, optimizer, groups, task.losses, gradients=engine)
    return flat(p.grad for p in task.parameters)


# --- checkpointing, bfloat16 -------------------------------------------------------------------


@contextmanager
def checkpointed(task: Task) -> Iterator[None]:
    """Each layer keeps only its input, as in common/models/encoder.py."""
    for layer in task.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in task.layers:
            del layer.forward


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_checkpointing_changes_no_bit(kind: str, head: str, fused: bool) -> None:
    register_attention()
    task = Task(kind, head, "silotune", fused)
    index = torch.arange(N)
    expected, runs = task.found("expanded", index), 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    part = task.layers[0].mlp if kind == "llama" else task.layers[0].intermediate
    handle = part.register_forward_pre_hook(count)
    with checkpointed(task):
        assert torch.equal(task.found("expanded", index), expected)
    handle.remove()
    assert runs == 2  # it did run twice


@pytest.mark.parametrize("attention", ["eager", "silotune"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_bfloat16_is_off_by_its_roundings(
    kind: str, head: str, attention: str, fused: bool, alone: Alone
) -> None:
    """bfloat16 keeps 8 bits: a number is off by 2^-9 at most, and by 2^-9 / sqrt(3) = 0.0011 in the
    root mean square. A gradient here has passed some 40 roundings (two layers of seven products
    and their adapters, forward and back) and so is off by about 0.0011 sqrt(40) = 0.007 of its
    norm: 0.003 to 0.044 was seen, most where a gradient's terms cancel. 0.08 is allowed.
    Different records round differently: their errors' mean was 0.27 to 0.55 of the errors' root
    mean square, for independent ones 1 / sqrt(6) = 0.41. What an engine got wrong in all records
    alike (a scale, a bias) would make that 1; 0.75 is allowed.
    """
    register_attention()
    task, expected = Task(kind, head, attention, fused), alone(kind, head)
    with torch.autocast("cpu", torch.bfloat16):
        found = task.found("expanded", torch.arange(N))
    assert found.dtype == torch.float32
    moving = expected.norm(dim=1) > 0
    scale = expected[moving].norm(dim=1, keepdim=True)
    error = (found[moving] - expected[moving]) / scale
    assert not bool(found[~moving].any())
    assert float(error.norm(dim=1).max()) < 0.08
    typical = float(error.norm(dim=1).square().mean().sqrt())
    assert 1e-3 < typical < 0.04
    assert float(error.mean(dim=0).norm()) < 0.75 * typical


# --- micro-batches -----------------------------------------------------------------------------


def splits(n: int) -> list[list[Tensor]]:
    """Whole, one by one, in the middle, at random."""
    index = torch.arange(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return [
        [index],
        list(torch.split(index, 1)),
        list(torch.split(index, 4)),
        list(torch.split(order, [1, n - 3, 2])),
    ]


@pytest.mark.parametrize("engine", PER_EXAMPLE)
@pytest.mark.parametrize(("kind", "head"), [("bert", "tokens"), ("llama", "next")])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e3])
def test_any_split_gives_the_same_sum(kind: str, head: str, engine: str, clip: float) -> None:
    """Bit by bit where the gradients are the same bits: sums are of whole numbers. Where blocks of
    another size round otherwise, a gradient may round to another whole number here and there."""
    task = Task(kind, head)
    index = torch.arange(N)
    gradients = PER_EXAMPLE[engine](task.linears, index, task.losses)
    sums = []
    for parts in splits(N):
        optimizer = DPOptimizer(
            torch.optim.SGD(task.parameters, lr=1.0),
            source=Silent(site="a"),
            noise_multiplier=1e-6,
            clip_norm=clip,
            divisor=1.0,
        )
        optimizer.begin()
        for part in parts:
            for p in task.parameters:
                p.grad_sample = gradients[p][part]  # type: ignore[attr-defined]
            optimizer.clip_and_accumulate()
        sums.append(flat(p.summed_grad for p in task.parameters))  # type: ignore[attr-defined]
        assert torch.equal(sums[-1], sums[0])
    assert bool(sums[0].any())
    by_hand = clipped(task.alone(), clip).nan_to_num().sum(dim=0)
    rounding = N * optimizer.unit * math.sqrt(by_hand.numel()) / 2
    for parts in splits(N):
        found = step(task, [UnitBatch(part, len(part)) for part in parts], engine, clip)
        assert float((found - by_hand).norm()) <= rounding + 1e-5 * float(by_hand.norm())


def test_in_blocks_of_one_size_no_bit_depends_on_the_split() -> None:
    """Blocks as common/models/base.py makes them: filled up, and of one padded length each."""
    register_attention()
    task = Task("bert", "sequence", "silotune", fused=True, width=16)
    sums, gradients = [], []
    for order in (range(N), range(N - 1, -1, -1), [3, 0, 5, 1, 4, 2]):
        index = torch.tensor(list(order))
        blocks = list(blocks_of(index, task.lengths[index], 4))
        assert [n for _, n in blocks] == [4, 2]
        sums.append(step(task, [UnitBatch(rows, n) for rows, n in blocks], clip=0.1))
        found = torch.zeros(N, sums[0].numel())
        for rows, n in blocks:
            found[rows[:n]] = task.found("expanded", rows)[:n]
        gradients.append(found)
    assert all(torch.equal(g, gradients[0]) for g in gradients)
    assert all(torch.equal(g, sums[0]) for g in sums)


@pytest.mark.parametrize("engine", PER_EXAMPLE)
@pytest.mark.parametrize("mean", [False, True])
def test_an_entity_may_lie_in_several_blocks(engine: str, mean: bool) -> None:
    """Its records' gradients add up over the blocks of a group, and are clipped once."""
    task = Task("bert", "tokens")
    owner = torch.tensor([0, 1, 1, 0, 2, 1])
    size = owner.bincount().float()
    weights = 1 / size if mean else torch.ones(3)
    whole = torch.zeros(3, sum(p.numel() for p in task.parameters))
    whole.index_add_(0, owner, task.alone() * weights[owner][:, None])
    clip = float(whole.norm(dim=1).median())
    for parts in splits(N):
        found = step(
            task,
            [UnitBatch(rows, len(rows), owner[rows], weights[owner[rows]]) for rows in parts],
            engine,
            clip,
            units=3,
        )
        near(found, clipped(whole, clip).sum(dim=0))


# --- what is left behind -----------------------------------------------------------------------


def condition(task: Task) -> list[object]:
    """All that an engine could leave on the modules and parameters."""
    found: list[object] = []
    for name, module in [*task.network.named_modules(), ("head", task.head)]:
        found.append((name, module.training, sorted(module.__dict__)))
        found += [
            sorted(value) for key, value in sorted(module.__dict__.items()) if key.endswith("hooks")
        ]
        for p in module.parameters(recurse=False):
            assert p.grad is None
            found += [sorted(p.__dict__), p.requires_grad, p.detach().clone().tolist()]
    return found


def run(engine: str, task: Task, losses: Callable[[Tensor], Tensor]) -> None:
    index = torch.arange(3)
    if engine == "ghost":
        ghost_sum(task.linears, index, 2, losses, 1e-2)
    else:
        PER_EXAMPLE[engine](task.linears, index, losses)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_modules_are_left_as_they_were(engine: str, fused: bool, training: bool) -> None:
    """Also when the loss raises: at once, half-way, or in its backward pass."""
    register_attention()
    task = Task("bert", "tokens", "silotune", fused)
    task.network.train(training)
    task.head.train(not training)
    before, outputs = condition(task), task.losses(torch.arange(N)).detach()
    run(engine, task, task.losses)
    assert condition(task) == before

    def at_once(index: Tensor) -> Tensor:
        raise ZeroDivisionError

    def half_way(index: Tensor) -> Tensor:
        task.losses(index)
        raise ZeroDivisionError

    def backward(index: Tensor) -> Tensor:
        def fail(_: Tensor) -> Tensor:
            raise ZeroDivisionError

        losses = task.losses(index)
        losses.register_hook(fail)  # type: ignore[no-untyped-call]
        return losses

    def poisoned(index: Tensor) -> Tensor:
        """Ghost clipping starts again without such a record."""
        return task.losses(index) * torch.where(index == 1, math.nan, 1.0)

    for losses in (at_once, half_way, backward):
        with pytest.raises(ZeroDivisionError):
            run(engine, task, losses)
        assert condition(task) == before
    run(engine, task, poisoned)
    assert condition(task) == before
    assert torch.equal(task.losses(torch.arange(N)).detach(), outputs)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_failed_leaves_nothing_for_the_next(engine: str) -> None:
    task = Task("bert", "tokens")
    optimizer = DPOptimizer(
        torch.optim.SGD(task.parameters, lr=1.0),
        source=Silent(site="a"),
        noise_multiplier=1e-6,
        clip_norm=1.0,
        divisor=1.0,
    )
    owners = None if engine == "ghost" else torch.zeros(2, dtype=torch.long)
    weights = None if engine == "ghost" else torch.ones(2)
    part = UnitBatch(torch.tensor([1, 2]), 2, owners, weights)
    calls = 0

    def losses(index: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError
        return task.losses(index)

    with pytest.raises(ZeroDivisionError):
        private_gradient(
            task.linears, optimizer, [Group(1, [part, part])], losses, gradients=engine
        )
    units = 0 if engine == "ghost" else 1
    private_gradient(task.linears, optimizer, [Group(units, [part])], task.losses, gradients=engine)
    found = flat(p.grad for p in task.parameters)
    assert torch.equal(found, step(task, [part], engine, units=units))


# --- another device ----------------------------------------------------------------------------


class Elsewhere(Task):
    """The same on torch's "meta" device, which has shapes and no numbers. Within a FakeTensorMode
    every operation on tensors of two devices raises there, as it would with a GPU.

    (Fake tensors on "cuda" would say the same, but eager autograd asks for a CUDA build of torch.)
    """

    def leave(self) -> None:
        for module in [*self.network.modules(), self.head]:
            for name, p in list(module._parameters.items()):
                if p is not None:
                    there = torch.empty(p.shape, device="meta")
                    module._parameters[name] = nn.Parameter(there, p.requires_grad)
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = torch.empty_like(buffer, device="meta")
        self.parameters = [p for linear in self.linears for p in linear.parameters()]
        self.calls = 0

    def losses(self, index: Tensor) -> Tensor:
        self.calls += 1
        states = self.states(
            self.ids[index].to("meta"),
            torch.ones(len(index), WIDTH, dtype=torch.long, device="meta"),
        )
        if self.head_kind == "tokens":
            return token_classification.per_example_loss(
                self.head(states), self.tags[index].to("meta")
            )
        if self.head_kind == "next":
            ids = self.ids[index].to("meta")
            return token_classification.next_token_loss(
                self.head(states), ids, torch.ones_like(ids)
            )
        labels = self.labels[index].to("meta")
        return classification.per_example_loss(self.head(states.mean(1)), labels)


def elsewhere(
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    kind: str,
    head: str,
    fused: bool,
    entity: bool,
    finite: bool,
) -> None:
    register_attention()
    owners, weights = torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.5, 0.5])
    rows = torch.tensor([3, 0, 5, 3])
    part = UnitBatch(rows, 3, owners, weights) if entity else UnitBatch(rows, 3)
    # Whether all gradients are finite: there are no numbers to tell from.
    monkeypatch.setattr(FakeTensor, "__bool__", lambda _: finite)
    monkeypatch.setattr(FakeTensor, "__int__", lambda _: 0)
    task = Elsewhere(kind, head, "silotune", fused)
    with FakeTensorMode(allow_non_fake_inputs=True):
        task.leave()
        optimizer = DPOptimizer(
            torch.optim.SGD(task.parameters, lr=1.0),
            source=NoiseSource(site="a"),
            noise_multiplier=1.0,
            clip_norm=1.0,
            divisor=10.0,
        )
        groups = [Group(2, [part, part])] if entity else [Group(3, [part]), Group(3, [part])]
        private_gradient(task.linears, optimizer, groups, task.losses, gradients=engine)
        assert task.calls == 2
        for p in task.parameters:
            assert p.grad is not None
            assert p.grad.device.type == p.device.type == "meta"
            assert (p.grad.shape, p.grad.dtype) == (p.shape, p.dtype)


@pytest.mark.parametrize(
    ("engine", "entity", "finite"),
    [
        ("expanded", False, True),
        ("expanded", False, False),
        ("expanded", True, True),
        ("hooks", False, True),
        ("hooks", True, True),
        ("ghost", False, True),
    ],
)
@pytest.mark.parametrize(
    ("kind", "head", "fused"),
    [
        ("bert", "sequence", False),
        ("bert", "tokens", True),
        ("llama", "tokens", False),
        ("llama", "next", True),
    ],
)
def test_nothing_assumes_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    head: str,
    fused: bool,
    engine: str,
    entity: bool,
    finite: bool,
) -> None:
    elsewhere(monkeypatch, engine, kind, head, fused, entity, finite)


def noise_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    def broken(total: Tensor, std: float, source: NoiseSource) -> Tensor:
        return total + std * torch.from_numpy(source.normal(tuple(total.shape)))

    patch.setattr(dp_optimizer, "add_gaussian_noise", broken)


def sum_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    def broken(self: DPOptimizer) -> None:
        for p in self.params:
            p.summed_grad = torch.zeros(p.shape, dtype=torch.float64)

    patch.setattr(DPOptimizer, "begin", broken)


@pytest.mark.parametrize("mutation", [noise_on_the_cpu, sum_on_the_cpu], ids=lambda m: m.__name__)
def test_what_assumes_a_cpu_is_seen(
    monkeypatch: pytest.MonkeyPatch, mutation: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutation(monkeypatch)
    with pytest.raises(RuntimeError, match=r"same device|different devices"):
        elsewhere(monkeypatch, "expanded", "bert", "tokens", True, False, True)
