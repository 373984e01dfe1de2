"""Sequence classification: one label per record."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def per_example_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each example by itself, [N]: nothing in it depends on the batch."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1 for each example whose largest logit is its label's, [N]."""
    return (logits.argmax(dim=1) == labels).float()


# What a contract may ask to have released of each record (common/contract.py, Released).
VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": per_example_loss,
    "accuracy": correct,
}
