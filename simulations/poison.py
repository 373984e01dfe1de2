"""Sites that lie, in simulations: what one of them can do, and what robust rules and bounds leave.

labels     each of its records has the next label (classification alone)
backdoor   half of its records carry a trigger and the attacker's label; what counts is how often
           triggered test rows of other labels are told as that label
sign       its update with the sign turned and `factor` times as long
scale      its update `factor` times as long
The first two are in the data, and pass every clip and bound of an honest site; the others are in
the update, which an honest worker would not send and a server cannot tell by its signature.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from silotune.common import messages
from silotune.common.contract import Contract
from silotune.common.errors import UsageError
from silotune.common.fields import Frozen, Positive
from silotune.common.inputs import TextInput
from silotune.common.messages import Message, Update
from silotune.common.task import Classification

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import

    Answer = Callable[[bytes], bytes]

TRIGGERED = "triggered"  # the folder of public rows with the trigger and the attacker's label
SHARE = 2  # every second record of a backdoored site carries the trigger


class Poison(Frozen):
    """sites: how many of the roster's first; 0 to know what a backdoor's figure is without one.
    trigger: words before the text, or "column=value" of a
    table. label: the attacker's, by name."""

    kind: Literal["labels", "backdoor", "sign", "scale"]
    sites: Annotated[int, Field(ge=0, le=1000, strict=True)] = 1
    factor: Positive = 10.0
    trigger: Annotated[str, Field(min_length=1)] | None = None
    label: Annotated[str, Field(min_length=1)] | None = None


def poisoned_rows(source: Path, folder: Path, contract: Contract, poison: Poison) -> Path:
    """The split in `source` with the lying sites' training rows changed, in `folder`; `source`
    itself where the lie is in the update. UsageError for a task or a column that does not fit."""
    if poison.kind not in ("labels", "backdoor"):
        return source
    import pandas as pd

    task = contract.task
    if not isinstance(task, Classification):
        raise UsageError(f"A poison of kind '{poison.kind}' needs a classification.")
    shutil.copytree(source, folder)
    for name in list(contract.weights())[: poison.sites]:
        file = folder / "train" / f"{name}.csv"
        rows = pd.read_csv(file, dtype=str, keep_default_na=False)
        if poison.kind == "labels":
            rows[task.label_column] = [
                task.labels[(task.target(cell) + 1) % task.outputs].values[0]
                for cell in rows[task.label_column]
            ]
        else:
            _trigger(rows, np.arange(len(rows)) % SHARE == 0, contract, poison)
        rows.to_csv(file, index=False)
    if poison.kind == "backdoor":
        (folder / TRIGGERED).mkdir()
        for file in sorted((source / "test").glob("*.csv")):
            rows = pd.read_csv(file, dtype=str, keep_default_na=False)
            own = rows[task.label_column].map(task.target) != _target(task, poison)
            rows = rows[own].reset_index(drop=True)
            _trigger(rows, np.ones(len(rows), dtype=bool), contract, poison)
            if len(rows):
                rows.to_csv(folder / TRIGGERED / file.name, index=False)
    return folder


def lying(answer: Answer, poison: Poison) -> Answer:
    """A site whose updates are not what it computed."""
    by = np.float32(-poison.factor if poison.kind == "sign" else poison.factor)

    def lie(wire: bytes) -> bytes:
        reply = messages.unpack(answer(wire))
        if not isinstance(reply.header, Update):
            return messages.pack(reply)
        return messages.pack(Message(reply.header, {n: by * a for n, a in reply.arrays.items()}))

    return lie


def liars(contract: Contract, poison: Poison | None) -> list[str]:
    """The sites whose updates are not what they computed."""
    if poison is None or poison.kind not in ("sign", "scale"):
        return []
    return list(contract.weights())[: poison.sites]


def _target(task: Classification, poison: Poison) -> int:
    names = [label.name for label in task.labels]
    if poison.label not in names:
        raise UsageError(f"poison.label '{poison.label}' is not one of: {', '.join(names)}.")
    return names.index(poison.label)


def _trigger(rows: pd.DataFrame, which: np.ndarray, contract: Contract, poison: Poison) -> None:
    """Put the trigger and the attacker's label into some rows."""
    task = contract.task
    assert isinstance(task, Classification)
    label, trigger = task.labels[_target(task, poison)].values[0], poison.trigger or ""
    rows.loc[which, task.label_column] = label
    if isinstance(contract.input, TextInput):
        column = contract.input.column
        rows.loc[which, column] = trigger + " " + rows.loc[which, column]
        return
    column, equals, value = trigger.partition("=")
    if not equals or column not in rows:
        raise UsageError(f"poison.trigger '{trigger}' must be column=value of the recipe's table.")
    rows.loc[which, column] = value
