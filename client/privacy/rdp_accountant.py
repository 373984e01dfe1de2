"""The accountant as an object with a history, as Opacus' accountants are."""

from __future__ import annotations

import math

from silotune.client.privacy import accountant
from silotune.client.privacy.accountant import Mechanism


class RDPAccountant:
    """Composes Poisson-subsampled Gaussian steps in Rényi DP, with Silotune's orders.

    Of `opacus.accountants.RDPAccountant` it has `history`, `step`, `get_epsilon`, `mechanism` and
    `len`; it has no `get_privacy_spent`, no hook of an optimizer, no `state_dict` and no choice of
    orders. Beside Opacus' orders it tries larger ones, so that it gives the same ε, or a smaller
    one where ε is small. It loads no torch.

    What it gives is valid for steps that were fixed beforehand, as a contract's are. A site's
    ledger stops a server that chooses as it goes by one order that is fixed first
    (client/privacy/budget.py).

    Attributes:
        history: The steps so far as (noise_multiplier, sample_rate, num_steps), equal ones that
            follow each other as one. It may be set to the history of an accountant of Opacus.
    """

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Add equal steps to the history.

        Args:
            noise_multiplier: The standard deviation of a step's noise in clip norms; 0 is no noise.
            sample_rate: The probability with which a step takes each unit: above 0 and at most 1.
            steps: How many; at least 1.

        Raises:
            ValueError: If one of them is outside its range; the history is then as before.
        """
        added = _checked(noise_multiplier, sample_rate, steps)
        if self.history and tuple(self.history[-1][:2]) == added[:2]:
            added = added._replace(steps=added.steps + self.history.pop()[2])
        self.history.append(added)

    def get_epsilon(self, delta: float) -> float:
        """What the history costs.

        Args:
            delta: The δ that goes with it: above 0 and below 1.

        Returns:
            ε for adding or removing one unit: 0 for an empty history, infinite without noise.

        Raises:
            ValueError: If δ or an entry of the history is outside its range.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta = {delta} must be above 0 and below 1.")
        return accountant.epsilon([_checked(*entry) for entry in self.history], delta)

    def __len__(self) -> int:
        """The number of entries of the history."""
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """The name of the accountant, as Opacus has it."""
        return "rdp"


def _checked(noise_multiplier: float, sample_rate: float, steps: int) -> Mechanism:
    """Equal steps, each number of them within its range."""
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier = {noise_multiplier} must be finite and at least 0.")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate = {sample_rate} must be above 0 and at most 1.")
    if not 1 <= steps < math.inf or steps % 1:
        raise ValueError(f"steps = {steps} must be a whole number, at least 1.")
    return Mechanism(noise_multiplier, sample_rate, steps)
