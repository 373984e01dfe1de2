"""Which records are one and the same: the connected components of all that the ledger knows.

Nodes are fingerprints and decodings (client/records/record_ids.py); edges join a record with its
decodings, and a prepared row with the raw row that `site prepare` made it of (`Links`). A charge of
any node of a component is a charge of every record in it. Components that join charge more, never
less.

Guarantee: if `site prepare` made row p of row r, whatever cells it changed, then every
charge of r counts for p and every charge of p for r, from the moment p is on disk: in any
file format, after any number of preparations, in both orders. (A simulation's split of a file
writes rows, too; it has no ledger, and changes no cell.) Read by the columns by which it was
prepared, by data.key or by all columns, a row is linked. Read by others (another key, fewer
columns, columns that were renamed or selected by other names) it cannot be: then a record with a
cell that the preparation changed, as it was or as it is, counts as charged, whatever its column is
called; a record without one is the same before and after (client/privacy/budget.py). Not covered:
columns that took the names of others since, so that the names are those by which rows were linked.

One file with both r and p would have one unit take part twice: it is refused where the rows are
linked (`budget.rows_of_one_record`). Read by other columns that is not recognised: what both forms
of a changed cell have in common is not kept, and either form alone is a file that may be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from silotune.client.records.record_ids import Codes, RecordSet, RowPrints, codes_of


class Links(NamedTuple):
    """Rows that are one record: for each of S stars its centre [S], how many other nodes it has
    [S], and these, star after star [N]. All are 64-bit codes."""

    centres: Codes
    counts: NDArray[np.uint32]
    nodes: Codes

    def content(self) -> bytes:
        """As it is stored: S in 8 bytes, then the three arrays, little-endian."""
        size = np.array([len(self.centres)], "<u8")
        return b"".join(part.tobytes() for part in (size, *self))

    @classmethod
    def of_content(cls, content: bytes) -> Self:
        """ValueError if it is not what `content` gives."""
        size = int.from_bytes(content[:8], "little")
        at, end = 8 + 8 * size, 8 + 12 * size
        if end > len(content):
            raise ValueError("the links are cut short")
        centres = np.frombuffer(content[8:at], np.uint64)
        counts = np.frombuffer(content[at:end], np.uint32)
        nodes = np.frombuffer(content[end:], np.uint64)
        if not len(centres) == len(counts) == size or counts.sum() != len(nodes):
            raise ValueError("the links are cut short")
        return cls(centres, counts, nodes)


@dataclass(frozen=True)
class Origin:
    """What prepared rows were made of: links by basis, all columns, and those that were changed, by
    their canonical names. cells: the changed cells as they were and as they are, sorted
    (`record_ids.cell_codes`)."""

    links: Mapping[str, Links]
    columns: tuple[str, ...]
    changed: tuple[str, ...]
    cells: Codes


def links_between(raw: RowPrints, prepared: RowPrints, made_of: Sequence[int]) -> Links:
    """The links of prepared rows to raw ones. made_of: for each prepared row the index of its raw
    row. A row whose fingerprint and decodings are as they were needs none."""
    raw_rows = _rows_of(raw)
    centres, counts, nodes = [], [], []
    for (code, decodings), index in zip(_rows_of(prepared), made_of, strict=True):
        raw_code, raw_decodings = raw_rows[index]
        if (code, decodings) != (raw_code, raw_decodings):
            others = sorted(({raw_code} | decodings | raw_decodings) - {code})
            centres.append(code)
            counts.append(len(others))
            nodes += others
    return Links(
        np.array(centres, np.uint64), np.array(counts, np.uint32), np.array(nodes, np.uint64)
    )


def _rows_of(prints: RowPrints) -> list[tuple[int, frozenset[int]]]:
    """Each row's code and decodings."""
    none: frozenset[int] = frozenset()
    ends = np.concatenate([[0], np.cumsum(prints.decodings.counts, dtype=np.int64)]).tolist()
    codes = prints.decodings.codes
    return [
        (code, frozenset(codes[start:end].tolist()) if end > start else none)
        for code, (start, end) in zip(
            codes_of(prints.fingerprints).tolist(), pairwise(ends), strict=True
        )
    ]


def components(files: Sequence[RecordSet], links: Sequence[Links]) -> list[NDArray[np.int64]]:
    """For each file the number of each record's component: equal numbers, one record.

    Args:
        files: of one basis.
        links: of the same basis.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = list(_edges(files, links))
    ends = np.concatenate([end for pair in zip(*edges, strict=True) for end in pair])
    nodes, numbers = np.unique(ends, return_inverse=True)
    one, other = np.split(numbers, 2)
    graph = coo_matrix((np.ones(len(one), np.int8), (one, other)), (len(nodes), len(nodes)))
    _, component = connected_components(graph, directed=False)
    return [component[np.searchsorted(nodes, file.codes)].astype(np.int64) for file in files]


def _edges(files: Sequence[RecordSet], links: Sequence[Links]) -> Iterator[tuple[Codes, Codes]]:
    for file in files:
        yield file.codes, file.codes
        if len(file.decodings.codes):
            yield file.codes[file.decodings.owners], file.decodings.codes
    for star in links:
        yield np.repeat(star.centres, star.counts), star.nodes
