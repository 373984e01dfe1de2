"""Malicious sites in simulations: the effect of one, with and without robust rules and bounds.

labels     each of its records has the next label (classification alone)
backdoor   half of its records carry a trigger and the attacker's label; what counts is how often
           triggered test rows of other labels are predicted as that label
sign       its update with the sign turned and `factor` times as long
scale      its update `factor` times as long
bound      each entry as far against its update as a masked sum can hold (with masks alone)
The first two are in the data, and pass every clip and bound of an honest site; the others are in
the update, which an honest worker would not send and a server cannot tell by its signature.

With masks a site lies before it masks. A masked entry is any element of the ring, so the contract's
bound, which an honest worker keeps to, does not hold a liar, and nobody sees that it does not. What
holds it is the sum: one beyond +-2^22 of the ring, which is the bound on the mean, is not opened,
and the run stops (common/secagg/fixed_point.py). Where the others' part of the mean is s, a lie can
put an entry of the mean anywhere in [-bound, bound], so it shifts it by up to bound + |s|; by
bound, where an honest site of weight w could do w bound, if the others sent nothing. Beyond that it
is a denial of service. The malicious sites here leave room for the others, of whom each knows only
what it computed itself.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from silotune.client.worker.secagg import SiteMasking
from silotune.common.config.types import Count, Frozen, Positive
from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import TextInput
from silotune.common.contract.privacy import Metric
from silotune.common.contract.task import Classification
from silotune.common.errors import UsageError
from silotune.common.protocol import messages, packing
from silotune.common.protocol.messages import Arrays, Message, Train, Update
from silotune.common.signing import Sign

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import

    Answer = Callable[[bytes], bytes]

TRIGGERED = "triggered"  # the folder of public rows with the trigger and the attacker's label
ROOM = 2  # times its own largest entry: what a liar under masks leaves for the others' mean
SHARE = 2  # every second record of a backdoored site carries the trigger


class Poison(Frozen):
    """An attack by the first sites of the roster."""

    kind: Literal["labels", "backdoor", "sign", "scale", "bound"] = Field(
        description="Attack on the training rows or on the updates."
    )
    sites: Annotated[int, Field(ge=0, le=1000, strict=True)] = Field(
        default=1,
        description="Number of attacking sites, the first of the roster; 0 measures a backdoor "
        "without an attacker.",
    )
    factor: Positive = Field(
        default=10.0, description="Factor by which an update is scaled in the attacks on updates."
    )
    trigger: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description='Backdoor trigger: words before the text, or "column=value" of a table.',
    )
    label: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Name of the label that the attacker wants triggered rows to get."
    )
    every: Count | None = Field(
        default=None,
        description="Number of rounds from one attack on an update to the next; each round if "
        "absent.",
    )

    @property
    def by(self) -> float:
        """What an update is multiplied with."""
        return -self.factor if self.kind == "sign" else self.factor

    def lies_in(self, round_number: int) -> bool:
        return round_number % (self.every or 1) == 0


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


def poisoned_client(answer: Answer, poison: Poison) -> Answer:
    """A site whose updates are not what it computed."""
    by = np.float32(poison.by)

    def lie(wire: bytes) -> bytes:
        reply = messages.unpack(answer(wire))
        if not isinstance(reply.header, Update) or not poison.lies_in(reply.header.round):
            return messages.pack(reply)
        return messages.pack(Message(reply.header, {n: by * a for n, a in reply.arrays.items()}))

    return lie


class LyingMasking(SiteMasking):
    """The masks of a site that lies: real ones, around what it did not compute."""

    def __init__(self, contract: Contract, name: str, sign: Sign, poison: Poison) -> None:
        super().__init__(contract, name, sign)
        self.poison = poison

    def mask(
        self, request: Train, digest: str, change: Arrays, metrics: dict[Metric, float]
    ) -> bytes:
        if not self.poison.lies_in(request.round):
            return super().mask(request, digest, change, metrics)
        weight = self.contract.weight_share(self.name)
        return self._member(request.agreement).mask(
            request.round,
            self._lie(packing.join(self.contract, change, metrics), weight),
            packing.factor(self.contract, weight),
            math.inf,
            bytes.fromhex(digest),
        )

    def _lie(self, honest: packing.Vector, weight: float) -> packing.Vector:
        """What to mask instead. The sum opens if no entry of the others' mean is larger than
        ROOM times this site's own largest. Released metrics are left as they are."""
        bound, own = packing.bound(self.contract), len(honest) - len(self.contract.metrics)
        values, found = honest[:own], honest.copy()
        others = min(ROOM * float(np.abs(values).max(initial=0.0)), bound)
        most = np.float32((bound - (1 - weight) * others) / weight)
        if self.poison.kind == "bound":
            found[:own] = -most * np.sign(values)
        else:
            found[:own] = np.clip(np.float32(self.poison.by) * values, -most, most)
        return found


def malicious_sites(contract: Contract, poison: Poison | None) -> list[str]:
    """The sites whose updates are not what they computed."""
    if poison is None or poison.kind not in ("sign", "scale", "bound"):
        return []
    if poison.kind == "bound" and contract.secure_aggregation is None:
        raise UsageError('A poison of kind "bound" is about masked sums: it needs masks.')
    return list(contract.weights())[: poison.sites]


def masking_of(
    site: str, contract: Contract, poison: Poison | None
) -> Callable[[Contract, str, Sign], SiteMasking]:
    """What makes a site's side of secure aggregation: a malicious one's masks what it did not
    compute."""
    if poison is not None and site in malicious_sites(contract, poison):
        return partial(LyingMasking, poison=poison)
    return SiteMasking


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
