"""The cheap layers against what they stand for: eager attention, PEFT's LoRA, the stock encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, BertTokenizer
from transformers.models.llama.modeling_llama import eager_attention_forward

from silotune.client.training.per_sample_gradients import expanded
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.model_files import model_folder
from silotune.common.models import attention as layers
from silotune.common.models.attention import attention, fuse_lora, register_attention
from silotune.common.models.encoder import Encoder

LENGTHS = [13, 1, 6]  # of 13 tokens: no multiple of anything
N, T, HEADS, SIZE = len(LENGTHS), max(LENGTHS), 4, 6


def tensors(groups: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as a layer makes them: head beside head, and so not contiguous."""
    g = torch.Generator().manual_seed(seed)
    found = [
        torch.randn(N, T, heads, SIZE, generator=g).to(dtype).transpose(1, 2)
        for heads in (HEADS, HEADS // groups, HEADS // groups)
    ]
    return found[0], found[1], found[2]


def mask_of(kind: str, dtype: torch.dtype) -> Tensor | None:
    """Added to the scores: [n, 1, 1, T] hides padding, [n, 1, T, T] also what comes later."""
    if kind == "none":
        return None
    real = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    seen = real[:, None, None, :]
    if kind == "causal":
        seen = seen & torch.ones(T, T, dtype=torch.bool).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class Stock(nn.Module):
    """What transformers' eager attention reads of a layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    module = Stock(query.shape[1] // key.shape[1]).eval()
    out: Tensor = eager_attention_forward(module, query, key, value, mask, scaling)[0]
    return out


def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return attention(nn.Module(), query, key, value, mask, scaling)[0]


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def both_ways(
    attend: Attend,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    wanted: str = "qkv",
    scaling: float = 0.3,
) -> list[Tensor]:
    """The output, and the gradients with respect to those of q, k and v that are wanted."""
    leaves = [x.detach().requires_grad_(c in wanted) for x, c in zip(inputs, "qkv", strict=True)]
    out = attend(leaves[0], leaves[1], leaves[2], mask, scaling)
    assert out.shape == (N, T, HEADS, SIZE)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    found = torch.autograd.grad((out * weights).sum(), [x for x in leaves if x.requires_grad])
    return [out.detach(), *found]


WANTED = ["qkv", "q", "k", "v", "qk", "qv", "kv"]


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("kind", ["none", "padding", "causal"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_equals_eager_attention(groups: int, kind: str, wanted: str) -> None:
    """In float32, forward and back: sums of 13 terms, 24 bits."""
    inputs, mask = tensors(groups, torch.float32), mask_of(kind, torch.float32)
    expected = both_ways(eager, inputs, mask, wanted)
    assert len(expected) == 1 + len(wanted)
    for a, b in zip(both_ways(ours, inputs, mask, wanted), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_the_scale_is_by_the_size_if_none_is_given() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        q, k, v = tensors(1, dtype)
        expected = ours(q, k, v, None, SIZE**-0.5)
        found = attention(nn.Module(), q, k, v, None)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("kind", ["none", "padding", "causal"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_explicit_products_have_the_right_derivatives(
    groups: int, kind: str, wanted: str
) -> None:
    """The form for bfloat16 on a CPU, in float64 against differences."""
    mask = mask_of(kind, torch.float64)
    inputs = [
        x.double()
        .repeat_interleave(groups if c != "q" else 1, 1)[:, :2, :7]
        .requires_grad_(c in wanted)
        for x, c in zip(tensors(groups, torch.float32), "qkv", strict=True)
    ]
    if mask is not None:
        mask = mask[:, :, :7, :7]
    assert torch.autograd.gradcheck(
        lambda q, k, v: layers._Explicit.apply(q, k, v, mask),  # type: ignore[no-untyped-call]
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["qkv", "q", "v"])
@pytest.mark.parametrize("kind", ["none", "padding", "causal"])
@pytest.mark.parametrize("groups", [1, 2])
def test_in_bfloat16_it_is_as_good_as_eager_attention(
    groups: int, kind: str, wanted: str, mask_dtype: torch.dtype
) -> None:
    """Against float64. bfloat16 keeps 8 bits, so that a number is off by 0.0011 of itself in the
    root mean square; scores, weights, the output and each gradient are products of numbers that
    have been rounded two to five times: 0.0013 to 0.0045 of the root mean square was seen, which
    is 0.88 to 1.11 times what the stock layer is off by. 0.01 is allowed, and 1.5 times.
    """
    inputs = tensors(groups, torch.bfloat16)
    q, k, v = (x.double() for x in inputs)
    exact = both_ways(eager_float64, (q, k, v), mask_of(kind, torch.float64), wanted)
    stock = both_ways(eager, inputs, mask_of(kind, torch.bfloat16), wanted)
    found = both_ways(ours, inputs, mask_of(kind, mask_dtype), wanted)
    for a, b, right in zip(found, stock, exact, strict=True):
        assert a.dtype == torch.bfloat16
        scale = right.square().mean().sqrt()
        mine, other = (((x.double() - right).square().mean().sqrt() / scale) for x in (a, b))
        assert float(mine) < 0.01
        assert float(mine) < 1.5 * float(other)


def eager_float64(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """The stock layer takes its softmax in float32."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(2, 3) * scaling
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    return (weights @ value).transpose(1, 2)


def test_under_autocast_it_gives_the_same_bits() -> None:
    """Autocast would take the softmax to float32, and its weights would not fit the products."""
    inputs, mask = tensors(1, torch.bfloat16), mask_of("padding", torch.float32)
    expected = both_ways(ours, inputs, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = both_ways(ours, inputs, mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["padding", "causal"])
def test_what_is_masked_is_not_seen(dtype: torch.dtype, kind: str) -> None:
    """Not by a bit: neither padding's keys nor its values, and no gradient reaches them."""
    q, k, v = tensors(2, dtype)
    mask = mask_of(kind, torch.float32)
    expected = both_ways(ours, (q, k, v), mask)
    k2, v2 = k.clone(), v.clone()
    for row, length in enumerate(LENGTHS):
        k2[row, :, length:], v2[row, :, length:] = 77.0, -55.0
    found = both_ways(ours, (q, k2, v2), mask)
    assert torch.equal(found[0], expected[0])
    for row, length in enumerate(LENGTHS):
        assert not bool(found[2][row, :, length:].any())
        assert not bool(found[3][row, :, length:].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_see_its_companions(dtype: torch.dtype) -> None:
    """Within a batch of one size: to the bit."""
    inputs, mask = tensors(1, dtype), mask_of("padding", dtype)
    assert mask is not None
    expected = both_ways(ours, inputs, mask)
    other = tensors(1, dtype, seed=5)
    for x, y in zip(inputs, other, strict=True):
        x[1:] = y[1:]
    found = both_ways(ours, inputs, mask)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0][1], expected[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_inputs_are_not_changed(dtype: torch.dtype) -> None:
    inputs, mask = tensors(1, dtype), mask_of("padding", dtype)
    assert mask is not None
    before = [x.clone() for x in (*inputs, mask)]
    contiguous = tuple(x.contiguous() for x in inputs)  # of which a reshape would be a view
    both_ways(ours, (contiguous[0], contiguous[1], contiguous[2]), mask)
    assert all(torch.equal(a, b) for a, b in zip((*contiguous, mask), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_seen_may_be_said_in_other_ways(dtype: torch.dtype, groups: int) -> None:
    """A boolean mask is the same as an added one; a causal module without a mask sees the past."""
    inputs = tensors(groups, dtype)
    rtol, atol = (0.02, 0.02) if dtype == torch.bfloat16 else (1e-5, 2e-6)
    for kind in ("padding", "causal"):
        mask = mask_of(kind, torch.float32)
        assert mask is not None
        for a, b in zip(
            both_ways(ours, inputs, mask == 0), both_ways(ours, inputs, mask), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    past = torch.zeros(T, T).masked_fill(torch.ones(T, T).tril() == 0, -1e30)[None, None]

    def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        module = nn.Module()
        module.is_causal = True  # type: ignore[assignment]
        return attention(module, q, k, v, mask, scaling)[0]

    expected = both_ways(ours, inputs, past.expand(N, 1, T, T))
    for a, b in zip(both_ways(causal, inputs, None), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_dropout_is_refused() -> None:
    q, k, v = tensors(1, torch.float32)
    with pytest.raises(ValueError, match="no dropout"):
        attention(nn.Module(), q, k, v, None, dropout=0.1)


# --- LoRA --------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two Linears with LoRA, with a bias and without."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4, bias=False)
        inject_adapter_in_model(
            LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down"], **settings), self
        )
        for name, p in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.5)
            p.requires_grad_("lora_" in name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out

    def trained(self, *kinds: str) -> list[nn.Linear]:
        return [
            m
            for name, m in self.named_modules()
            if isinstance(m, nn.Linear) and name.split(".")[-2] in kinds
        ]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1))


SETTINGS: list[dict[str, Any]] = [{}, {"use_rslora": True}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_fused_lora_equals_pefts(x: Tensor, settings: dict[str, Any]) -> None:
    """Without per-example views it is the same sum, and so the same bits."""
    stock, net = Net(**settings), Net(**settings)
    fuse_lora(net)
    assert torch.equal(net(x), stock(x))
    assert torch.equal(net(x[0]), stock(x[0]))  # of any shape
    for model in (stock, net):
        model(x).square().sum().backward()
    for (name, a), b in zip(net.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == ("lora_" not in name)
        if a.grad is not None:
            assert b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kinds", [("lora_B",), ("lora_A",), ("lora_A", "lora_B")])
def test_fused_lora_with_views_equals_pefts(
    x: Tensor, settings: dict[str, Any], kinds: tuple[str, ...]
) -> None:
    """Outputs, the gradient of the input and each example's own, by PEFT's forward one by one."""
    stock, net = Net(**settings), Net(**settings)
    fuse_lora(net)
    x.requires_grad_()
    expected_x, expected = torch.zeros_like(x), []
    for i in range(len(x)):
        parameters = [m.weight for m in stock.trained(*kinds)]
        found = torch.autograd.grad(stock(x[i : i + 1]).square().sum(), [x, *parameters])
        expected_x += found[0]
        expected.append(found[1:])
    linears = net.trained(*kinds)
    assert len(linears) == 2 * len(kinds)
    with expanded(linears, len(x)) as views:
        out = net(x)
        torch.testing.assert_close(out, stock(x), rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(out.square().sum(), [x, *views.values()])
    torch.testing.assert_close(gradients[0], expected_x, rtol=1e-5, atol=1e-4)
    for found_, wanted in zip(gradients[1:], zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(found_, torch.stack(wanted), rtol=1e-4, atol=1e-4)
    assert torch.equal(net(x), stock(x))  # afterwards all is as before


def test_fused_lora_with_views_under_autocast(x: Tensor) -> None:
    """The adapter's products are rounded once, not twice: no further off than PEFT's own."""
    stock, net = Net(), Net()
    fuse_lora(net)
    exact = stock(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        other = stock(x)
        with expanded(net.trained("lora_B"), len(x)) as views:
            out = net(x)
            gradients = torch.autograd.grad(out.float().square().sum(), list(views.values()))
    assert out.dtype == other.dtype == torch.bfloat16
    assert {g.dtype for g in gradients} == {torch.float32}
    mine, stocks = ((y.detach().float() - exact).norm() / exact.norm() for y in (out, other))
    assert float(mine) < 1.5 * float(stocks) < 0.02


def test_only_lora_is_changed() -> None:
    net = Net()
    plain = nn.Sequential(nn.Linear(3, 3), net)
    fuse_lora(plain)
    assert [name for name, m in plain.named_modules() if "forward" in m.__dict__] == [
        "1.up",
        "1.down",
    ]


# --- the encoder -------------------------------------------------------------------------------

TEXTS = [" ".join(["pain in the chest"] * (1 + k % 4)) for k in range(7)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pain", "in", "the", "chest"]
NAMES = ["query", "key", "value", "dense"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights, as a folder."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


def encoder_of(contract: Contract, folder: Path, **performance: Any) -> Encoder:
    sha256 = model_folder.manifest(folder).sha256
    dump = contract.model_dump(mode="json") | {
        "input": {"kind": "text", "column": "text"},
        "model": {"kind": "encoder", "name": "tiny", "max_tokens": 32, "sha256": sha256},
        "adapter": {"rank": 2, "alpha": 8.0, "layers": 2, "targets": NAMES},
        "phases": [
            {
                "trains": "head+adapter",
                "rounds": 1,
                "sampling_rate": 0.5,
                "head_lr": 0.5,
                "adapter_lr": 0.1,
            }
        ],
    }
    settings = {"bf16": "off", "device": "cpu"} | performance
    encoder = Encoder(Contract.model_validate(dump), folder, Performance(**settings))
    rng = np.random.default_rng(0)
    encoder.load(
        {
            name: a if name.endswith("lora_A") else rng.normal(0, 0.3, a.shape).astype(np.float32)
            for name, a in encoder.initial_arrays().items()
        }
    )
    return encoder


@torch.no_grad()
def stock_features(encoder: Encoder, folder: Path) -> Tensor:
    """The library's model with the same adapter added to its weights, and mean pooling."""
    whole = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    arrays = {n: p.numpy(force=True).copy() for n, p in encoder.named_tensors().items()}
    for name, b in arrays.items():
        if name.endswith(".lora_B"):
            place = name.removesuffix(".lora_B")
            a = arrays[f"{place}.lora_A"]
            whole.get_submodule(place).weight += torch.from_numpy(b @ a) * (8.0 / 2)
    tokens = encoder.backbone.tokenizer(TEXTS, padding=True, return_tensors="pt")
    hidden = whole(**tokens).last_hidden_state
    weights = tokens["attention_mask"][:, :, None]
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize(
    ("performance", "tolerance"),
    [
        ({}, 1e-5),
        ({"checkpointing": True}, 1e-5),
        # Three layers of large random weights in 8 bits, on features of norm 1: 0.004 to 0.055 was
        # seen; with PEFT's own layers and eager attention 0.006 to 0.03.
        ({"bf16": "on"}, 0.1),
    ],
)
def test_the_encoder_equals_the_stock_model(
    folder: Path,
    lora_contract: Contract,
    views: bool,
    performance: dict[str, Any],
    tolerance: float,
) -> None:
    """With attention and LoRA as they are here, below and in the adapted layers."""
    encoder = encoder_of(lora_contract, folder, **performance)
    expected = stock_features(encoder, folder)
    encoded = encoder.encode(TEXTS)
    linears = encoder.trained_modules({"head", "adapter"}) if views else []
    assert len(linears) == (1 + 2 * 6 if views else 0)
    for block, n in encoder.micro_batches(encoded, torch.arange(len(TEXTS)), adapter=True):
        with expanded(linears, len(block)):
            found = encoder.features(encoded, block, adapter=True)[:n].detach()
        error = (found - expected[block[:n]]).norm(dim=1)
        assert float(error.max()) < tolerance
    # It is the adapter that is seen: without it the features are others.
    before = encoded.features[encoded.texts[:, 0]]
    assert float((before - expected).norm(dim=1).min()) > 0.1


def test_the_layers_are_the_encoders(folder: Path, lora_contract: Contract) -> None:
    """Or the test above would compare stock with stock."""
    encoder = encoder_of(lora_contract, folder)
    assert encoder.backbone.base.config._attn_implementation == register_attention()
    assert sum("forward" in m.__dict__ for m in encoder.top.modules()) == 2 * 6
