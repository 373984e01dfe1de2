"""What both sides run: blocks of records, a network with a head, the one-hot model.

The frozen layers run once a text (`encode`); training and evaluation run only the adapted layers
and the head on their outputs. What `encode` returns is private when the records are: it stays with
whoever holds them.

Shapes: N records, U texts, T tokens, H hidden size, F features, L outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from silotune.common.contract.compute import Performance
from silotune.common.contract.schedule import TensorGroup
from silotune.common.contract.task import Task
from silotune.common.data.records import Inputs
from silotune.common.errors import DataError, ErrorCode
from silotune.common.models.aligned_linear import align
from silotune.common.models.batching import Block, blocks_of
from silotune.common.protocol.messages import Arrays
from silotune.common.tasks import objective_of

# The head alone takes more rows at once, and always so many that its products round alike.
HEAD_BATCH, HEAD_FILL = 4096, 256


def device_of(performance: Performance) -> torch.device:
    """DataError when the device that is asked for is not there."""
    name = performance.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DataError(
            f"performance.device is '{name}', but torch can use {torch.cuda.device_count()} CUDA "
            'devices on this machine. Set "auto" or "cpu".',
            code=ErrorCode.DEVICE_MISSING,
        )
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster here: with units of their own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True)
class Encoded:
    """What the frozen part gives for N records.

    texts: [N, k], the numbers of each record's k texts among the U that were encoded: equal texts
    are encoded once. features: [U, F], the head's input while the adapter is zero, or [sum of T, F]
    if the task is of tokens; of no meaning where there is no head. hidden: [sum of T, H], the input
    of the adapted layers, texts behind one another; None when no phase adapts layers. starts:
    [U + 1], where each text begins in what is by token. marks: [sum of T], for tasks of tokens
    which word, or which next token, a place is to tell; below 0 for none. All of it stays in main
    memory, or in a file (common/models/activation_cache.py).
    """

    texts: Tensor
    features: Tensor
    hidden: Tensor | None = None
    starts: Tensor | None = None
    marks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def lengths(self, index: Tensor) -> Tensor:
        """[len(index)] tokens of each record's longest text."""
        assert self.starts is not None
        return (self.starts[1:] - self.starts[:-1])[self.texts[index]].amax(dim=1)

    def padded(self, values: Tensor, texts: Tensor, width: int, fill: float = 0) -> Tensor:
        """Of values by token those of the texts [n], side by side: [n, width, ...]."""
        assert self.starts is not None
        out = values.new_full((len(texts), width, *values.shape[1:]), fill)
        for place, text in zip(out, texts.tolist(), strict=True):
            found = values[self.starts[text] : self.starts[text + 1]]
            place[: len(found)] = found
        return out


class Network(nn.Module):
    """A linear head on features; with `top`, on the adapted layers' output."""

    bf16 = False  # whether any product is computed in bfloat16
    private = True  # whether a record's outputs must not depend on which others are there

    def __init__(self, n_features: int, task: Task, performance: Performance) -> None:
        super().__init__()
        self.performance = performance
        self.objective = objective_of(task)
        self.device = device_of(performance)
        self.head: nn.Module = nn.Identity()  # a language model has no head
        if task.outputs:
            self.head = nn.Linear(n_features, task.outputs, device=self.device)
            align(self.head)
        self.lock = threading.RLock()

    def encode(self, inputs: Inputs) -> Encoded:
        raise NotImplementedError

    def forward(
        self, encoded: Encoded, index: Tensor, *, adapter: bool, dropout_mask: Tensor | None = None
    ) -> Tensor:
        """Outputs [len(index), L], or [len(index), T, L] for a task of tokens, of the records in
        `index`; `adapter`: is it other than zero? dropout_mask: [F], what the head's inputs are
        multiplied by."""
        features = self.features(encoded, index, adapter=adapter).to(self.device).float()
        outputs: Tensor = self.head(features if dropout_mask is None else features * dropout_mask)
        return outputs

    def features(self, encoded: Encoded, index: Tensor, *, adapter: bool) -> Tensor:
        return encoded.features[encoded.texts[index, 0]]

    def targets(self, encoded: Encoded, labels: Tensor, index: Tensor) -> Tensor:
        """What the outputs of these records are compared with; labels: of all records [N, ...]."""
        return labels[index]

    def micro_batches(self, encoded: Encoded, index: Tensor, *, adapter: bool) -> Iterator[Block]:
        """`index` in blocks that fit in memory; where nothing is private in blocks without filling,
        each of texts of like lengths."""
        if not self.private:
            lengths = encoded.lengths(index) if adapter or self.objective.of_tokens else index
            size = self.performance.micro_batch if adapter else HEAD_BATCH
            for part in torch.split(index[lengths.argsort()], size) if len(index) else ():
                yield Block(part, len(part))
            return
        if not (adapter or self.objective.of_tokens):
            for part in torch.split(index, HEAD_BATCH) if len(index) else ():
                fill = part[:1].expand(-len(part) % HEAD_FILL)
                yield Block(torch.cat([part, fill]), len(part))
            return
        yield from blocks_of(index, encoded.lengths(index), self.performance.micro_batch)

    @torch.no_grad()
    def predict(self, encoded: Encoded, labels: Tensor, *, adapter: bool) -> list[Any]:
        """What evaluation keeps of each record (common/tasks/), in their order."""
        out: list[Any] = [None] * len(encoded)
        for index, n in self.micro_batches(encoded, torch.arange(len(encoded)), adapter=adapter):
            outputs = self(encoded, index, adapter=adapter)[:n]
            targets = self.targets(encoded, labels, index[:n]).to(outputs.device)
            found = self.objective.predictions(outputs, targets)
            for row, kept in zip(index[:n].tolist(), found, strict=True):
                out[row] = kept
        return out

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors by their public names (common/protocol/tensors.py)."""
        return {f"head.{name}": p for name, p in self.head.named_parameters()}

    def trained_modules(self, groups: Collection[TensorGroup]) -> list[nn.Module]:
        """The modules whose parameters a round trains (common/contract/schedule.py)."""
        if "head" not in groups:
            return []
        return [module for module in self.head.modules() if isinstance(module, nn.Linear)]

    def forward_error(self, lengths: Sequence[int], *, bf16: bool) -> float:
        """How far the frozen layers are off those of the library that they come from, on made-up
        texts of so many tokens in one padded batch; 0 where there are none.

        Args:
            lengths: of the texts, in tokens.
            bf16: whether products are in bfloat16.

        Returns:
            The largest error of a token's state, over the norm of that state.
        """
        return 0.0

    @contextmanager
    def batch_invariant(self, private: bool) -> Iterator[None]:
        """Within, whether each record is kept from moving another's roundings."""
        before, self.private = self.private, private
        try:
            yield
        finally:
            self.private = before

    @contextmanager
    def requiring(self, names: Collection[str]) -> Iterator[None]:
        """Within, these tensors alone have gradients."""
        tensors = self.named_tensors()
        before = {name: parameter.requires_grad for name, parameter in tensors.items()}
        try:
            for name, parameter in tensors.items():
                parameter.requires_grad_(name in names)
            yield
        finally:
            for name, parameter in tensors.items():
                parameter.requires_grad_(before[name])

    def initial_arrays(self) -> Arrays:
        """Zeros: every class is equally likely at first."""
        return {n: np.zeros(p.shape, dtype=np.float32) for n, p in self.named_tensors().items()}

    @torch.no_grad()
    def load(self, arrays: Arrays) -> None:
        tensors = self.named_tensors()
        for name, array in arrays.items():
            tensors[name].copy_(torch.from_numpy(array))
