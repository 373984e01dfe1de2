"""Many rows of cells in little memory. What a cell is: common/formats/cell_values.py."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

BLOCK_ROWS = 16_384
BLOCK_CHARACTERS = 1 << 24

Row = tuple[int, list[str]]


class _Block(NamedTuple):
    """Rows after each other: lines [n], ends [n] (where each row's cells end), cells of text."""

    lines: NDArray[np.int64]
    ends: NDArray[np.int64]
    cells: Any  # pa.DictionaryArray: a block's equal cells are one string

    def rows(self) -> Iterator[Row]:
        words = self.cells.dictionary.to_pylist()
        cells = [words[i] for i in self.cells.indices.to_numpy().tolist()]
        ends = [0, *self.ends.tolist()]
        for line, (start, end) in zip(self.lines.tolist(), pairwise(ends), strict=True):
            yield line, cells[start:end]

    def lines_with(self, pattern: str) -> list[int]:
        """The numbers of the rows with a cell in which `pattern` (RE2) is found."""
        found = pc.match_substring_regex(self.cells.dictionary, pattern)
        if not pc.any(found).as_py():
            return []
        has = found.to_numpy(zero_copy_only=False)[self.cells.indices.to_numpy()]
        rows = np.searchsorted(self.ends, np.nonzero(has)[0], side="right")
        return [int(line) for line in self.lines[np.unique(rows)]]

    def row(self, at: int) -> Row:
        start = int(self.ends[at - 1]) if at else 0
        return int(self.lines[at]), self.cells[start : int(self.ends[at])].to_pylist()


class Rows(Sequence[Row]):
    """Rows with their numbers; some 4 bytes a cell and each block's distinct cells once.

    To go through all of them is fast, to pick one by its index is not.
    """

    def __init__(self, blocks: Sequence[_Block] = ()) -> None:
        self._blocks = blocks
        self._ends = np.cumsum([len(block.lines) for block in blocks]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Row]:
        for block in self._blocks:
            yield from block.rows()

    def lines_with(self, pattern: str) -> list[int]:
        """The numbers of the rows with a cell in which `pattern` (RE2) is found."""
        return [line for block in self._blocks for line in block.lines_with(pattern)]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = index + len(self) * (index < 0)
        if not 0 <= at < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, at)
        return self._blocks[number].row(at - (self._ends[number - 1] if number else 0))


class Builder:
    """Takes rows, one after the other, and gives Rows."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._clear()

    def _clear(self) -> None:
        self._lines: list[int] = []
        self._ends: list[int] = []
        self._cells: list[str] = []
        self._size = 0

    def add(self, line: int, cells: Sequence[str]) -> None:
        self._lines.append(line)
        self._cells.extend(cells)
        self._ends.append(len(self._cells))
        self._size += sum(map(len, cells))
        if len(self._lines) == BLOCK_ROWS or self._size > BLOCK_CHARACTERS:
            self._close()

    def _close(self) -> None:
        cells = pa.array(self._cells, pa.string()).dictionary_encode()
        self._blocks.append(_Block(np.array(self._lines), np.array(self._ends), cells))
        self._clear()

    def rows(self) -> Rows:
        if self._lines:
            self._close()
        return Rows(self._blocks)
