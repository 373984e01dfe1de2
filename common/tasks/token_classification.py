"""A tag for each word: each example's loss is the mean over its own words.

A mean over the tokens of a batch would let one example change the weight of all others, and
clipping would no longer bound what a record can do.

Shapes: N examples, T tokens, W words, L labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from silotune.common.tasks.objective import Objective

IGNORED = -100  # the label of a token that does not count: padding, a prompt, a word's later pieces


def per_example_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over each example's counted tokens of their cross entropy, times the weight of the
    token's label if there are weights: [N]; 0 where none counts. The mean is over as many tokens
    whatever they weigh, so that an example of light ones alone counts less than another.

    logits [N, T, L]; labels [N, T], int64; weights [L].
    """
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        weights,
        ignore_index=IGNORED,
        reduction="none",
    )
    counts = (labels != IGNORED).sum(dim=1).clamp(min=1)
    return losses.view(labels.shape).sum(dim=1) / counts


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross entropy of all tokens but the first, [N]: logits at t predict the token at t + 1.

    logits [N, T, V]; ids [N, T]; mask [N, T], not 0 for tokens. A prediction counts if the token it
    is made from and the one it is about are both tokens, on whichever side the padding is.
    """
    tokens = mask.bool()
    labels = ids[:, 1:].masked_fill(~(tokens[:, 1:] & tokens[:, :-1]), IGNORED)
    return per_example_loss(logits[:, :-1], labels)


def share_right(logits: Tensor, labels: Tensor) -> Tensor:
    """[N], the share of each example's counted tokens whose largest logit is the label's."""
    counted = labels != IGNORED
    right = (logits.argmax(dim=2) == labels) & counted
    return right.sum(dim=1) / counted.sum(dim=1).clamp(min=1)


class TokenClassificationObjective(Objective):
    """Targets are [N, W] tags of words, IGNORED behind the last; a network turns them into [n, T]
    by the first piece of each word."""

    of_tokens = True

    def tensor(self, targets: Sequence[Any]) -> Tensor:
        # At least one place, also where no record has a word.
        rows = [torch.tensor(list(row) or [IGNORED]) for row in targets]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(outputs.device)
        return per_example_loss(outputs, targets, weights)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return share_right(outputs, targets)

    def predictions(self, outputs: Tensor, targets: Tensor) -> Sequence[Any]:
        """Of each example [W, L], the logits of the words that the model reads."""
        found, counted = outputs.float().numpy(force=True), (targets != IGNORED).numpy(force=True)
        return [row[own] for row, own in zip(found, counted, strict=True)]
