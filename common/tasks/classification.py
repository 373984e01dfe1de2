"""Sequence classification: one label per record."""

from __future__ import annotations

from torch import Tensor, nn


def per_example_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each example by itself, [N]: nothing in it depends on the batch."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")
