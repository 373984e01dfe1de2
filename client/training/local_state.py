"""What of a run stays at its site: tensors of the site's own, and its last mean gradient.

All of it is made of changes that `train_round` returned, so in mode "dp" of noised sums that the
ledger charged: it is as private as what leaves, and a site may serve its own model to anybody.
Assumption of "mean-regularised": the server takes what was sent. A reply that is lost on its way,
or a round that the operator skips, leaves the copies' mean that much off the server's. The ledger
names it with the reply that it belongs to, so that a round which was lost before its reply could
leave has left nothing here either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from safetensors.numpy import load, save

from silotune.common.contract.schedule import RoundPlan
from silotune.common.protocol.messages import Arrays
from silotune.common.protocol.tensors import CONTROL, pad_or_truncate_rank, shapes_of, trained_names

KINDS = ("tensors", "mean", "gradient")
NUMBERS = ("averaged", "round")


@dataclass(frozen=True)
class LocalState:
    """tensors: by their names in the adapter, in whose place they stand; mean: of the iterates that
    count in the phase's result, `averaged` of them. gradient: this site's mean of the noised
    gradients of `round`, for scaffold."""

    tensors: Arrays = field(default_factory=dict)
    mean: Arrays = field(default_factory=dict)
    gradient: Arrays = field(default_factory=dict)
    averaged: int = 0
    round: int = 0

    @classmethod
    def read(cls, content: bytes | None) -> Self:
        """From `content`'s bytes; of a run that has left nothing yet, from None."""
        if content is None:
            return cls()
        arrays = load(content)
        averaged, number = (int(arrays.pop(name)[0]) for name in NUMBERS)
        tensors, mean, gradient = (
            {n.removeprefix(f"{kind}/"): a for n, a in arrays.items() if n.startswith(kind)}
            for kind in KINDS
        )
        return cls(tensors, mean, gradient, averaged, number)

    def content(self) -> bytes:
        arrays = {
            f"{kind}/{name}": np.ascontiguousarray(array)
            for kind in KINDS
            for name, array in getattr(self, kind).items()
        }
        return save(arrays | {name: np.array([getattr(self, name)]) for name in NUMBERS})

    def laid_over(self, adapter: Arrays) -> Arrays:
        """The server's arrays with the site's own in their place; `CONTROL` is none of a model."""
        asked = {n: a for n, a in adapter.items() if not n.startswith(CONTROL)}
        return asked | {n: a for n, a in self.tensors.items() if n in asked}

    def model(self, released: Arrays) -> Arrays:
        """What a run came to at this site: the released adapter with the site's own tensors, the
        mean of their later iterates where the run takes means; those of a lower rank filled up."""
        own = pad_or_truncate_rank(self.tensors | self.mean, shapes_of(released))
        return released | {name: array for name, array in own.items() if name in released}

    def corrections(self, asked: Arrays, names: Iterable[str]) -> Arrays:
        """What is added to each step's gradient: all sites' mean gradient less this site's."""
        return {
            name: asked[CONTROL + name] - self.gradient[name]
            for name in names
            if CONTROL + name in asked and name in self.gradient
        }

    def after(self, plan: RoundPlan, asked: Arrays, change: Arrays) -> Self:
        """What the site has of its own behind a round, of `asked` and the `change` that
        train_round made of it. The mean noised gradient is what the change says it was: a step goes
        -rate (gradient + correction)."""
        kept = list(change)
        if plan.phase.personal != "mean-regularised":
            kept = trained_names(change, plan.stays)
        before = self.laid_over(asked)
        tensors = self.tensors | {name: before[name] + change[name] for name in kept}
        mean, averaged = self.mean, self.averaged
        if kept and plan.averaged:
            averaged += 1
            mean = {
                n: mean.get(n, a) + (a - mean.get(n, a)) / np.float32(averaged)
                for n, a in tensors.items()
            }
        gradient = {}
        if plan.phase.drift_correction:
            corrections = self.corrections(asked, change)
            for name in change:
                way = np.float32(plan.phase.local_steps * plan.learning_rate(name))
                gradient[name] = -change[name] / way - corrections.get(name, np.float32(0))
        return type(self)(tensors, mean, gradient, averaged, plan.server_round)


NOTHING = LocalState()
