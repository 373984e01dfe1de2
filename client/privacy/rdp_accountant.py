"""The accountant as an object with a history, as Opacus' accountants are."""

from __future__ import annotations

from silotune.client.privacy import accountant
from silotune.client.privacy.accountant import Mechanism


class RDPAccountant:
    """Composes Poisson-subsampled Gaussian steps in Rényi DP, with Silotune's orders.

    It has the methods of `opacus.accountants.RDPAccountant`. Beside Opacus' orders it tries larger
    ones, so that it gives the same ε, or a smaller one where ε is small. It loads no torch before
    the first step is accounted.

    What it gives is valid for steps that were fixed beforehand, as a contract's are. A site's
    ledger stops a server that chooses as it goes by one order that is fixed first
    (client/privacy/budget.py).

    Attributes:
        history: The steps so far, equal ones that follow each other as one Mechanism.
    """

    def __init__(self) -> None:
        self.history: list[Mechanism] = []

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Add equal steps to the history.

        Args:
            noise_multiplier: The standard deviation of a step's noise in clip norms.
            sample_rate: The probability with which a step takes each unit.
            steps: How many.
        """
        if self.history and self.history[-1][:2] == (noise_multiplier, sample_rate):
            steps += self.history.pop().steps
        self.history.append(Mechanism(noise_multiplier, sample_rate, steps))

    def get_epsilon(self, delta: float) -> float:
        """What the history costs.

        Args:
            delta: The δ that goes with it.

        Returns:
            ε for adding or removing one unit: 0 for an empty history, infinite without noise.
        """
        return accountant.epsilon(self.history, delta)

    def __len__(self) -> int:
        """The number of entries of the history."""
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """The name of the accountant, as Opacus has it."""
        return "rdp"
