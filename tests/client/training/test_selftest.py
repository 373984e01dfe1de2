"""The start-up self-test passes what is right, and refuses each way a step can be wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor

from silotune.client.training import dp_optimizer, selftest
from silotune.client.training.dp_optimizer import DPOptimizer
from silotune.client.training.noise import NoiseSource
from silotune.client.training.privacy_units import Group, UnitBatch
from silotune.client.worker.worker import Worker
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.errors import DataError, RefusalError
from silotune.common.models.backbone import Bert
from silotune.common.models.encoder import Encoder
from silotune.common.models.factory import build
from silotune.common.tasks import classification
from tests import tiny


@pytest.fixture(autouse=True)
def _nothing_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_passed", WeakKeyDictionary())


def test_it_passes_a_table(table_contract: Contract) -> None:
    selftest.check(table_contract, build(table_contract, None))


def test_it_passes_lora_in_under_two_seconds(lora_contract: Contract, encoder_folder: Path) -> None:
    model = build(lora_contract, encoder_folder)
    selftest.check(lora_contract, model)
    selftest._passed.clear()
    began = time.process_time()
    selftest.check(lora_contract, model)
    assert time.process_time() - began < 2


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    original = DPOptimizer.__init__

    def broken(self: DPOptimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.max_grad_norm *= 1e3

    patch.setattr(DPOptimizer, "__init__", broken)


def half_the_clip_norm(patch: pytest.MonkeyPatch) -> None:
    original = DPOptimizer.__init__

    def broken(self: DPOptimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.max_grad_norm /= 2

    patch.setattr(DPOptimizer, "__init__", broken)


def batch_mean_loss(patch: pytest.MonkeyPatch) -> None:
    original = classification.per_example_loss
    patch.setattr(
        classification,
        "per_example_loss",
        lambda logits, labels, smoothing: original(logits, labels, smoothing) / len(labels),
    )


def examples_that_mix(patch: pytest.MonkeyPatch) -> None:
    original = classification.per_example_loss

    def broken(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        return original(logits - logits.mean(dim=0), labels, smoothing)

    patch.setattr(classification, "per_example_loss", broken)


def a_padding_row_counted(patch: pytest.MonkeyPatch) -> None:
    original = dp_optimizer.private_gradient

    def broken(linears: Any, optimizer: Any, groups: Any, losses: Any, **how: Any) -> None:
        more = [
            Group(units + 1, [UnitBatch(torch.cat([p.rows, p.rows[:1]]), p.n + 1) for p in parts])
            for units, parts in groups
        ]
        original(linears, optimizer, more, losses, **how)

    patch.setattr(selftest, "private_gradient", broken)


def not_finite_gradients_kept(patch: pytest.MonkeyPatch) -> None:
    def broken(self: DPOptimizer) -> None:
        norms = torch.cat([p.grad_sample.flatten(1) for p in self.params], dim=1).norm(dim=1)
        factors = (self.effective_clip_norm / norms).clamp(max=1.0) / self.unit
        for p in self.params:
            p.summed_grad += torch.einsum("i,i...", factors, p.grad_sample).round()

    patch.setattr(DPOptimizer, "clip_and_accumulate", broken)


def a_sum_of_floats(patch: pytest.MonkeyPatch) -> None:
    def broken(self: DPOptimizer) -> None:
        grads = torch.cat([p.grad_sample.flatten(1) for p in self.params], dim=1)
        factors = torch.where(
            grads.norm(dim=1).isfinite(),
            (self.effective_clip_norm / grads.norm(dim=1)).clamp(max=1.0),
            0.0,
        )
        for p in self.params:
            counted = p.grad_sample.nan_to_num(0, 0, 0)
            p.summed_grad += torch.einsum("i,i...", factors, counted) / self.unit

    patch.setattr(DPOptimizer, "clip_and_accumulate", broken)


def a_block_clipped_in_part(patch: pytest.MonkeyPatch) -> None:
    original = DPOptimizer.clip_and_accumulate

    def broken(self: DPOptimizer) -> None:
        rest = [p.grad_sample[16:].clone() for p in self.params]
        for p in self.params:
            p.grad_sample = p.grad_sample[:16]
        original(self)
        for p, gradient in zip(self.params, rest, strict=True):
            p.summed_grad += (gradient.double() / self.unit).round().sum(dim=0)

    patch.setattr(DPOptimizer, "clip_and_accumulate", broken)


def the_last_block_alone(patch: pytest.MonkeyPatch) -> None:
    original = DPOptimizer.clip_and_accumulate

    def broken(self: DPOptimizer) -> None:
        for p in self.params:
            p.summed_grad = torch.zeros_like(p.summed_grad)
        original(self)

    patch.setattr(DPOptimizer, "clip_and_accumulate", broken)


def no_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NoiseSource, "normal", lambda self, shape: np.zeros(shape))


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    original = NoiseSource.normal
    patch.setattr(NoiseSource, "normal", lambda self, shape: original(self, shape) / 2)


def overflows_that_count_as_one(patch: pytest.MonkeyPatch) -> None:
    original = DPOptimizer.clip_and_accumulate

    def broken(self: DPOptimizer) -> None:
        for p in self.params:
            p.grad_sample.nan_to_num_(1.0, 1.0, 1.0)
        original(self)

    patch.setattr(DPOptimizer, "clip_and_accumulate", broken)


@pytest.mark.parametrize(
    "mutation",
    [
        not_finite_gradients_kept,
        a_sum_of_floats,
        a_block_clipped_in_part,
        the_last_block_alone,
        no_noise,
        half_the_noise,
        no_clipping,
        half_the_clip_norm,
        batch_mean_loss,
        examples_that_mix,
        a_padding_row_counted,
        overflows_that_count_as_one,
    ],
    ids=lambda m: m.__name__,
)
def test_a_broken_step_is_refused(
    table_contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
    mutation: Callable[[pytest.MonkeyPatch], None],
) -> None:
    mutation(monkeypatch)
    with pytest.raises(RefusalError) as refusal:
        selftest.check(table_contract, build(table_contract, None))
    assert refusal.value.code == "E208"


@pytest.mark.parametrize("unit", ["record", "entity"])
def test_blocks_are_added_up_where_one_would_hold_all_rows(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = tiny.contract_of("tokens", "bert", unit=unit)
    model = build(
        contract, tiny.folder_of("bert"), Performance(micro_batch=64, device="cpu", bf16="off")
    )
    selftest.check(contract, model)
    selftest._passed.clear()
    the_last_block_alone(monkeypatch)
    with pytest.raises(RefusalError, match="self-test"):
        selftest.check(contract, model)


def test_a_worker_does_not_start_with_a_broken_engine(
    table_contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    make_worker: Callable[..., Worker],
) -> None:
    no_clipping(monkeypatch)
    with pytest.raises(RefusalError, match="self-test"):
        make_worker(table_contract, write_rows(tmp_path / "rows.csv", 50))


def test_frozen_layers_that_mix_records_are_refused(
    lora_contract: Contract, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rounding by a record's place in its block, before anything is trained."""
    original, model = Encoder._pooled, build(lora_contract, encoder_folder)

    def broken(self: Encoder, hidden: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(len(hidden), dtype=torch.float32)[:, None]
        return original(self, hidden, mask) * (1 + 1e-6 * places)

    monkeypatch.setattr(Encoder, "_pooled", broken)
    with pytest.raises(RefusalError, match="frozen layers") as refused:
        selftest.check(lora_contract, model)
    assert refused.value.code == "E208"


# The model is the one that transformers makes of its files


def language(kind: str, window: int | None = None, **more: Any) -> tuple[Contract, Any]:
    folder = tiny.folder_of(kind, window=window)
    contract = tiny.contract_of("language", kind, folder, **more)
    return contract, build(contract, folder, Performance(device="cpu", bf16="off"))


@pytest.mark.parametrize(
    ("kind", "window"),
    [
        ("llama", None),
        ("qwen2", None),
        ("mistral", None),
        ("mistral", 32),
        ("mistral", 64),
    ],
)
def test_a_model_that_equals_transformers_forward_pass_is_accepted(
    kind: str, window: int | None
) -> None:
    selftest.check(*language(kind, window))


@pytest.mark.parametrize("bf16", ["off", "on"])
@pytest.mark.parametrize("window", [9, 24])
def test_a_sliding_window_shorter_than_the_text_is_refused(window: int, bf16: str) -> None:
    """Our layers know no window: such a model was trained on, 8 % off what it is. A window that the
    shorter of two text lengths does not reach is found by the longer one."""
    folder = tiny.folder_of("mistral", window=window)
    contract = tiny.contract_of("language", "mistral", folder)
    model = build(contract, folder, Performance(device="cpu", bf16=bf16))  # type: ignore[arg-type]
    with pytest.raises(RefusalError, match="off transformers' own forward pass") as refused:
        selftest.check(contract, model)
    assert refused.value.code == "E208"
    assert "for texts of 32 tokens" in str(refused.value)
    fits = contract.changed(model={"max_tokens": 8})  # as the message advises
    assert fits.model.max_tokens == 8  # type: ignore[union-attr]
    selftest.check(fits, build(fits, folder, Performance(device="cpu", bf16=bf16)))  # type: ignore[arg-type]


def test_the_model_is_compared_without_privacy_too() -> None:
    contract, model = language("mistral", 9)
    plain = contract.changed(privacy={"mode": "none"})
    with pytest.raises(RefusalError, match="forward pass"):
        selftest.check(plain, model)


def test_a_worker_tests_its_model_without_privacy_too(
    table_contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    make_worker: Callable[..., Worker],
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        selftest, "check", lambda contract, model: seen.append(contract.privacy.mode)
    )
    plain = table_contract.changed(privacy={"mode": "none"})
    make_worker(plain, write_rows(tmp_path / "rows.csv", 50))
    assert seen == ["none"]


def masks_ignored(patch: pytest.MonkeyPatch) -> None:
    """Padding that is looked at: seen only where a neighbour is longer."""
    original = Bert.around
    patch.setattr(Bert, "around", lambda self, mask: original(self, torch.ones_like(mask)))


def another_activation(patch: pytest.MonkeyPatch) -> None:
    original = Bert.through

    def broken(self: Bert, layer: Any, hidden: Tensor, around: Any) -> Tensor:
        return original(self, layer, hidden, around) * (1 + 1e-3)

    patch.setattr(Bert, "through", broken)


def positions_one_off(patch: pytest.MonkeyPatch) -> None:
    original = Bert.embed
    patch.setattr(Bert, "embed", lambda self, ids: original(self, ids).roll(1, dims=1))


@pytest.mark.parametrize(
    "mutation", [masks_ignored, another_activation, positions_one_off], ids=lambda m: m.__name__
)
def test_layers_that_compute_something_else_are_refused(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = tiny.contract_of("classification", "bert")
    model = build(
        contract, tiny.folder_of("bert"), Performance(device="cpu", bf16="off", micro_batch=8)
    )
    mutation(monkeypatch)
    with pytest.raises(RefusalError, match="self-test of the model"):
        selftest.check(contract, model)


def test_the_stock_attention_is_put_back() -> None:
    """It is set in a copy: other threads of the process train on the same base."""
    _, model = language("llama")
    before = model.backbone.base.config._attn_implementation
    assert model.forward_error((32, 16), bf16=False) < 1e-5
    assert model.backbone.base.config._attn_implementation == before != "eager"


# The same bits, whatever lies beside


def beside_padding(hidden: Tensor, mask: Tensor) -> Tensor:
    """transformers chooses another path for all rows where one of them is padded."""
    return hidden if bool(mask.all()) else hidden * (1 + 1e-6)


def beside_shorter_rows(hidden: Tensor, mask: Tensor) -> Tensor:
    """A rounding that follows the mean length of a block."""
    return hidden * (1 + 1e-5 * float(mask.float().mean()))


def at_long_texts_alone(hidden: Tensor, mask: Tensor) -> Tensor:
    """A rounding by place, in blocks of the widest kind."""
    places = torch.arange(len(hidden), dtype=torch.float32)[:, None, None]
    return hidden * (1 + 1e-6 * places) if hidden.shape[1] > 48 else hidden


@pytest.mark.parametrize("part", ["lower", "upper"])
@pytest.mark.parametrize(
    "depends", [beside_padding, beside_shorter_rows, at_long_texts_alone], ids=lambda d: d.__name__
)
def test_a_row_that_depends_on_those_beside_it_is_refused(
    depends: Callable[[Tensor, Tensor], Tensor], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = tiny.contract_of("tokens", "bert").changed(model={"max_tokens": 64})
    model = build(
        contract, tiny.folder_of("bert"), Performance(device="cpu", bf16="off", micro_batch=8)
    )
    assert isinstance(model, Encoder)
    selftest.check(contract, model)
    selftest._passed.clear()
    if part == "upper":
        upper = Encoder._upper

        def broken(self: Encoder, *args: Any) -> tuple[Tensor, Tensor]:
            states, mask = upper(self, *args)
            return depends(states, mask), mask

        monkeypatch.setattr(Encoder, "_upper", broken)
    else:
        lower = Encoder._lower

        def changed(self: Encoder, *args: Any) -> Any:
            for block in lower(self, *args):
                yield block._replace(hidden=depends(block.hidden, block.mask))

        monkeypatch.setattr(Encoder, "_lower", changed)
    with pytest.raises(RefusalError, match="depend") as refused:
        selftest.check(contract, model)
    assert refused.value.code == "E208"


def test_texts_of_the_contracts_longest_are_among_the_made_up_rows() -> None:
    for task in ("classification", "tokens", "bi", "cross"):
        contract = tiny.contract_of(task, "bert").changed(model={"max_tokens": 64})
        model = build(contract, tiny.folder_of("bert"), Performance(device="cpu", bf16="off"))
        inputs, targets = selftest._rows(contract, model)
        lengths = model.encode(inputs).lengths(torch.arange(selftest.ROWS)).tolist()
        assert len(targets) == len(lengths) == selftest.ROWS
        assert max(lengths) == 64
        assert 48 < sorted(lengths)[-2] < 64  # padded beside the longest, in one block with it


def test_a_model_with_fewer_positions_than_the_texts_is_refused() -> None:
    """Before, it failed in the middle of a text."""
    contract = tiny.contract_of("classification", "bert").changed(model={"max_tokens": 80})
    with pytest.raises(DataError, match="made for at most 64") as refused:
        build(contract, tiny.folder_of("bert"))
    assert refused.value.code == "E310"
