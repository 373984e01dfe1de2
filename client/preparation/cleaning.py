"""Records made ready for a contract: checked, and cleaned by the owner's rules.

Nothing is guessed: rows are changed only as [prepare] in site.toml says, and every problem is found
in one reading. All counts in here are of private records: they are for the site's own report.
"""

from __future__ import annotations

import string
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from silotune.client.preparation.column_checks import Columns, Rule
from silotune.client.preparation.deidentify import Deidentifier
from silotune.client.records import record_ids
from silotune.client.records.canonical_values import canonical, value
from silotune.client.records.record_identity import Links, Origin, links_between
from silotune.client.records.record_ids import Codes
from silotune.client.site.preparation_rules import Deidentify, Prepare
from silotune.common.cli.main import command
from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import TableInput
from silotune.common.contract.task import Language, Tokens
from silotune.common.data import records
from silotune.common.data.file_source import SHOWN_ROWS, rows_in_words
from silotune.common.data.records import Table
from silotune.common.data.text_table import BLOCK_ROWS, Builder, Row
from silotune.common.errors import ErrorCode, UsageError
from silotune.common.formats import tag_schemes
from silotune.common.runtime.atomic_files import write_durably

T = TypeVar("T")
REFUSED, DROPPED, EMPTIED, LEFT = "refused", "dropped", "set to missing", "left as they are"
REPLACED, REWRITTEN = "replaced", "rewritten"
# ASCII's alone: other white space may be a part of a letter whose bytes were read in a wrong
# encoding, and those bytes must stay whole (client/records/written_forms.py).
SPACE = string.whitespace


@dataclass
class Problem:
    """What is wrong with `count` rows, the first of them by number, and what was done about it.

    Where rows are refused nothing is prepared. remedy: what the owner can do about those.
    """

    column: str
    what: str
    done: str
    code: ErrorCode | Literal[""] = ""
    remedy: str = ""
    count: int = 0
    rows: list[int] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        return f"column '{self.column}' {self.what}" if self.column else self.what

    @property
    def places(self) -> str:
        return rows_in_words(self.rows, self.count)

    def add(self, line: int) -> None:
        self.count += 1
        if self.count <= SHOWN_ROWS:
            self.rows.append(line)


@dataclass(frozen=True)
class Prepared:
    """raw: the source, with the contract's names for columns that had none. table: the rows that
    are kept, cleaned. left_out: how many are not, each counted under one reason. cleaned: the kept
    rows and their copies; made_of: of each of these the index of its row in the source."""

    raw: Table
    table: Table
    problems: list[Problem]
    left_out: dict[str, int]
    cleaned: Table
    made_of: Sequence[int]

    @property
    def read(self) -> int:
        """How many rows the source has."""
        return len(self.raw.rows)

    @property
    def warnings(self) -> list[str]:
        """What the owner's own rules did to so much of the records that they may be wrong."""
        found = []
        emptied = dict.fromkeys(p.column for p in self.problems if p.done == EMPTIED)
        for column in emptied:
            place = self.cleaned.header.index(column)
            if not any(cells[place] for _, cells in self.cleaned.rows):
                found.append(
                    f"each cell of column '{column}' is empty now, so that nothing can be learnt "
                    'from it: correct the cells, for outside = "missing" in [prepare] emptied them'
                )
        left_out = self.read - len(self.table.rows)
        if not self.refused and 2 * left_out > self.read:
            reasons = "; ".join(f"{reason}: {n:,}" for reason, n in self.left_out.items())
            found.append(
                f"more than half of the rows are left out, {left_out:,} of "
                f"{self.read:,} ({reasons})"
            )
        return found

    @property
    def refused(self) -> list[Problem]:
        """What the owner has to decide first."""
        return [problem for problem in self.problems if problem.done == REFUSED]


def prepare(
    table: Table,
    contract: Contract,
    rules: Prepare,
    key: Sequence[str],
    pseudonyms: bytes | None = None,
) -> Prepared:
    """Check and clean all rows; key: the columns that tell records apart (data.key); pseudonyms:
    the site's key for them. DataError if the header does not fit, or there is no row; UsageError if
    rules.deidentify does not go with the task, or needs a key that is not there."""
    table = records.named_by(contract, table)
    records.check_header(table, contract)
    texts = _Texts(table, contract, rules.deidentify, pseudonyms)
    cleaned = _cleaned(table, contract, rules, texts)
    return _without_copies(cleaned, rules, (*contract.columns, contract.task.label_column, *key))


class _Texts:
    """The contract's columns of text, and what is found and replaced in them."""

    def __init__(
        self, table: Table, contract: Contract, settings: Deidentify | None, key: bytes | None
    ) -> None:
        actions = {settings.action_for(kind) for kind in settings.kinds} if settings else set()
        if "pseudonymise" in actions and key is None:
            raise UsageError(
                "[prepare.deidentify] in site.toml: pseudonyms need the site's own key, for "
                "anybody could try names on those of a known one. Make a site: "
                + command("site", "init", "--name", "NAME", "--folder", "FOLDER")
            )
        self.cleaner = Deidentifier(settings, key or bytes(32)) if settings else None
        columns = contract.columns if not isinstance(contract.input, TableInput) else ()
        if isinstance(contract.task, Language):
            columns = (*columns, contract.task.label_column)
        if isinstance(contract.task, Tokens) and actions - {"mask", "block"}:
            raise UsageError(
                "[prepare.deidentify] in site.toml: this contract has a tag for each word, and "
                'only action = "mask" leaves as many words as there were.'
            )
        self.places = [(column, table.header.index(column)) for column in columns]
        self.problems: dict[tuple[str, str], Problem] = {}

    def clean(self, rows: Sequence[Row]) -> dict[int, str]:
        """Replace what is found in a block's cells; the rows to leave out, and why."""
        left_out: dict[int, str] = {}
        for column, place in self.places if self.cleaner else ():
            for at, (line, cells) in enumerate(rows):
                assert self.cleaner is not None
                cleaned = self.cleaner.clean(cells[place])
                cells[place] = cleaned.text
                for kind in cleaned.counts:
                    done = DROPPED if cleaned.blocked else REPLACED
                    what = f"holds what looks like a personal detail ({kind})"
                    problem = self.problems.setdefault(
                        (column, f"{kind} {done}"), Problem(column, what, done)
                    )
                    problem.add(line)
                    if cleaned.blocked:
                        left_out.setdefault(at, problem.sentence)
        return left_out


def _cleaned(table: Table, contract: Contract, rules: Prepare, texts: _Texts) -> Prepared:
    columns, header = Columns(contract, table.header), table.header
    ragged = Problem(
        "",
        f"{len(header)} fields are expected",
        REFUSED,
        ErrorCode.SCHEMA_MISMATCH,
        "correct the rows",
    )
    found = {
        rule: Problem(rule.column, rule.what, _done(rule, rules), rule.code, rule.remedy)
        for rule in columns.rules
    }
    places = {rule: header.index(rule.column) for rule in columns.rules}
    builder, reasons = Builder(), Counter[str]()
    made_of, read = array("L"), 0
    for block in blocks(table.rows):
        rows: list[Row] = []
        places_read: list[int] = []
        for read, (line, cells) in enumerate(block, read + 1):  # noqa: B020
            if len(cells) != len(header):
                ragged.add(line)
            else:
                rows.append((line, [c.strip(SPACE) for c in cells] if rules.trim else list(cells)))
                places_read.append(read - 1)
        left_out = texts.clean(rows)
        for rule, at_rows in columns.violations(cells for _, cells in rows).items():
            problem = found[rule]
            for at in at_rows:
                problem.add(rows[at][0])
                cells = rows[at][1]
                if problem.done == EMPTIED:
                    cells[places[rule]] = ""
                elif problem.done == REWRITTEN:
                    tags = cells[places[rule]].split()
                    cells[places[rule]] = " ".join(tag_schemes.to_iob2(tags))
                elif problem.done != LEFT:
                    left_out.setdefault(at, problem.sentence)
        reasons.update(left_out.values())
        for at, (line, cells) in enumerate(rows):
            if at not in left_out:
                builder.add(line, cells)
                made_of.append(places_read[at])
    if ragged.count:
        reasons[ragged.sentence] = ragged.count
    problems = [p for p in (ragged, *found.values(), *texts.problems.values()) if p.count]
    kept = Table(table.source, header, builder.rows())
    return Prepared(table, kept, problems, dict(reasons), kept, made_of)


def _done(rule: Rule, rules: Prepare) -> str:
    """What the owner's rules say of cells that break a rule."""
    if rule.kind == "bound":
        return LEFT
    if rule.kind == "scheme":
        return REWRITTEN
    if rule.kind == "outside" and rules.outside == "missing":
        return EMPTIED
    if rule.kind == "no target" and rules.missing_target == "drop":
        return DROPPED
    return REFUSED


def _without_copies(found: Prepared, rules: Prepare, apart: Sequence[str]) -> Prepared:
    """Rows that are equal in every column stand once, if the owner says so. Columns that only
    number the rows do not tell them apart, unless they are named."""
    table, drop = found.table, rules.duplicates == "drop"
    copies = Problem(
        "", "rows repeat an earlier one", DROPPED if drop else LEFT, ErrorCode.DUPLICATE_RECORDS
    )
    while not (first := _first(table, apart)).all():
        builder = Builder()
        for (line, cells), is_first in zip(table.rows, first.tolist(), strict=True):
            if is_first:
                builder.add(line, cells)
            else:
                copies.add(line)
        if not drop:
            break
        # Once more: without its copies a column may turn out only to number the rows.
        table = Table(table.source, table.header, builder.rows())
    if not copies.count:
        return found
    copies.rows.sort()
    left_out = found.left_out | ({copies.sentence: copies.count} if drop else {})
    problems = [*found.problems, copies]
    return replace(found, table=table, problems=problems, left_out=left_out)


def _first(table: Table, apart: Sequence[str]) -> NDArray[np.bool_]:
    """[N] whether a row is the first of those that are equal to it."""
    chosen = record_ids.basis_columns(table, (), apart)
    # No secret: none of them leaves this function.
    prints = record_ids.of_rows(table, chosen, bytes(32), keyed=False).fingerprints
    first = np.zeros(len(prints), dtype=bool)
    first[np.unique(prints, return_index=True)[1]] = True
    return first


def origin(prepared: Prepared, key: Sequence[str], secret: bytes) -> Origin:
    """For the ledger, before the prepared rows are on disk (client/records/record_identity.py).
    Rows are linked by `key` and by all columns; a basis that raw and prepared rows do not share has
    no links.

    Args:
        prepared: the rows, and the table that they were made of.
        key: data.key.
        secret: 32 bytes, the site's key for fingerprints.
    """
    raw, cleaned, links = prepared.raw, prepared.cleaned, dict[str, Links]()
    for columns in {tuple(key), ()}:
        chosen = record_ids.basis_columns(raw, columns)
        if chosen != record_ids.basis_columns(prepared.table, columns):
            continue
        before, after = (
            record_ids.of_rows(table, chosen, secret, keyed=bool(columns))
            for table in (raw, cleaned)
        )
        links[after.basis] = links_between(before, after, prepared.made_of)
    columns = tuple(sorted(set(map(canonical, raw.header))))
    changed, cells = _changed(prepared, secret)
    return Origin(links, columns, changed, cells)


def _changed(prepared: Prepared, secret: bytes) -> tuple[tuple[str, ...], Codes]:
    """The columns of which a cell is another value since, or may have been read wrongly: text that
    was decoded by a declared encoding is written as Unicode, and its bytes are lost with that. And
    the codes of such cells, as they were and as they are."""
    raw = prepared.raw
    cells: set[tuple[str, str]] = set()
    foreign = not raw.encoding.startswith("utf")
    found: set[int] = set()
    made_of = iter(prepared.made_of)
    index = next(made_of, None)
    cleaned = iter(prepared.cleaned.rows)
    for at, (_, before) in enumerate(raw.rows):
        if at != index:
            continue
        _, after = next(cleaned)
        for column, (one, other) in enumerate(zip(before, after, strict=True)):
            if (one != other and _is_another(one, other)) or (foreign and not one.isascii()):
                found.add(column)
                cells |= {(one, raw.encoding), (other, "utf-8")}
        index = next(made_of, None)
    codes = {code for cell in cells for code in record_ids.cell_codes(*cell, secret)}
    names = {canonical(raw.header[column]) for column in found}
    return tuple(sorted(names)), np.array(sorted(codes), np.uint64)


def _is_another(one: str, other: str) -> bool:
    """Whether a cell has another value, or other decodings."""
    if value(one) != value(other):
        return True
    return not (one + other).isascii() and one.strip(SPACE) != other.strip(SPACE)


def write(table: Table, path: Path) -> None:
    """The rows as a Parquet file of text columns, readable by this user alone."""
    kind = pa.schema([(name, pa.string()) for name in table.header])
    sink = pa.BufferOutputStream()
    with parquet.ParquetWriter(sink, kind, compression="zstd") as writer:
        for block in blocks(table.rows):
            columns = list(zip(*(cells for _, cells in block), strict=True))
            arrays = [pa.array(column, pa.string()) for column in columns]
            writer.write_batch(pa.record_batch(arrays, schema=kind))
    write_durably(path, sink.getvalue().to_pybytes())


def blocks(rows: Iterable[T]) -> Iterator[list[T]]:
    """Some rows at a time."""
    found = iter(rows)
    while block := list(islice(found, BLOCK_ROWS)):
        yield block
