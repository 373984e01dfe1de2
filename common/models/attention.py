"""Stock layers in other forms: attention and LoRA that cost less where they are differentiated.
Each computes what the stock layer computes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "silotune"  # as attn_implementation


class _Explicit(torch.autograd.Function):
    """softmax(q k^T + mask) v for q [n, heads, T, d] and k, v [n, heads, S, d], each product one
    batched product.

    On a CPU torch's fused attention takes 5 to 8 times as long in bfloat16 (forward and backward,
    T = 64 to 128); in float32 it is the fused one that is faster, by a tenth.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n, heads, length, size = q.shape
        # Copied once: a batched product would copy what does not lie head by head, each time.
        q, k, v = (x.reshape(n * heads, -1, size) for x in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            scores = weights.view(n, heads, length, -1)
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
            else:  # what float32 can hold may be infinite here, and a row of infinities is NaN
                scores.add_(mask.clamp(min=torch.finfo(scores.dtype).min))
        weights = torch.softmax(weights, -1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v).view(n, heads, length, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape = gradients[0].shape
        longer = (*shape[:2], k.shape[1], shape[3])
        out = gradients[0].reshape(q.shape)
        needed = ctx.needs_input_grad
        dv = torch.bmm(weights.transpose(1, 2), out).view(longer) if needed[2] else None
        if not (needed[0] or needed[1]):
            return None, None, dv, None
        scores = torch.bmm(out, v.transpose(1, 2))
        torch._softmax_backward_data(scores, weights, -1, weights.dtype, grad_input=scores)
        dq = torch.bmm(scores, k).view(shape) if needed[0] else None
        dk = torch.bmm(scores.transpose(1, 2), q).view(longer) if needed[1] else None
        return dq, dk, dv, None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [n, heads, T, d] -> [n, T, heads, d]. No dropout.

    attention_mask: added to the scores, or True where one may look; None for all (of the past, if
    the module is causal). A module's virtual keys come first, and everybody may look at them.
    """
    if dropout:
        raise ValueError("this attention has no dropout")
    causal = attention_mask is None and getattr(module, "is_causal", False)
    virtual = getattr(module, "prefix", None)  # common/models/adapters.py
    if virtual is not None:
        length = query.shape[2]
        key, value = virtual.before(key, value)
        more = key.shape[2] - length
        if causal:
            seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            attention_mask, causal = nn.functional.pad(seen, (more, 0), value=True), False
        elif attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (more, 0))
    grouped = key.shape[1] != query.shape[1]
    if query.device.type == "cpu" and (
        query.dtype == torch.bfloat16
        or (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16)
    ):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
        query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if grouped:
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        if causal:
            length = query.shape[2]
            attention_mask = torch.ones(length, length, dtype=torch.bool).tril()
        with torch.autocast("cpu", enabled=False):  # which would take the softmax to float32
            out = _Explicit.apply(query, key, value, attention_mask)  # type: ignore[no-untyped-call]
    else:
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=scaling,
            is_causal=causal,
            enable_gqa=grouped,
        )
    return out.transpose(1, 2), None


def register_attention() -> str:
    """Make `attention` known to transformers; returns its name."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def fuse_lora(model: nn.Module) -> None:
    """Let PEFT's LoRA Linears in `model` add B A x to the base's output within one product, while
    lora_B has per-example views of its weight (client/training/per_sample_gradients.py). Others
    than plain LoRA with one adapter are left as they are.
    """
    for module in model.modules():
        if (
            isinstance(module, LoraLinear)
            and list(module.lora_B) == ["default"]
            and module.lora_B["default"].bias is None
            and isinstance(module.lora_dropout["default"], nn.Identity)
            and not module.lora_variant
        ):
            module.forward = partial(_fused, module)


def _fused(layer: LoraLinear, x: Tensor) -> Tensor:
    """x [n, T, in] -> [n, T, out]."""
    base: Tensor = layer.base_layer(x)
    low = layer.lora_A["default"](x)
    second, scaling = layer.lora_B["default"], layer.scaling["default"]
    views = getattr(second, "expanded", None)
    if views is None:
        out: Tensor = base + second(low) * scaling
        return out
    return torch.baddbmm(base, low, views[0].transpose(1, 2), alpha=scaling)
