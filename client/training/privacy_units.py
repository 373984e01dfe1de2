"""Who is protected: which records are one privacy unit, and in what groups units are computed.

With unit "record" each row is by itself. With unit "entity" the rows of one key are one unit: of
them the first (or last) `max_records_per_entity` count, and their gradients become one
(common/contract/privacy.py, Entity). Which rows those are, and in what order they are added, is a
function of the entity's own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from silotune.client.records import record_ids
from silotune.common.contract.privacy import Entity
from silotune.common.data.file_source import SHOWN_ROWS, rows_in_words
from silotune.common.data.records import Table
from silotune.common.errors import DataError, ErrorCode
from silotune.common.models.batching import Block

GROUP = 32  # entities whose gradients are held at once, each as large as all trained tensors


class UnitBatch(NamedTuple):
    """A block of records: row numbers of which the first n count. For entities also owners [n],
    each record's unit within the group, and weights [n], what its gradient is multiplied by."""

    rows: Tensor
    n: int
    owners: Tensor | None = None
    weights: Tensor | None = None


class Group(NamedTuple):
    """`units` whole units: none of them has a record in another group of the same step."""

    units: int
    parts: list[UnitBatch]


@dataclass(frozen=True)
class Units:
    """members: [M] row numbers, unit after unit; starts: [U + 1], where each unit begins.

    mean: whether an entity's gradients are averaged; None if each unit is one record.
    """

    members: Tensor
    starts: Tensor
    mean: bool | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def groups(
        self, drawn: Tensor, blocks_of: Callable[[Tensor], Iterable[Block]]
    ) -> Iterator[Group]:
        """The units in `drawn` (ascending) in groups; blocks_of: row numbers -> blocks of them."""
        if self.mean is None:
            for block in blocks_of(drawn):
                yield Group(block.n, [UnitBatch(block.rows, block.n)])
            return
        sizes = self.starts[1:] - self.starts[:-1]
        owner = torch.full((int(self.members.max()) + 1,), -1)
        for units in torch.split(drawn, GROUP) if len(drawn) else ():
            rows = torch.cat(
                [self.members[self.starts[u] : self.starts[u + 1]] for u in units.tolist()]
            )
            owner[rows] = torch.repeat_interleave(torch.arange(len(units)), sizes[units])
            parts = []
            for block in blocks_of(rows):
                owners = owner[block.rows[: block.n]]
                ones = torch.ones(block.n)
                weights = ones / sizes[units][owners] if self.mean else ones
                parts.append(UnitBatch(block.rows, block.n, owners, weights))
            yield Group(len(units), parts)


def of_records(n: int) -> Units:
    return Units(torch.arange(n), torch.arange(n + 1))


def of_entities(table: Table, entity: Entity) -> Units:
    """The entities of a file, in the order of their first rows. DataError where a key is empty: the
    rows without one would be a person that nobody is."""
    found: dict[tuple[str, ...], list[int]] = {}
    empty: list[int] = []
    keys = record_ids.keys(table, entity.key)
    for row, ((line, _), key) in enumerate(zip(table.rows, keys, strict=True)):
        if not all(key):
            empty.append(line)
        found.setdefault(key, []).append(row)
    if empty:
        shown = rows_in_words(empty[:SHOWN_ROWS], len(empty))
        raise DataError(
            f"{table.source}: the key of the privacy unit ({', '.join(entity.key)}) is empty: "
            f"{shown}. Give these rows a key, or remove them.",
            code=ErrorCode.SCHEMA_MISMATCH,
        )
    kept = [
        rows[: entity.max_records_per_entity]
        if entity.select == "first"
        else rows[-entity.max_records_per_entity :]
        for rows in found.values()
    ]
    starts = torch.tensor([0, *(len(rows) for rows in kept)]).cumsum(0)
    members = torch.tensor([row for rows in kept for row in rows])
    return Units(members, starts, entity.reduce == "mean")
