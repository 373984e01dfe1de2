"""An example's loss is its own: the same alone, in company and under more padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from silotune.common.tasks.token_classification import (
    IGNORED,
    next_token_loss,
    per_example_loss,
)

LENGTHS = [7, 1, 4, 0, 5]  # counted tokens of each example
N, T, L = len(LENGTHS), 9, 6


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(N, T, L, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> Tensor:
    """Padded behind; the first example also ignores a token in the middle."""
    found = torch.randint(L, (N, T), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(LENGTHS):
        found[row, length:] = IGNORED
    found[0, 3] = IGNORED
    return found


def masked(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch padded behind."""
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    return labels.clamp(min=0), mask.long()


def test_it_equals_each_example_alone(logits: Tensor, labels: Tensor) -> None:
    alone = []
    for row, own in zip(logits, labels, strict=True):
        chances = row.log_softmax(dim=1)
        losses = [-chances[t, k] for t, k in enumerate(own.tolist()) if k != IGNORED]
        alone.append(torch.stack(losses).mean() if losses else torch.tensor(0.0))
    torch.testing.assert_close(per_example_loss(logits, labels), torch.stack(alone))


def test_company_and_padding_change_nothing(logits: Tensor, labels: Tensor) -> None:
    ids, mask = masked(labels)
    loss, next_loss = per_example_loss(logits, labels), next_token_loss(logits, ids, mask)
    for row in range(N):
        one = slice(row, row + 1)
        torch.testing.assert_close(per_example_loss(logits[one], labels[one])[0], loss[row])
        torch.testing.assert_close(
            next_token_loss(logits[one], ids[one], mask[one])[0], next_loss[row]
        )
    noise = 50 * torch.randn(N, 30, L, generator=torch.Generator().manual_seed(2))
    wide = torch.cat([logits, noise], dim=1)
    more = nn.functional.pad(labels, (0, 30), value=IGNORED)
    torch.testing.assert_close(per_example_loss(wide, more), loss)
    after = next_token_loss(
        wide, nn.functional.pad(ids, (0, 30), value=3), nn.functional.pad(mask, (0, 30))
    )
    torch.testing.assert_close(after, next_loss)
    before = next_token_loss(
        torch.cat([noise, logits], dim=1),
        nn.functional.pad(ids, (30, 0), value=3),
        nn.functional.pad(mask, (30, 0)),
    )
    torch.testing.assert_close(before, next_loss)


def test_the_gradient_of_an_example_is_its_own(logits: Tensor, labels: Tensor) -> None:
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(per_example_loss(logits, labels)[2], logits)
    assert bool(gradient[2, :4].abs().sum(dim=1).all())
    assert not bool(gradient[2, 4:].any())
    assert not bool(gradient[[0, 1, 3, 4]].any())


def test_an_example_without_tokens_gives_zero(logits: Tensor, labels: Tensor) -> None:
    ids, mask = masked(labels)
    for loss in (
        per_example_loss(logits.requires_grad_(), labels),
        next_token_loss(logits, ids, mask),
    ):
        assert loss[3].item() == 0.0
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[3].any())
    assert next_token_loss(logits, ids, mask)[1].item() == 0.0  # one token predicts nothing


@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (2, 0)])
def test_nothing_to_predict_is_not_an_error(shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    loss = next_token_loss(torch.randn(*shape, L), ids, torch.ones_like(ids))
    assert loss.tolist() == [0.0] * shape[0]


def test_half_precision_logits_give_a_float32_loss(logits: Tensor, labels: Tensor) -> None:
    half = logits.to(torch.bfloat16)
    found = per_example_loss(half, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, per_example_loss(half.float(), labels))


def test_it_agrees_with_the_librarys_loss_for_one_example() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()
    ids = torch.randint(50, (1, 11))
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        found = next_token_loss(out.logits, ids, torch.ones_like(ids))
    torch.testing.assert_close(found[0], out.loss)
