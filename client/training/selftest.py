"""Before a worker trains: its model is the model that transformers makes of its files, and on its
own task one private step equals clipping by hand.

The frozen layers' hidden states equal those of transformers' own forward pass, with its own
attention and masks, for texts of up to model.max_tokens tokens, with padding and without. A model
of which that is not so (a sliding window that our layers do not know, say) is refused.

The rows are made up from the public contract, the noise is off, and the arithmetic of the check
shares nothing with client/training/dp_optimizer.py: each record's gradient by itself, from torch,
put together by unit and clipped in float64. A model whose examples mix (a batch norm, a loss
averaged over a batch), an engine that does not clip, or a torch that computes something else is
found before anything is charged. So is a processor or library that rounds a record's gradient
differently
where other records are beside it: it must be the same to the bit in any place, beside other records
and beside such of other lengths, for short texts and for texts of model.max_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silotune.client.training.dp_optimizer import DPOptimizer, private_gradient
from silotune.client.training.noise import NoiseSource
from silotune.client.training.per_sample_gradients import PER_EXAMPLE, Losses
from silotune.client.training.privacy_units import Group, Units, of_records
from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import PairInput, TableInput
from silotune.common.contract.model import OneHotModel
from silotune.common.contract.schedule import TensorGroups, format_groups
from silotune.common.contract.task import (
    Classification,
    Language,
    MultiLabel,
    Target,
    Tokens,
)
from silotune.common.data import featurize
from silotune.common.data.records import Inputs
from silotune.common.errors import RefusalError
from silotune.common.models.base import Encoded, Network
from silotune.common.models.batching import Block
from silotune.common.protocol.tensors import trained_names

ROWS = 18
WORDS = "a public sentence"
LONG = (16, 17)  # rows with texts of model.max_tokens, or nearly so many
FORWARD = 1e-4  # of a hidden state's norm; 1e-6 to 1e-5 was seen
TINY = 1e-12
TOLERANCE = 1e-3  # of the clip norm
# bf16 keeps 8 bits, and blocks of another size round in other places (0.003 to 0.08 was seen, over
# the whole sum of 18 records); ghost clips a little lower.
LOOSE = 0.2
# The states of tokens behind all layers in bf16.
FORWARD_LOOSE = 0.2


class _Silent(NoiseSource):
    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.zeros(shape)


FORWARD_PASSED = "forward"
HEAD_ALONE: TensorGroups = frozenset({"head"})
# What has passed in this process, by contract: simulations build many workers on one model.
_passed: WeakKeyDictionary[Network, set[str]] = WeakKeyDictionary()


def check(contract: Contract, model: Network) -> None:
    """RefusalError E208 unless the model is right, and under privacy the private step of every
    phase of the contract."""
    passed = _passed.setdefault(model, set())
    if contract.hash not in passed:
        with model.lock:
            if not isinstance(contract.model, OneHotModel) and FORWARD_PASSED not in passed:
                _check_forward(model, contract.model.max_tokens)
                passed.add(FORWARD_PASSED)
            if contract.privacy.mode == "dp":
                _check_noise()
                made_up = _MadeUp(contract, model)
                for groups in contract.trainings:
                    made_up.check(groups)
        passed.add(contract.hash)


def _check_forward(model: Network, longest: int) -> None:
    """The frozen layers give what transformers gives, for the longest text beside a padded one, and
    for two shorter ones."""
    for lengths in ((longest, longest // 2), (longest // 2, longest // 3)):
        for bf16 in (False, True) if model.bf16 else (False,):
            allowed = FORWARD_LOOSE if bf16 else FORWARD
            error = model.forward_error(lengths, bf16=bf16)
            if not error <= allowed:
                raise _broken(
                    "the model",
                    f"for texts of {lengths[0]} tokens its hidden states are "
                    f"{error:.2g} of their norm off transformers' own forward pass (allowed: "
                    f"{allowed:g}); use another model, or a smaller model.max_tokens",
                )


def _check_noise() -> None:
    noise = NoiseSource(site="self-test").normal((4096,))
    # Ten standard errors: what is off by chance once in 10^23 starts.
    if not (noise != 0).all() or abs(noise.std() - 1) > 10 / np.sqrt(2 * noise.size):
        raise _broken("the noise", f"it has a standard deviation of {noise.std():.3g}, not 1")


def _check_sum(groups: TensorGroups, parameters: list[torch.nn.Parameter]) -> None:
    """The clipped sum of the same gradients is the same to the bit in any order."""
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        source=_Silent(site="self-test"),
        noise_multiplier=1.0,
        clip_norm=1.0,
        divisor=1.0,
    )
    sums = []
    for order in (slice(None, None), slice(None, None, -1)):
        rng = np.random.default_rng(0)
        optimizer.begin()
        for p in parameters:
            values = rng.standard_normal((ROWS, *p.shape)).astype(np.float32)[order]
            p.grad_sample = torch.tensor(values.copy(), device=p.device)  # type: ignore[attr-defined]
        optimizer.clip_and_accumulate()
        sums.append([p.summed_grad for p in parameters])  # type: ignore[attr-defined]
        for p in parameters:
            p.grad_sample = p.summed_grad = None  # type: ignore[attr-defined]
    if not all(torch.equal(a, b) for a, b in zip(*sums, strict=True)):
        raise _broken(format_groups(groups), "the sum depends on the order of what is added")


def _broken(what: str, why: str) -> RefusalError:
    return RefusalError(
        f"The self-test of {what} failed: {why}. Nothing is trained with such an engine.",
        code="E208",
    )


class _MadeUp:
    """Rows of different lengths and their units, on the model to be trained."""

    def __init__(self, contract: Contract, model: Network) -> None:
        self.contract, self.model = contract, model
        inputs, targets = _rows(contract, model)
        self.encoded, self.labels = model.encode(inputs), model.objective.tensor(targets)
        self._check_frozen(inputs)
        entity = contract.privacy.entity
        self.units = of_records(ROWS)
        if entity:
            starts = torch.tensor([0, 1, *range(2, ROWS + 1, 2)])
            self.units = Units(torch.arange(ROWS), starts, entity.reduce == "mean")
        rng = np.random.default_rng(0)
        self.initial = model.initial_arrays()
        # Away from zero: a head of zeros would hide every gradient of the adapter behind it.
        model.load(
            {
                name: (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32)
                for name, a in self.initial.items()
            }
        )

    def _check_frozen(self, inputs: Inputs) -> None:
        """What the frozen layers give for a record is the same to the bit among other records, in
        another order, and with half of them gone."""
        for others in (range(ROWS - 1, -1, -1), range(LONG[0] % 2, ROWS, 2)):
            again = self.model.encode([inputs[row] for row in others])  # type: ignore[arg-type]
            for place, row in enumerate(others):
                pairs = zip(_frozen(self.encoded, row), _frozen(again, place), strict=True)
                if not all(torch.equal(a, b) for a, b in pairs):
                    raise _broken("the frozen layers", "a record's outputs depend on others")

    def check(self, groups: TensorGroups) -> None:
        names = trained_names(self.initial, groups)
        with self.model.requiring(names):
            self._check(groups, [self.model.named_tensors()[name] for name in names])

    def _check(self, groups: TensorGroups, parameters: list[torch.nn.Parameter]) -> None:
        model, engine = self.model, self.model.performance.gradients
        factors = torch.ones(ROWS)  # of the records' losses

        def losses(index: Tensor) -> Tensor:
            outputs = model(self.encoded, index, adapter=groups != HEAD_ALONE)
            targets = model.targets(self.encoded, self.labels, index).to(outputs.device)
            return model.objective.losses(outputs, targets) * factors[index].to(outputs.device)

        alone = [
            torch.cat(
                [
                    g.double().flatten()
                    for g in torch.autograd.grad(losses(torch.tensor([row])).sum(), parameters)
                ]
            )
            for row in range(ROWS)
        ]
        whole = [
            torch.stack([alone[row] for row in rows]).sum(dim=0)
            / (len(rows) if self.units.mean else 1)
            for rows in self._members()
        ]
        # Below the middle one's norm: some gradients are clipped, and some are not.
        clip = max(0.99 * float(torch.stack([g.norm() for g in whole]).median()), TINY)
        clipped = [g * min(1.0, clip / max(float(g.norm()), TINY)) for g in whole]

        def blocks(rows: Tensor) -> Iterator[Block]:
            for half in rows.tensor_split(2):
                yield from model.micro_batches(self.encoded, half, adapter=groups != HEAD_ALONE)

        def unit_groups(order: Tensor) -> Iterator[Group]:
            """More than one, and of more than one block, also where one would hold all the rows."""
            for half in order.tensor_split(2):
                yield from self.units.groups(half, blocks)

        def step(order: Tensor) -> Tensor:
            optimizer = DPOptimizer(
                torch.optim.SGD(parameters, lr=1.0),
                source=_Silent(site="self-test"),
                noise_multiplier=1e-6,
                clip_norm=clip,
                divisor=1.0,
            )
            private_gradient(
                model.trained_modules(groups),
                optimizer,
                unit_groups(order),
                losses,
                gradients=engine,
            )
            return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

        tolerance = LOOSE if model.bf16 or engine == "ghost" else TOLERANCE

        def compare(found: Tensor, by_hand: Tensor, what: str) -> None:
            error = float((found.double() - by_hand).norm()) / clip
            if not error <= tolerance:
                raise _broken(
                    format_groups(groups),
                    f"{what} is off by {error:.2g} clip norms (allowed: {tolerance:g})",
                )

        order = torch.arange(len(self.units))
        found = step(order)
        compare(found, torch.stack(clipped).sum(dim=0), "the private step")
        if engine != "ghost":
            self._check_places(groups, losses)
        _check_sum(groups, parameters)
        factors[0] = torch.inf
        compare(step(order[:4]), torch.stack(clipped[1:4]).sum(dim=0), "a step that overflows")

    def _check_places(self, groups: TensorGroups, losses: Losses) -> None:
        """A record's gradient is the same to the bit wherever in a block it and others lie, and
        beside itself alone: among the shortest texts, and among the longest."""
        gradients = PER_EXAMPLE[self.model.performance.gradients]
        linears = self.model.trained_modules(groups)
        blocks = [
            block.rows
            for block in self.model.micro_batches(
                self.encoded, torch.arange(ROWS), adapter=groups != HEAD_ALONE
            )
        ]
        for rows in {id(found): found for found in (blocks[0], blocks[-1])}.values():
            every = torch.arange(len(rows))
            places = [every.flip(0), torch.zeros_like(every)]
            if groups == HEAD_ALONE:  # where more of them cost nothing
                places += [every.roll(shift) for shift in range(1, len(rows), 3)]
            first = gradients(linears, rows, losses)
            for others in places:
                moved = gradients(linears, rows[others], losses)
                if not all(torch.equal(g, first[p][others]) for p, g in moved.items()):
                    raise _broken(
                        format_groups(groups),
                        "a record's gradient depends on which others lie where",
                    )

    def _members(self) -> Iterator[list[int]]:
        starts = self.units.starts.tolist()
        for begin, end in pairwise(starts):
            yield self.units.members[begin:end].tolist()


def _frozen(encoded: Encoded, row: int) -> Iterator[Tensor]:
    """All that a record has of what the frozen layers gave."""
    for text in encoded.texts[row].tolist():
        part = slice(None)
        if encoded.starts is not None:
            part = slice(int(encoded.starts[text]), int(encoded.starts[text + 1]))
            by_token = len(encoded.features) == int(encoded.starts[-1])
            yield encoded.features[part] if by_token else encoded.features[text]
        else:
            yield encoded.features[text]
        if encoded.hidden is not None:
            yield encoded.hidden[part]


def _rows(contract: Contract, model: Network) -> tuple[Inputs, list[Target]]:
    """Made-up rows of different lengths and their targets; nothing in them is anybody's.

    Rows next to each other, which may be one entity, pull the same way: else their mean would be
    small, and whether it is clipped as one would not show. Of texts the rows LONG are as long as
    the contract allows, and a few tokens shorter.
    """
    times = [row % 7 + 1 for row in range(ROWS)]
    if not isinstance(contract.input, TableInput):
        assert not isinstance(contract.model, OneHotModel)
        most = contract.model.max_tokens
        two, three = (
            int(found) for found in model.encode(_inputs(contract, [2, 3])).lengths(torch.arange(2))
        )
        times[LONG[0]] = most  # every time at least a token: the rest is cut off
        times[LONG[1]] = max((most - 1 - two) // max(three - two, 1) + 2, 1)
    return _inputs(contract, times), [_target(contract, row, times[row]) for row in range(ROWS)]


def _inputs(contract: Contract, times: Sequence[int]) -> Inputs:
    """A row for each number, that often the same words."""
    if isinstance(contract.input, TableInput):
        return featurize.synthetic(contract.input, len(times), seed=0)
    texts = [" ".join([WORDS] * n) for n in times]
    if isinstance(contract.task, Language):
        answers = [f"the answer is {row // 2}" for row in range(len(times))]
        return [
            (text, " ".join([answer] * (row // 2 % 4 + 1)))
            for row, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]
    if isinstance(contract.input, PairInput):
        return [(text, f"another one, {row % 5}") for row, text in enumerate(texts)]
    return texts


def _target(contract: Contract, row: int, times: int) -> Target:
    task, number = contract.task, row // 2
    if isinstance(task, Classification):
        return number % len(task.labels)
    if isinstance(task, Tokens):
        return [(number + word) % task.outputs for word in range(times * len(WORDS.split()))]
    if isinstance(task, MultiLabel):
        return [(number + label) % 2 for label in range(task.outputs)]
    return number % 2
