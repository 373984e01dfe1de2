"""The operator's gate: an aggregate is rejected if it makes the score on public rows worse.

It sees the sum and nothing of a single site, so it works under masks (plan.PublicGate). Its
reference is the adapter in place, so a run that is taken up again needs nothing stored of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from silotune.common.contract.contract import Contract
from silotune.common.contract.task import signed_score
from silotune.common.errors import ErrorCode, RunError
from silotune.common.protocol.messages import Arrays

Evaluate = Callable[[Arrays, bool], Mapping[str, float | None]]


class PublicGateCheck:
    """RunError E301 if the contract looks at public rows and there are none, or if they do not
    define the gate's metric. evaluate: adapter, whether it adapts layers -> metrics."""

    def __init__(self, contract: Contract, evaluate: Evaluate | None, initial: Arrays) -> None:
        settings = contract.aggregation
        if (settings.early_stop or settings.gate) and evaluate is None:
            raise RunError(
                "The contract's early_stop and gate look at a metric on public rows: "
                "name them (silotune server run --test FILE).",
                code=ErrorCode.DATA_UNREADABLE,
            )
        self.gate, self._evaluate = settings.gate, evaluate
        self._known: tuple[Arrays, bool, float | None] | None = None  # of the adapter in place
        if self.gate and self._score_in_place(initial, contract.phases[0].adapts) is None:
            raise RunError(
                f"The public rows do not define {self.gate.metric}, the gate's metric: "
                "name others.",
                code=ErrorCode.DATA_UNREADABLE,
            )

    def rejection_reason(self, before: Arrays, after: Arrays, adapter_active: bool) -> str | None:
        """Why not to go on from the adapter in place to this one; None if nothing is against it."""
        if self.gate is None:
            return None
        metric, most = self.gate.metric, self.gate.max_degradation
        old, new = self._score_in_place(before, adapter_active), self._score(after, adapter_active)
        if (
            old is not None
            and new is not None
            and signed_score(metric, old) - signed_score(metric, new) <= most
        ):
            self._known = after, adapter_active, new
            return None
        return (
            f"{metric} on public rows would go from {_formatted(old)} to {_formatted(new)}, which "
            f"is worse by more than {most:g}: the sum was not taken, its ε stays spent"
        )

    def _score_in_place(self, adapter: Arrays, adapter_active: bool) -> float | None:
        known = self._known
        if known is None or known[0] is not adapter or known[1] != adapter_active:
            known = self._known = adapter, adapter_active, self._score(adapter, adapter_active)
        return known[2]

    def _score(self, adapter: Arrays, adapter_active: bool) -> float | None:
        assert self._evaluate is not None
        assert self.gate is not None
        found = self._evaluate(adapter, adapter_active).get(self.gate.metric)
        return found if found is not None and math.isfinite(found) else None


def _formatted(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
