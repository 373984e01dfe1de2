"""The real encoder: what is cut, cached and adapted equals the whole, row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from silotune.client.training.per_sample_gradients import by_expanding
from silotune.common.contract.contract import Contract
from silotune.common.errors import DataError
from silotune.common.models.base import Encoded
from silotune.common.models.encoder import Encoder
from silotune.common.models.factory import build
from silotune.common.tasks.classification import per_example_loss

pytestmark = pytest.mark.download

TEXTS = [" ".join(["pain in the chest"] * (1 + k % 6)) for k in range(37)]


@pytest.fixture
def encoder(lora_contract: Contract, encoder_folder: Path) -> Encoder:
    found = build(lora_contract, encoder_folder)
    assert isinstance(found, Encoder)
    return found


def of_records(encoded: Encoded) -> torch.Tensor:
    """The features of each record's text."""
    return encoded.features[encoded.texts[:, 0]]


def trained(encoder: Encoder, seed: int = 0) -> None:
    """Load an adapter that is not zero."""
    rng = np.random.default_rng(seed)
    encoder.load(
        {
            name: a if name.endswith("lora_A") else rng.normal(0, 0.05, a.shape).astype(np.float32)
            for name, a in encoder.initial_arrays().items()
        }
    )


def test_features_equal_the_librarys_mean_pooling(encoder: Encoder, encoder_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder, local_files_only=True)
    whole = AutoModel.from_pretrained(encoder_folder, local_files_only=True).eval()
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        hidden = whole(**tokens).last_hidden_state
    weights = tokens["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
    # bfloat16 has 8 bits of mantissa; six layers of it stay within a few of its steps.
    torch.testing.assert_close(
        of_records(encoder.encode(TEXTS)), expected, rtol=0, atol=0.01 if encoder.bf16 else 1e-5
    )


def test_with_the_adapter_at_zero_both_paths_agree(encoder: Encoder) -> None:
    encoder.load(encoder.initial_arrays())
    encoded = encoder.encode(TEXTS)
    index = torch.arange(len(TEXTS))
    for block, n in encoder.micro_batches(encoded, index, adapter=True):
        found = encoder.features(encoded, block, adapter=True)[:n]
        torch.testing.assert_close(found, of_records(encoded)[block[:n]], rtol=0, atol=5e-3)


def test_a_rows_encoding_does_not_see_its_companions(encoder: Encoder) -> None:
    whole = encoder.encode(TEXTS)
    assert whole.hidden is not None
    assert whole.starts is not None
    for left_out in (0, 5, 36):
        rest = [t for k, t in enumerate(TEXTS) if k != left_out]
        fewer = encoder.encode(rest)
        assert fewer.hidden is not None
        assert fewer.starts is not None
        kept = torch.tensor([k for k in range(len(TEXTS)) if k != left_out])
        assert torch.equal(of_records(fewer), of_records(whole)[kept])
        for row, k in enumerate(kept.tolist()):
            (here,), (there,) = fewer.texts[row].tolist(), whole.texts[k].tolist()
            assert torch.equal(
                fewer.hidden[fewer.starts[here] : fewer.starts[here + 1]],
                whole.hidden[whole.starts[there] : whole.starts[there + 1]],
            )


def test_a_records_gradient_does_not_see_its_companions(encoder: Encoder) -> None:
    """Bit by bit, bfloat16 or not: else leaving one record out would move the others' gradients."""
    trained(encoder)
    encoded = encoder.encode(TEXTS)
    labels = torch.arange(len(TEXTS)) % 2

    def losses(index: torch.Tensor) -> torch.Tensor:
        return per_example_loss(encoder(encoded, index, adapter=True), labels[index])

    def gradients(index: torch.Tensor) -> dict[int, torch.Tensor]:
        found = {}
        linears = encoder.trained_modules({"head", "adapter"})
        for block, n in encoder.micro_batches(encoded, index, adapter=True):
            parts = by_expanding(linears, block, losses).values()
            flat = torch.cat([g.flatten(1) for g in parts], dim=1)
            found.update({int(block[i]): flat[i] for i in range(n)})
        return found

    everybody = gradients(torch.arange(len(TEXTS)))
    assert len(everybody) == len(TEXTS)
    for left_out in (0, 5, 36):
        rest = torch.tensor([k for k in range(len(TEXTS)) if k != left_out])
        for k, gradient in gradients(rest).items():
            assert torch.equal(gradient, everybody[k])


def test_per_example_gradients_equal_a_loop_on_the_real_model(encoder: Encoder) -> None:
    trained(encoder)
    encoded = encoder.encode(TEXTS)
    labels = torch.arange(len(TEXTS)) % 2

    def losses(index: torch.Tensor) -> torch.Tensor:
        return per_example_loss(encoder(encoded, index, adapter=True), labels[index])

    linears = encoder.trained_modules({"head", "adapter"})
    block, n = next(encoder.micro_batches(encoded, torch.arange(37), adapter=True))
    found = by_expanding(linears, block, losses)
    parameters = [p for linear in linears for p in linear.parameters()]
    for i in range(0, n, 3):
        # The same batch, all but one loss left out: autograd's own gradient of one record.
        loop = torch.autograd.grad(losses(block)[i], parameters)
        for p, g in zip(parameters, loop, strict=True):
            scale = float(g.abs().max()) or 1.0
            # Two bfloat16 roundings of the backward products; exact to 1e-5 in float32.
            atol = scale * (0.03 if encoder.bf16 else 1e-5)
            torch.testing.assert_close(found[p][i], g, rtol=0, atol=atol)


def test_the_initial_adapter_changes_nothing_and_a_is_orthonormal(encoder: Encoder) -> None:
    for name, array in encoder.initial_arrays().items():
        if name.endswith("lora_A"):
            np.testing.assert_allclose(array @ array.T, np.eye(len(array)), atol=1e-6)
        else:
            assert not array.any()


def test_only_head_and_b_are_trained(encoder: Encoder) -> None:
    wanted = {p for p in encoder.parameters() if p.requires_grad}
    assert wanted == {
        p for linear in encoder.trained_modules({"head", "adapter"}) for p in linear.parameters()
    }


def test_another_model_is_refused(lora_contract: Contract, encoder_folder: Path) -> None:
    with pytest.raises(DataError, match="SHA-256") as error:
        build(lora_contract.changed(model={"sha256": "0" * 64}), encoder_folder)
    assert error.value.code == "E305"
    with pytest.raises(DataError, match="does not exist") as error:
        build(lora_contract, encoder_folder / "nowhere")
    assert error.value.code == "E301"


def test_the_base_is_loaded_once(
    lora_contract: Contract, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests' models may have pushed out the base of one that was built before.
    monkeypatch.setattr("silotune.common.models.factory._built", {})
    first = build(lora_contract, encoder_folder)
    again = build(lora_contract.changed(sites=[{"name": "x"}], quorum=1), encoder_folder)
    other = build(lora_contract.changed(adapter={"rank": 4}), encoder_folder)
    assert isinstance(first, Encoder)
    assert isinstance(other, Encoder)
    assert again is first
    assert other is not first
    assert other._shared[0] is first._shared[0]
    base = {p.data_ptr() for p in first.backbone.base.parameters()}
    frozen = [
        {p.data_ptr() for p in model.parameters()}
        - {p.data_ptr() for p in model.named_tensors().values()}
        for model in (first, other)
    ]
    assert frozen[0] == frozen[1]  # nor are there two of what the adapter is put into
    assert frozen[0] <= base  # they are the base's own, in this process's memory
