"""Where a run stands: the adapter, and what the server's steps carry from one round to the next.

All of it follows from the contract and the means of the rounds so far, so a run can be taken up
again from the files of its last round (server/storage/run_store.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.contract.schedule import RoundPlan
from silotune.common.contract.training import Phase
from silotune.common.protocol import tensors
from silotune.common.protocol.messages import Arrays
from silotune.server.aggregation import lora, server_optimizer


class ServerState:
    """number: the round that comes next. A phase ends at the mean of its later iterates; the next
    begins there, at rest."""

    def __init__(self, contract: Contract, initial: Arrays) -> None:
        self.contract, self.server_round = contract, 1
        self.shapes = tensors.shapes_of(initial)
        self.adapter = initial
        self.clip_norm = contract.privacy.clip_norm
        self._velocity: Arrays = {}  # or Adam's first moment
        self._second: Arrays = {}
        self._mean: Arrays = {}
        self._averaged = 0
        self._control: Arrays = {}  # scaffold: the sites' mean gradient in round _control_of
        self._control_of = 0
        self._ended = False
        self._best: Arrays = {}  # of what the last phase has come to

    @property
    def done(self) -> bool:
        return self._ended or self.server_round > self.contract.rounds

    @property
    def final(self) -> bool:
        """Whether the open round is the last."""
        return self._ended or self.server_round == self.contract.rounds

    @property
    def in_last_phase(self) -> bool:
        return self.phase is self.contract.phases[-1]

    def keep_best(self) -> None:
        """Note that what the phase has come to is the best so far."""
        self._best = self.released()

    def end(self) -> None:
        """Make the open round the last, and go back to the best."""
        self._ended = True
        self.adapter, self._mean, self._averaged = self._best, {}, 0

    @property
    def plan(self) -> RoundPlan:
        """Of the open round."""
        return self.contract.round_plan(self.server_round)

    @property
    def phase(self) -> Phase:
        return self.plan.phase

    @property
    def sent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors whose change the sites send this round."""
        names = tensors.trained_names(self.shapes, self.plan.sends)
        return {name: self.shapes[name] for name in names}

    def request_tensors(self) -> Arrays:
        """What a site needs for this round; with scaffold also the mean gradient of the round
        before, if all sites had a part in it: then their corrections add up to nothing."""
        needed = tensors.needed_names(self.adapter, adapts=self.phase.adapts)
        found = {name: self.adapter[name] for name in needed}
        if self._control_of == self.server_round - 1:
            found |= {tensors.CONTROL + name: a for name, a in self._control.items()}
        return found

    def released(self) -> Arrays:
        """What the phase has come to: the mean of its later iterates, once there is one."""
        return self._mean if self._averaged else self.adapter

    def step(
        self,
        change: Arrays,
        figures: Mapping[Metric, float],
        rejection_reason: Callable[[Arrays, Arrays, bool], str | None] = lambda *_: None,
        *,
        present: float = 1.0,
    ) -> str | None:
        """Take in a round's mean change and metrics. ProtocolError if it leads out of bounds;
        nothing has changed then. present: the share of all weights whose changes are in it.

        rejection_reason: is asked with the adapter, the one that the step leads to, and whether it
        adapts layers. What it says against the step is returned; then nothing of the round is kept,
        and
        the server is at rest: a momentum that leads past the gate by itself would have every later
        round declined (a restart as in arXiv 1204.3982).
        """
        settings, second, plan = self.contract.aggregation, Arrays(), self.plan
        phase = plan.phase
        if phase.personal == "mean-regularised":
            # Copies of sites that are not there have not moved: so much less does their mean.
            change = {name: np.float32(present) * array for name, array in change.items()}
        if settings.server_optimizer:
            moved, velocity, second = server_optimizer.adaptive_step(
                self.adapter, self._velocity, self._second, change, settings.server_optimizer
            )
        else:
            moved, velocity = server_optimizer.server_momentum_step(
                self.adapter, self._velocity, change, settings.server_momentum
            )
        tensors.check(moved, self.shapes, "The aggregate")
        tensors.check(velocity, tensors.shapes_of(velocity), "The momentum")
        declined = rejection_reason(self.adapter, moved, phase.adapts)
        if declined is not None:
            self._velocity, self._second = {}, {}
            return declined
        self.adapter, self._velocity, self._second = moved, velocity, second
        if phase.drift_correction and present == 1 and not plan.ends_phase:
            # A step is -rate (gradient + correction), and the corrections' mean is zero.
            self._control_of, self._control = (
                self.server_round,
                {
                    name: -array / np.float32(phase.local_steps * plan.learning_rate(name))
                    for name, array in change.items()
                },
            )
        if plan.averaged:
            self._mean = server_optimizer.running_mean(self._mean, self._averaged, self.adapter)
            self._averaged += 1
        if settings.method == "fedsvd" and phase.adapts:
            self.adapter, self._velocity, self._mean = lora.refactorise(
                self.adapter, self._velocity, self._mean
            )
        if self.contract.privacy.adaptive:
            self.clip_norm = server_optimizer.next_clip_norm(
                self.clip_norm, figures["unclipped"], self.contract.privacy.adaptive
            )
        return None

    def next(self) -> None:
        """Go on to the next round, and to the next phase where this was the last of one."""
        if self.plan.ends_phase:
            self.adapter, self._mean, self._averaged = self.released(), {}, 0
            self._velocity, self._second = {}, {}
        self.server_round += 1

    def state(self) -> Arrays:
        """What `restore` needs beside the adapter: arrays …"""
        return {
            f"{kind}/{name}": array
            for kind, arrays in (
                ("velocity", self._velocity),
                ("second", self._second),
                ("mean", self._mean),
                ("control", self._control),
                ("best", self._best),
            )
            for name, array in arrays.items()
        }

    def standing(self) -> dict[str, Any]:
        """… and numbers."""
        return {
            "averaged": self._averaged,
            "next_clip_norm": self.clip_norm,
            "ended": self._ended,
            "control_of": self._control_of,
        }

    def restore(
        self, server_round: int, arrays: Arrays, state: Arrays, standing: Mapping[str, Any]
    ) -> None:
        """Stand where round `server_round` ended. ProtocolError if the adapter is not the
        contract's."""
        tensors.check(arrays, self.shapes, "The stored adapter")
        self.server_round, self.adapter = server_round, arrays
        self._velocity, self._second, self._mean, self._control, self._best = (
            {n.removeprefix(kind): a for n, a in state.items() if n.startswith(kind)}
            for kind in ("velocity/", "second/", "mean/", "control/", "best/")
        )
        self._control_of = int(standing.get("control_of", 0))
        self._ended = bool(standing.get("ended"))
        self._averaged = int(standing["averaged"])
        self.clip_norm = float(standing["next_clip_norm"])
