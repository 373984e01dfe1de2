"""The contract's public schema as one of pandera's: which rows of a block do not fit, and where.

What a cell may be is the contract's own reading of it (common/data/featurize.py,
common/contract/task.py), so what passes here passes when the worker reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import pandas as pd
import pandera.pandas as pandera
from pandera.errors import SchemaErrors

from silotune.client.records.canonical_values import canonical
from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import NumberColumn, TableInput, TextInput
from silotune.common.contract.task import Regression, Tokens
from silotune.common.data import featurize
from silotune.common.data.records import REMEMBERED
from silotune.common.errors import ErrorCode
from silotune.common.formats import tag_schemes
from silotune.common.formats.cell_values import UNREAD, unread

REMEDIES = {
    "outside": 'correct the cells, or set outside = "missing" in [prepare]',
    "no target": 'fill in the column, or set missing_target = "drop" in [prepare]',
    "target": "correct the cells, or ask the operator for a contract with these values",
    "words": "correct the rows",
    "key": "fill in the key, or remove the rows",
}


class Rule(NamedTuple):
    """What is asked of a column's cells. kind: "outside" the public schema, "no target", a
    "target" that is none, "words" and tags of unlike number, a "key" of no entity; "bound": a
    number beyond a public bound, which the schema reads as missing or as the bound; "scheme": tags
    of another scheme, which are read as IOB2."""

    column: str
    kind: str
    code: ErrorCode | Literal[""]
    what: str

    @property
    def remedy(self) -> str:
        """What the owner can do about cells that are refused."""
        return REMEDIES.get(self.kind, "")


class Columns:
    """The rules of a contract for a table with this header, which has the contract's columns."""

    def __init__(self, contract: Contract, header: Sequence[str]) -> None:
        self.rules: list[Rule] = []
        self.task = contract.task
        spec, task = contract.input, contract.task
        columns: dict[str, Any] = {}
        for column in spec.columns if isinstance(spec, TableInput) else ():
            checks = [
                self._cells(
                    Rule(column.name, "outside", ErrorCode.SCHEMA_MISMATCH, f"allows {allowed}"),
                    partial(_not_read_as, partial(featurize.misfit, column), f"allows {allowed}"),
                )
                for allowed in featurize.allowed(column)
            ]
            if isinstance(column, NumberColumn) and column.lowest is not None:
                what = f"is below {column.lowest:g}: counts as missing"
                checks.append(
                    self._cells(
                        Rule(column.name, "bound", "", what),
                        partial(_not_read_as, partial(featurize.below, column), what),
                    )
                )
            columns[column.name] = pandera.Column(checks=checks)
        label = task.label_column
        bounds = (
            [
                self._cells(
                    Rule(label, "bound", "", task.read_as_bound),
                    partial(_not_read_as, task.read_otherwise, task.read_as_bound),
                )
            ]
            if isinstance(task, Regression)
            else []
        )
        if isinstance(task, Tokens):
            bounds += [
                self._cells(
                    Rule(label, "scheme", "", what),
                    partial(_not_read_as, task.read_otherwise, what),
                )
                for what in tag_schemes.READ_OTHERWISE.values()
            ]
        columns[label] = pandera.Column(
            checks=[
                *bounds,
                self._cells(Rule(label, "no target", ErrorCode.LABEL_UNKNOWN, "is empty"), _filled),
                *(
                    self._cells(
                        Rule(
                            label,
                            "target",
                            ErrorCode.LABEL_UNKNOWN,
                            f"allows {task.answers}{written}",
                        ),
                        partial(self._is_target, written),
                    )
                    for written in (("", UNREAD) if isinstance(task, Regression) else ("",))
                ),
            ]
        )
        entity = contract.privacy.entity
        for name in header if entity else ():
            if entity and canonical(name) in map(canonical, entity.key):
                rule = Rule(
                    name,
                    "key",
                    ErrorCode.SCHEMA_MISMATCH,
                    "is empty, and it is the privacy unit's key",
                )
                check = self._cells(rule, _filled)
                if name in columns:
                    columns[name].checks.append(check)
                else:
                    columns[name] = pandera.Column(checks=check)
        whole = []
        if isinstance(task, Tokens) and isinstance(spec, TextInput):
            rule = Rule(
                label,
                "words",
                ErrorCode.LABEL_UNKNOWN,
                f"needs as many tags as '{spec.column}' has words",
            )
            whole.append(
                pandera.Check(
                    lambda rows: (
                        rows[spec.column].str.split().str.len() == rows[label].str.split().str.len()
                    ),
                    error=self._number(rule),
                )
            )
        self.names = list(dict.fromkeys([*contract.columns, *columns]))
        self._places = [header.index(name) for name in self.names]
        self._schema = pandera.DataFrameSchema(columns, checks=whole)

    def _number(self, rule: Rule) -> str:
        """What pandera is to call a rule by."""
        self.rules.append(rule)
        return str(len(self.rules) - 1)

    def _is_target(self, written: str, text: str) -> bool:
        """Whether an answer is none of those that are refused as `written`: UNREAD or otherwise."""
        if not _filled(text) or _fits(self.task.target, ValueError, text):
            return True
        return isinstance(self.task, Regression) and unread(text) != written

    def _cells(self, rule: Rule, fits: Callable[[str], bool]) -> pandera.Check:
        """A check of each cell; equal ones are looked at once."""
        known = lru_cache(REMEMBERED)(fits)
        return pandera.Check(
            lambda cells: cells.isin([text for text in cells.unique() if known(text)]),
            error=self._number(rule),
        )

    def violations(self, rows: Iterable[Sequence[str]]) -> dict[Rule, list[int]]:
        """For each rule that is broken, the indices of the rows that break it, ascending."""
        picked = [[cells[at] for at in self._places] for cells in rows]
        frame = pd.DataFrame(picked, columns=self.names, dtype=object)
        try:
            self._schema.validate(frame, lazy=True)
        except SchemaErrors as errors:  # it holds values: nothing of it goes further
            found = errors.failure_cases[["check", "index"]].drop_duplicates()
        else:
            return {}
        return {
            self.rules[int(number)]: sorted(map(int, cases["index"]))
            for number, cases in found.groupby("check")
        }


def _filled(text: str) -> bool:
    return bool(text.strip())


def _not_read_as(read_otherwise: Callable[[str], str], what: str, text: str) -> bool:
    """Whether a cell is not read otherwise than it stands in the way that `what` says."""
    return read_otherwise(text) != what


def _fits(read: Callable[[str], object], refused: type[Exception], text: str) -> bool:
    try:
        read(text)
    except refused:
        return False
    return True
