"""What a plan for a linear head can learn at all, before a record is read.

A plan is judged by a medium signal: one of which the best possible model covers a stated part of
the way from a constant answer to a perfect one. What the head that a plan trains makes of a signal
is derived in common/planning/class_signals.py and number_signals.py, and checked on synthetic sets
(tests/common/planning/test_forecast.py). Tokens and language models have no forecast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from silotune.common.planning.class_signals import ClassSignals
from silotune.common.planning.number_signals import NumberSignals
from silotune.common.planning.plan_facts import TEST_RECORDS, PlanFacts

MOST_EPSILON, MOST_UNITS = 100.0, 1e8  # what a contract may have
TOLERANCE = 1e-4
BETWEEN = {
    "multi-label": "records with a label and as many without",
    "ranking": "pairs that belong together and as many others",
}
Signals = ClassSignals | NumberSignals


@dataclass(frozen=True)
class Forecast:
    """What a plan can do. Scores are shares of right answers, of a regression shares of the
    variance that is explained.

    Attributes:
        task: The task's kind.
        classes: How many there are, two of a logit of its own; 0 of a regression.
        epsilon: Of the guarantee.
        units: Expected units of a site.
        noise: The standard deviation of an output by noise alone.
        attainable: The score of the best possible model, of a medium signal.
        expected: The score that this plan's model is expected to have.
        weakest: The attainable score of the weakest signal that shows; None if none does.
        shows: Whether the medium signal does.
        least_units: From how many units at each site it would; None if it does or no number would.
        least_epsilon: From which epsilon it would; None if it does or none up to 100 would.
    """

    task: str
    classes: int
    epsilon: float
    units: float
    noise: float
    attainable: float
    expected: float
    weakest: float | None
    shows: bool
    least_units: int | None
    least_epsilon: float | None

    def sentences(self, unit: str, plan: str = "this plan") -> list[str]:
        """For people who know their records, not the method.

        Args:
            unit: "record" or "entity".
            plan: What the model is trained by, in words.

        Returns:
            First whether a medium signal shows, and what would help if it does not.
        """
        medium, expected = self._medium()
        if self.shows:
            return [f"with {medium} the model of {plan} is expected to {expected}", self._noise()]
        few = {"record": "records", "entity": "entities"}[unit]
        ways = [f"n ≥ {self.least_units:,}"] if self.least_units else []
        ways += [f"ε ≥ {self.least_epsilon:g}"] if self.least_epsilon else []
        remedy = f"{' or '.join(ways)} would do" if ways else "no ε and no n would do"
        return [
            f"too few {few} for a medium signal at this ε (n = {self.units:,.0f} {few} per site, "
            f"ε = {self.epsilon:g}): {remedy}",
            f"with {medium} the model of {plan} can hardly be told from the constant answer",
            self._noise(),
        ]

    def _medium(self) -> tuple[str, str]:
        """The medium signal in words, and what the plan's model makes of it."""
        attainable, expected = f"{100 * self.attainable:.0f}", f"{100 * self.expected:.0f}"
        if self.task == "regression":
            return (
                f"a medium signal (the best possible model explains {attainable} % of the numbers' "
                "variance, a constant answer nothing)",
                f"explain {expected} %",
            )
        classes = f"{self.classes} classes with as many test records of each"
        return (
            f"a medium signal (the best possible model is right in {attainable} of 100 cases "
            f"between {BETWEEN.get(self.task, classes)}, a constant answer in "
            f"{100 / self.classes:.0f})",
            f"be right in {expected}",
        )

    def _noise(self) -> str:
        number = self.task == "regression"
        what = f"a prediction by {100 * self.noise:.2g} % of the bounds' width" if number else ""
        sentence = (
            f"the noise alone moves {what or f'a score by {self.noise:.2g}'} (standard deviation)"
        )
        if self.weakest is None:
            return sentence
        weakest = f"{100 * self.weakest:.0f}"
        return (
            f"{sentence}; the weakest signal that shows on {TEST_RECORDS:,} test records is one by "
            "which the best possible model "
            + (f"explains {weakest} %" if number else f"is right in {weakest}")
        )


def forecast(facts: PlanFacts) -> Forecast | None:
    """What a plan can learn.

    Args:
        facts: The plan.

    Returns:
        The forecast; None for tokens, whose signals are of another kind.
    """
    head, signals = facts.head, _signals(facts)
    if head.task == "tokens":
        return None
    medium = signals.medium
    shows = signals.shows(medium)
    units = epsilon = None
    if not shows:
        units = _least(lambda n: _signals(_with(facts, units=n)).shows(medium), 1, MOST_UNITS)
        epsilon = _least(
            lambda e: _signals(_with(facts, epsilon=e)).shows(medium), 1e-3, MOST_EPSILON
        )
    weakest = _least(signals.shows, signals.weakest, signals.strongest)
    return Forecast(
        task=head.task,
        classes=signals.classes if isinstance(signals, ClassSignals) else 0,
        epsilon=head.epsilon,
        units=head.units,
        noise=signals.noise,
        attainable=signals.attainable(medium),
        expected=signals.expected(medium),
        weakest=signals.attainable(weakest) if weakest else None,
        shows=shows,
        least_units=int(_rounded_up(units)) if units else None,
        least_epsilon=_rounded_up(epsilon) if epsilon else None,
    )


def _signals(facts: PlanFacts) -> Signals:
    return NumberSignals(facts) if facts.head.task == "regression" else ClassSignals(facts)


def _with(facts: PlanFacts, **changes: float) -> PlanFacts:
    return replace(facts, head=replace(facts.head, **changes))  # type: ignore[arg-type]


def _least(holds: Callable[[float], bool], low: float, high: float) -> float | None:
    """The least number from which `holds` is true, as it stays then; None if beyond `high`."""
    if holds(low):
        return low
    if not holds(high):
        return None
    while high / low > 1 + TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _rounded_up(value: float) -> float:
    """The next number with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.10g}")
