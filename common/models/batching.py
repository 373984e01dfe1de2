"""Records in blocks of a fixed shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# A record's outputs must not depend, by as much as a rounding, on which other records are there:
# otherwise leaving one out would move the gradients of all. So each row is padded to a multiple of
# BUCKET tokens by its own length, and every block of a bucket has exactly as many rows.
BUCKET = 16


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
