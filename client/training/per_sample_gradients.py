"""How per-example gradients come about: three ways that give the same (common/contract/compute.py).

expanded: each trained module computes every example with its own view of its parameters, and one
backward pass gives the gradient with respect to the views. It works with checkpointing and
bfloat16, and makes no second pass.
hooks: Opacus' hooks (GradSampleHooks), one Linear at a time.
ghost: Opacus' ghost norms (Li, Tramèr, Liang and Hashimoto 2022, arXiv 2110.05679), then a second
backward pass of the losses weighted by what is to be clipped off.

`losses` maps row numbers [n] to losses [n], each a function of its own record only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from silotune.common.models.aligned_linear import pad_for_alignment

Losses = Callable[[Tensor], Tensor]


@contextmanager
def expanded(modules: Iterable[nn.Module], n: int) -> Iterator[dict[Tensor, Tensor]]:
    """Within, each Linear has `.expanded`: (stride-0) views [n, ...] of its weight and bias, by
    which it multiplies every one of n examples; a Part (common/models/adapters.py) has them by
    name.

    Yields parameter -> view, the leaves to differentiate. Inputs are [n, in] or [n, T, in].
    """
    views: dict[Tensor, Tensor] = {}
    modules = list(modules)
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    parts = [module for module in modules if not isinstance(module, nn.Linear)]
    before = [linear.__dict__.get("forward") for linear in linears]

    def view(parameter: Tensor) -> Tensor:
        views[parameter] = parameter.detach()[None].expand(n, *parameter.shape).requires_grad_()
        return views[parameter]

    try:
        for linear in linears:
            bias = None if linear.bias is None else view(linear.bias)
            linear.__dict__["expanded"] = view(linear.weight), bias
            linear.forward = partial(_forward, linear)  # type: ignore[method-assign]
        for part in parts:
            own = part.named_parameters(recurse=False)
            part.__dict__["expanded"] = {name: view(parameter) for name, parameter in own}
        yield views
    finally:
        for part in parts:
            part.__dict__.pop("expanded", None)
        for linear, forward in zip(linears, before, strict=True):
            linear.__dict__.pop("forward", None)
            linear.__dict__.pop("expanded", None)
            if forward is not None:
                linear.forward = forward  # type: ignore[method-assign]


def _forward(linear: Any, x: Tensor) -> Tensor:
    weight, bias = linear.expanded
    rows, weight = pad_for_alignment(x[:, None, :] if x.dim() == 2 else x, weight)
    out = torch.matmul(rows, weight.transpose(1, 2))
    if bias is not None:
        out = out + bias[:, None, :]
    return out[:, 0, :] if x.dim() == 2 else out


def by_expanding(
    modules: Iterable[nn.Module], index: Tensor, losses: Losses
) -> Mapping[Tensor, Tensor]:
    """parameter -> [n, *shape], row i the gradient of the loss of record index[i] alone."""
    with expanded(modules, len(index)) as views:
        gradients = torch.autograd.grad(losses(index).sum(), list(views.values()))
    return dict(zip(views, gradients, strict=True))


def by_hooks(
    modules: Iterable[nn.Module], index: Tensor, losses: Losses
) -> Mapping[Tensor, Tensor]:
    """The same, by Opacus."""
    with _hooked(GradSampleHooks, modules) as (parameters, _):
        losses(index).sum().backward()  # type: ignore[no-untyped-call]
        return {p: p.grad_sample for p in parameters}  # type: ignore[attr-defined]


PER_EXAMPLE = {"expanded": by_expanding, "hooks": by_hooks}


def ghost_sum(
    modules: Iterable[nn.Module], index: Tensor, n: int, losses: Losses, clip_norm: float
) -> tuple[Tensor, Mapping[Tensor, Tensor]]:
    """Norms [n], and parameter -> sum of the first n examples' clipped gradients. The rows after
    the first n must repeat one of them.

    The norms come from float32 products of products: where an example's gradient is small beside
    the terms that cancel in it they can be far off, and with them what is clipped. No test bounds
    that for weights of a server's choosing, which is why a site's owner must allow it.
    """
    modules = list(modules)
    with _hooked(GradSampleHooksFastGradientClipping, modules) as (parameters, watching):
        values = losses(index)
        values.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        found = [p._norm_sample for p in parameters]  # type: ignore[attr-defined]
        norms = torch.stack(found).norm(dim=0)[:n]
        finite = torch.isfinite(norms)
        if bool(finite.all()):
            for hooks in watching:
                hooks.disable_hooks()
            for parameter in parameters:
                parameter.grad = None
            factors = (clip_norm / norms).clamp(max=1.0)
            (values[:n] * factors).sum().backward()
            return norms, {p: p.grad for p in parameters if p.grad is not None}
    # One that overflows would spoil the sum of all: it is left out, as in
    # client/training/dp_optimizer.py.
    good = index[:n][finite.to(index.device)]
    if not len(good):
        return norms, {p: torch.zeros_like(p) for p in parameters}
    filled = torch.cat([good, good[:1].expand(len(index) - len(good))])
    return ghost_sum(modules, filled, len(good), losses, clip_norm)


@contextmanager
def _hooked(
    kind: Any, modules: Iterable[nn.Module]
) -> Iterator[tuple[list[nn.Parameter], list[Any]]]:
    """Within, Opacus' hooks of `kind` watch each Linear; yields their parameters, and the hooks.
    ValueError for other modules."""
    modules = list(modules)
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if len(linears) < len(modules):
        raise ValueError("Opacus' hooks have gradients of Linear layers alone")
    parameters = [p for linear in linears for p in linear.parameters()]
    watching: list[Any] = []
    training = [linear.training for linear in linears]
    with warnings.catch_warnings():
        # A first layer's input needs no gradient, of which torch warns; Opacus needs none there.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        try:
            for linear in linears:
                linear.train()  # Opacus passes over modules in evaluation; a Linear is the same
                watching.append(kind(linear, loss_reduction="sum"))
            yield parameters, watching
        finally:
            for hooks in watching:
                hooks.remove_hooks()
            for linear, was in zip(linears, training, strict=True):
                linear.train(was)
                for name in ("activations", "max_batch_len"):
                    linear.__dict__.pop(name, None)
            for parameter in parameters:
                parameter.grad = None
                for name in ("grad_sample", "_norm_sample", "_forward_counter"):
                    parameter.__dict__.pop(name, None)
