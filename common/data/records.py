"""Labelled rows: a table is read, checked against the public schema and turned into choices.

Sites read their records with it, the operator its public test rows.

Errors name file, column and row numbers. A record's value appears only in `DataError.local`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import NumberColumn, PairInput, TableInput, TextInput
from silotune.common.contract.task import (
    Classification,
    Language,
    Ranking,
    Regression,
    Target,
    Task,
    Tokens,
)
from silotune.common.data import featurize, file_source
from silotune.common.data.file_source import Problems
from silotune.common.data.header import columns_like
from silotune.common.data.text_decoding import Reading
from silotune.common.data.text_table import Row
from silotune.common.errors import DataError

REMEMBERED = 1 << 16  # cells of a column, and rows of choices: what is often there is made once

# N texts, N pairs of texts, or N rows of choices (common/data/featurize.py).
Inputs = Sequence[str] | Sequence[tuple[str, str]] | Sequence[tuple[featurize.Choice, ...]]


@dataclass(frozen=True)
class Records:
    """labels: the N records' targets (common/contract/task.py). queries: of a ranking, whose
    candidate each record is. notes: what was read otherwise than it stands there, in sentences with
    row numbers
    and counts: for the records' owner alone."""

    inputs: Inputs
    labels: Sequence[Target]
    queries: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Table:
    """A source as it stands: the header, and each row's number and cells
    (common/data/file_source.py).

    notes: sentences about the rows, with counts: for their owner alone. named: whether the source
    names its columns; those of a CoNLL file are named by the contract (`named_by`). encoding: in
    which its text was decoded; "utf-8" where it came as Unicode.
    """

    source: str
    header: list[str]
    rows: Sequence[Row]
    notes: tuple[str, ...] = ()
    named: bool = True
    encoding: str = "utf-8"


def read(path: Path, contract: Contract, reading: Reading | None = None) -> Records:
    """Read a file by the contract's schema; DataError with every problem found."""
    return parse(table(path, reading), contract)


def named_by(contract: Contract, table: Table) -> Table:
    """The table with the contract's column of text and label column as its columns' names, if its
    source has none. DataError if the contract has no such columns: its task is not of tokens."""
    if table.named:
        return table
    if not isinstance(contract.task, Tokens) or not isinstance(contract.input, TextInput):
        raise DataError(
            f"{table.source} holds words and their tags, and '{contract.name}' is a task of "
            f"{contract.task.kind}. A table is read from .csv, .tsv, .jsonl, .parquet or .xlsx.",
            code="E302",
        )
    names = [contract.input.column, contract.task.label_column]
    return replace(table, header=names, named=True)


def unlabelled(table: Table, contract: Contract) -> Inputs:
    """The rows' inputs alone, of any task but language; DataError with every problem found."""
    table = named_by(contract, table)
    _check_columns(table, contract, contract.columns)
    problems, inputs = Problems(), []
    read = _inputs(contract.input, contract.task, table.header, problems)
    for line, cells in _whole(table, problems):
        inputs.append(read(line, cells))
    problems.raise_if_any(f"{table.source} does not fit the contract '{contract.name}'")
    return inputs


def column(table: Table, name: str) -> list[str]:
    """The cells of one column. DataError if it is not there, or a row has other fields."""
    if name not in table.header:
        raise DataError(
            f"Column '{name}' is not in {table.source}.",
            code="E302",
            local=f"it has: {', '.join(table.header[:20])}." + columns_like([name], table.header),
        )
    problems, at = Problems(), table.header.index(name)
    found = [cells[at] for _, cells in _whole(table, problems)]
    problems.raise_if_any(f"{table.source} is no table", "Correct those rows.")
    return found


def parse(table: Table, contract: Contract) -> Records:
    """Check a table by the contract's schema; DataError with every problem found."""
    table = named_by(contract, table)
    check_header(table, contract)
    header, spec, task = table.header, contract.input, contract.task
    query = task.query_column if isinstance(task, Ranking) else None
    problems, notes = Problems(), Problems()
    notice = _notice(contract, header)
    label_at, query_at = header.index(task.label_column), header.index(query) if query else 0
    target, inputs_of = _targets(task), _inputs(spec, task, header, problems)
    labels: list[Target] = []
    inputs: list[Any] = []
    queries: list[str] = []
    for line, cells in _whole(table, problems):
        label = cells[label_at]
        try:
            labels.append(target(label))
        except ValueError as error:
            labels.append(None)
            problems.add("E303", f"column '{task.label_column}' allows {error}", line, label)
        for at, note in notice:
            if what := note(cells[at]):
                notes.add("", f"column '{header[at]}' {what}", line, "")
        if query:
            queries.append(cells[query_at].strip())
        inputs.append(inputs_of(line, cells))
        if isinstance(task, Tokens) and len(inputs[-1].split()) != len(labels[-1] or ()):
            problems.add(
                "E303",
                f"column '{task.label_column}' needs as many tags as "
                f"'{contract.columns[0]}' has words",
                line,
                label,
            )
    problems.raise_if_any(f"{table.source} does not fit the contract '{contract.name}'")
    return Records(inputs, labels, tuple(queries), (*table.notes, *notes.sentences))


def check_header(table: Table, contract: Contract) -> None:
    """DataError unless the contract's columns are there, each once, and there are rows."""
    task = contract.task
    query = [task.query_column] if isinstance(task, Ranking) else []
    _check_columns(table, contract, [*contract.columns, task.label_column, *query])


def _check_columns(table: Table, contract: Contract, wanted: Sequence[str]) -> None:
    source, header = table.source, table.header
    needed = list(dict.fromkeys(wanted))
    absent = [c for c in needed if c not in header]
    if absent:
        raise DataError(
            " ".join(f"Column '{c}' is not in {source}." for c in absent)
            + f" The contract '{contract.name}' names its columns in [input] and [task]. "
            "Rename the columns of the file, or agree on another contract.",
            code="E302",
            # A file without a header has a record there.
            local=f"it has: {', '.join(header[:20])}." + columns_like(absent, header),
        )
    twice = [c for c in needed if header.count(c) > 1]
    if twice:
        raise DataError(f"Column '{twice[0]}' stands twice in the header of {source}.", code="E302")
    if not table.rows:
        raise DataError(
            f"{source} has no rows: a site without records cannot take part. Add the records, or "
            "ask the operator to remove the site from the contract.",
            code="E304",
        )


def _whole(table: Table, problems: Problems) -> Iterator[Row]:
    """The rows with a cell for each column; the others are noted."""
    fields = len(table.header)
    for line, cells in table.rows:
        if len(cells) == fields:
            yield line, cells
        else:
            problems.add("E302", f"{fields} fields are expected", line, ",".join(cells))


def _targets(task: Task) -> Callable[[str], Target]:
    """The task's own reading of a cell; of targets that nobody can change, each is made once."""
    if isinstance(task, (Classification, Ranking)):
        return lru_cache(REMEMBERED)(task.target)
    return task.target


def _inputs(
    spec: TableInput | TextInput | PairInput, task: Task, header: Sequence[str], problems: Problems
) -> Callable[[int, Sequence[str]], Any]:
    """What reads a row's input, given its number and cells; it notes what is wrong with them."""
    if isinstance(spec, TextInput):
        at, answer = header.index(spec.column), header.index(task.label_column)
        if isinstance(task, Language):
            return lambda _, cells: (cells[at], cells[answer])
        return lambda _, cells: cells[at]
    if isinstance(spec, PairInput):
        first, second = header.index(spec.first), header.index(spec.second)
        return lambda _, cells: (cells[first], cells[second])
    readers = [
        (header.index(column.name), lru_cache(REMEMBERED)(partial(featurize.choice_of, column)))
        for column in spec.columns
    ]
    known: dict[tuple[featurize.Choice, ...], tuple[featurize.Choice, ...]] = {}

    def choices(line: int, cells: Sequence[str]) -> tuple[featurize.Choice, ...]:
        try:
            found = tuple([read(cells[at]) for at, read in readers])
        except featurize.OutsideSchemaError:
            return _choices_of_unfit_row(line, cells)
        # Equal rows are one tuple, which for millions of them is most of the memory.
        return known.setdefault(found, found) if len(known) < REMEMBERED else found

    def _choices_of_unfit_row(line: int, cells: Sequence[str]) -> tuple[featurize.Choice, ...]:
        """The choices of a row that does not fit, each column's problem noted."""
        found: list[featurize.Choice] = []
        for at, read in readers:
            try:
                found.append(read(cells[at]))
            except featurize.OutsideSchemaError as error:
                problems.add("E302", str(error), line, error.value)
        return tuple(found)

    return choices


def _notice(contract: Contract, header: Sequence[str]) -> list[tuple[int, Callable[[str], str]]]:
    """For each column whose cells may be read otherwise than they stand: its place, and what says
    so of a cell ('' if it is read as it stands)."""
    task, found = contract.task, dict[int, Callable[[str], str]]()
    for column in contract.input.columns if isinstance(contract.input, TableInput) else ():
        if isinstance(column, NumberColumn) and column.lowest is not None:
            found[header.index(column.name)] = partial(featurize.below, column)
    if isinstance(task, (Regression, Tokens)):
        found[header.index(task.label_column)] = task.read_otherwise
    return [(at, lru_cache(REMEMBERED)(note)) for at, note in found.items()]


def table(path: Path, reading: Reading | None = None) -> Table:
    """Read a file (common/data/file_source.py). DataError if there is none or it has no header."""
    return Table(path.name, *file_source.read(path, reading or Reading()))
