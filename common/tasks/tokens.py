"""Token-level tasks: each example's loss is the mean over its own tokens.

A mean over the tokens of a batch would let one example change the weight of all others, and
clipping would no longer bound what a record can do.

Shapes: N examples, T tokens, L labels, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

IGNORED = -100  # the label of a token that does not count: padding, a prompt, a word's later pieces


def per_example_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over each example's counted tokens, [N]; 0 where none counts.

    logits [N, T, L]; labels [N, T], int64.
    """
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    counts = (labels != IGNORED).sum(dim=1).clamp(min=1)
    return losses.view(labels.shape).sum(dim=1) / counts


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The same for a causal language model, whose logits at t predict the token at t + 1.

    logits [N, T, V]; ids [N, T]; mask [N, T], not 0 for tokens. A prediction counts if the token it
    is made from and the one it is about are both tokens, on whichever side the padding is.
    """
    tokens = mask.bool()
    labels = ids[:, 1:].masked_fill(~(tokens[:, 1:] & tokens[:, :-1]), IGNORED)
    return per_example_loss(logits[:, :-1], labels)
