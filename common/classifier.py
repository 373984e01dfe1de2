"""What both sides run: blocks of rows, a classifier with a linear head, the one-hot model.

The frozen layers run once a record (`encode`); training and evaluation run only the adapted layers
and the head on their outputs. What `encode` returns is private when the rows are: it stays with
whoever holds the rows.

Shapes: N rows, T tokens, H hidden size, F features, L labels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from silotune.common import schema
from silotune.common.contract import OneHotModel
from silotune.common.errors import DataError
from silotune.common.inputs import TableInput
from silotune.common.messages import Arrays
from silotune.common.performance import Performance
from silotune.common.records import Inputs
from silotune.common.rows import align

# A record's outputs must not depend, by as much as a rounding, on which other records are there:
# otherwise leaving one out would move the gradients of all. So each row is padded to a multiple of
# BUCKET tokens by its own length, and every block of a bucket has exactly as many rows.
BUCKET = 16
# The head alone takes more rows at once, and always so many that its products round alike.
HEAD_BATCH, HEAD_FILL = 4096, 256


class Block(NamedTuple):
    """Row numbers of which the first n count; the rest only fill the block."""

    rows: Tensor
    n: int


def blocks_of(index: Tensor, lengths: Tensor, size: int) -> Iterator[Block]:
    """`index` in blocks of `size` rows of one bucket; `lengths` [len(index)]: the rows' tokens."""
    buckets = -(-lengths // BUCKET)
    for bucket in sorted(set(buckets.tolist())):
        for part in torch.split(index[buckets == bucket], size):
            fill = part[:1].expand(size - len(part))
            yield Block(torch.cat([part, fill]), len(part))


def device_of(performance: Performance) -> torch.device:
    """DataError when the device that is asked for is not there."""
    name = performance.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DataError(
            f"performance.device is '{name}', but torch can use {torch.cuda.device_count()} CUDA "
            'devices on this machine. Set "auto" or "cpu".', code="E309",
        )
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster here: with units of their own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True)
class Encoded:
    """What the frozen part gives for N rows.

    features: [N, F], the head's input while the adapter is zero.
    hidden: [sum of T, H], the input of the adapted layers, rows behind one another; None when no
    phase adapts layers. starts: [N + 1], where each row begins in `hidden`. All of it stays in
    main memory, or in a file (common/cache.py).
    """

    features: Tensor
    hidden: Tensor | None = None
    starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)


class Classifier(nn.Module):
    """A linear head on features; with `top`, on the adapted layers' output."""

    bf16 = False  # whether any product is computed in bfloat16

    def __init__(self, n_features: int, n_labels: int, performance: Performance) -> None:
        super().__init__()
        self.performance = performance
        self.device = device_of(performance)
        self.head = nn.Linear(n_features, n_labels, device=self.device)
        align(self.head)
        self.lock = threading.RLock()

    def encode(self, inputs: Inputs) -> Encoded:
        raise NotImplementedError

    def forward(self, encoded: Encoded, index: Tensor, *, adapter: bool) -> Tensor:
        """Logits [len(index), L] of the rows in `index`; `adapter`: is LoRA other than zero?"""
        if adapter:
            features = self.adapted(encoded, index)
        else:
            features = encoded.features[index].to(self.device)
        logits: Tensor = self.head(features.float())
        return logits

    def adapted(self, encoded: Encoded, index: Tensor) -> Tensor:
        raise NotImplementedError

    def micro_batches(self, encoded: Encoded, index: Tensor, *, adapter: bool) -> Iterator[Block]:
        """`index` in blocks that fit in memory."""
        if not adapter:
            for part in torch.split(index, HEAD_BATCH) if len(index) else ():
                fill = part[:1].expand(-len(part) % HEAD_FILL)
                yield Block(torch.cat([part, fill]), len(part))
            return
        assert encoded.starts is not None
        lengths = (encoded.starts[1:] - encoded.starts[:-1])[index]
        yield from blocks_of(index, lengths, self.performance.micro_batch)

    @torch.no_grad()
    def predict(self, encoded: Encoded, *, adapter: bool) -> np.ndarray:
        """Logits [N, L] for all rows."""
        out = np.zeros((len(encoded), self.head.out_features), dtype=np.float32)
        for index, n in self.micro_batches(encoded, torch.arange(len(encoded)), adapter=adapter):
            out[index[:n].numpy()] = self(encoded, index, adapter=adapter)[:n].numpy(force=True)
        return out

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors by their public names (common/adapter.py)."""
        return {f"head.{name}": p for name, p in self.head.named_parameters()}

    def trained_linears(self, trains: str) -> list[nn.Linear]:
        """The Linear modules whose parameters a phase trains."""
        return [self.head]

    def initial_arrays(self) -> Arrays:
        """Zeros: every class is equally likely at first."""
        return {n: np.zeros(p.shape, dtype=np.float32) for n, p in self.named_tensors().items()}

    @torch.no_grad()
    def load(self, arrays: Arrays) -> None:
        tensors = self.named_tensors()
        for name, array in arrays.items():
            tensors[name].copy_(torch.from_numpy(array))


class OneHot(Classifier):
    """Logistic regression on the one-hot public bins."""

    def __init__(
        self, spec: OneHotModel, table: TableInput, n_labels: int, performance: Performance
    ) -> None:
        super().__init__(sum(len(c.choices) + 1 for c in table.columns), n_labels, performance)
        self.table = table
        self.scale = spec.norm / len(table.columns) ** 0.5

    def encode(self, inputs: Inputs) -> Encoded:
        rows = schema.to_one_hot(self.table, inputs)  # type: ignore[arg-type]
        return Encoded(torch.from_numpy(rows) * self.scale)
