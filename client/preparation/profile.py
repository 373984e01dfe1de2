"""What is in prepared records: choices, labels, tokens, and how many were charged before.

Counts of private records, for the site's own report (client/preparation/report.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from silotune.client.preparation.cleaning import blocks
from silotune.client.privacy import budget
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.records import record_ids
from silotune.client.records.record_identity import Links
from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import (
    CategoryColumn,
    NumberColumn,
    TableInput,
    TextInput,
)
from silotune.common.contract.task import (
    Classification,
    Language,
    MultiLabel,
    Ranking,
    Regression,
    Task,
    Tokens,
)
from silotune.common.data import featurize, records
from silotune.common.data.records import REMEMBERED, Table
from silotune.common.tokenization import token_lengths
from silotune.common.tokenization.token_lengths import Lengths

MISSING = ""  # stands for an empty cell, which no choice is
BINS = 10  # of a regression's targets


@dataclass(frozen=True)
class Counts:
    """choices: of each column its choices in words, in their order; of a text only MISSING and
    others. targets: likewise. lengths: of the texts, by words if the model's folder has no
    tokenizer."""

    rows: int
    choices: dict[str, dict[str, int]]
    targets: dict[str, int]
    lengths: Lengths

    @property
    def missing(self) -> dict[str, int]:
        return {name: counts.get(MISSING, 0) for name, counts in self.choices.items()}


def count(table: Table, contract: Contract, model: Path | None) -> Counts:
    """model: the folder with tokenizer.json, if there is one."""
    spec, task = contract.input, contract.task
    columns: dict[str, NumberColumn | CategoryColumn | None] = dict.fromkeys(contract.columns)
    if isinstance(spec, TableInput):
        columns = {column.name: column for column in spec.columns}
    meanings = {name: lru_cache(REMEMBERED)(partial(_meaning, c)) for name, c in columns.items()}
    targets = lru_cache(REMEMBERED)(_target_words(task))
    found = {name: Counter[str]() for name in columns}
    labels = Counter[str]()
    at = {name: table.header.index(name) for name in [*columns, task.label_column]}
    for block in blocks(table.rows):
        for name, counter in found.items():
            place = at[name]
            counter.update(map(meanings[name], [cells[place] for _, cells in block]))
        for _, cells in block:
            labels.update(targets(cells[at[task.label_column]]))
    return Counts(
        rows=len(table.rows),
        choices={name: _in_order(columns[name], counter) for name, counter in found.items()},
        targets={word: labels[word] for word in dict.fromkeys([*_words(task), *labels])},
        lengths=token_lengths.measure(
            (
                records.parse(Table(table.source, table.header, block), contract)
                for block in blocks(table.rows)
            ),
            contract,
            token_lengths.tokenizer_of(model),
        ),
    )


def _meaning(column: NumberColumn | CategoryColumn | None, text: str) -> str:
    """The choice a cell falls into, in words; of a text whether it is there."""
    if column is None:
        return "there" if text.strip() else MISSING
    choice = featurize.choice_of(column, text)
    return MISSING if choice is None else column.choices[choice]


def _in_order(column: NumberColumn | CategoryColumn | None, counts: Counter[str]) -> dict[str, int]:
    words = column.choices if column is not None else ("there",)
    return {word: counts[word] for word in (*words, MISSING)}


def _words(task: Task) -> tuple[str, ...]:
    """The labels in the contract's order, with none that a record may lack."""
    if isinstance(task, (Classification, MultiLabel)):
        return tuple(label.name for label in task.labels)
    if isinstance(task, Tokens):
        return task.tags
    if isinstance(task, Ranking):
        return "relevant", "not relevant"
    if isinstance(task, Regression):
        return tuple(_bin(task, at) for at in range(BINS))
    return ("answer",)


def _bin(task: Regression, at: int) -> str:
    return f"{task.number(at / BINS):.4g} to {task.number((at + 1) / BINS):.4g}"


def _target_words(task: Task) -> Callable[[str], Sequence[str]]:
    """What a label's cell says, in words."""
    words = _words(task)

    def read(text: str) -> Sequence[str]:
        target: Any = task.target(text)
        if isinstance(task, MultiLabel):
            return [word for word, has in zip(words, target, strict=True) if has] or ["none"]
        if isinstance(task, Tokens):
            return [words[tag] for tag in target]
        if isinstance(task, Regression):
            return [words[min(int(target * BINS), BINS - 1)]]
        if isinstance(task, Ranking):
            return [words[1 - target]]
        return [words[0 if isinstance(task, Language) else target]]

    return read


def made_up(contract: Contract, n: int = 2) -> list[str]:
    """How rows read to the model, of rows that are drawn from the contract and are nobody's."""
    spec = contract.input
    if isinstance(spec, TableInput):
        return [featurize.to_text(spec, row) for row in featurize.synthetic(spec, n, seed=1)]
    if isinstance(spec, TextInput):
        return [f"⟨the text in '{spec.column}' as it stands⟩"]
    return [f"⟨the text in '{spec.first}'⟩ ⟨the text in '{spec.second}'⟩"]


@dataclass(frozen=True)
class Charged:
    """Of the prepared records, how many this site's ledger has charges of; None without a ledger.
    name: of this set of records, by keyed fingerprints."""

    records: int
    before: int | None
    name: str


def charged(
    table: Table, key: Sequence[str], ledger: PrivacyLedger | None, links: Mapping[str, Links]
) -> Charged:
    """links: to the raw rows, by basis (client/preparation/cleaning.py). DataError: no such key
    column."""
    found = record_ids.of_table(
        table, key, ledger.identity.fingerprint_key if ledger else bytes(32)
    )
    if ledger is None:
        return Charged(len(found.fingerprints), None, "")
    before = np.zeros(len(found.fingerprints), dtype=bool)
    for overlap in budget.overlaps(ledger, found, links).values():
        before |= overlap
    return Charged(len(found.fingerprints), int(before.sum()), found.id)
