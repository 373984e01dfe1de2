"""What a contract puts into the frozen layers: LoRA by PEFT, and the methods beside it.

A trained part reads its parameters by `own`, so that every example of a block can have a view of
its own (client/training/per_sample_gradients.py): its per-example gradients are then exact. Methods
whose parameters act on several examples at once, or that are drawn from the data, are not here.

Shapes: n examples, T tokens, H hidden size, P virtual tokens, h heads of size d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from silotune.common.contract.adapter import IA3, Adapter, Core, Lora, Prefix, Prompt
from silotune.common.errors import DataError, did_you_mean
from silotune.common.models.aligned_linear import ALIGNED
from silotune.common.models.attention import fuse_lora
from silotune.common.protocol.messages import Arrays
from silotune.common.protocol.tensors import orthonormal

STD = 0.02  # of the first virtual tokens


class PerExampleModule(nn.Module):
    """Parameters that are not a Linear's."""

    def per_example(self, name: str, n: int) -> Tensor:
        """The parameter for n examples, [n, ...]: their views if they have some."""
        views: dict[str, Tensor] | None = self.__dict__.get("expanded")
        parameter: Tensor = getattr(self, name)
        return parameter.expand(n, *parameter.shape) if views is None else views[name]


class IA3Linear(PerExampleModule):
    """IA3 (arXiv 2205.05638): a Linear's outputs times 1 + `ia3` [out]; 0 changes nothing."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.ia3 = nn.Parameter(torch.zeros(base.out_features, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return out + out * self.per_example("ia3", len(x))[:, None, :]


class FrozenFactors(nn.Module):
    """Frozen factors: `down` [r, in], `up` [out, r]."""

    def __init__(self, rank: int, base: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, base.in_features), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank), requires_grad=False)


class LoraXsLinear(PerExampleModule):
    """A Linear's outputs plus scale * up core down x; `core` [r, r] is zero at first."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base, scale
        self.ends = FrozenFactors(rank, base).to(base.weight.device)
        self.core = nn.Parameter(torch.zeros(rank, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        # Filled up with zeros, or roundings would depend on a row's place
        # (common/models/aligned_linear.py).
        core, fill = self.per_example("core", len(x)), -len(self.core) % ALIGNED
        core = nn.functional.pad(core, (0, fill, 0, fill))
        low = nn.functional.linear(x, nn.functional.pad(self.ends.down, (0, 0, 0, fill)))
        middle = torch.matmul(low, core.transpose(1, 2).to(low.dtype))
        out: Tensor = self.base_layer(x)
        up = nn.functional.pad(self.ends.up, (0, fill))
        return out + self.scale * nn.functional.linear(middle, up)

    @torch.no_grad()
    def singular(self) -> tuple[np.ndarray, np.ndarray]:
        """down and up: the base weight's first singular vectors."""
        u, _, v = np.linalg.svd(self.base_layer.weight.double().numpy(force=True))
        rank = len(self.core)
        return v[:rank].astype(np.float32), u[:, :rank].astype(np.float32)


class ResidualLinear(nn.Module):
    """A frozen Linear and what is added to its weight: `residual` [out, in], zero at first, which
    the server sets (FedEx-LoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.residual = nn.Parameter(torch.zeros_like(base.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.base.weight + self.residual, self.base.bias)


class VirtualKeys(PerExampleModule):
    """Prefix tuning (arXiv 2101.00190): P more keys and values [P, H] for a layer's attention."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.zeros(length, size))
        self.value = nn.Parameter(torch.zeros(length, size))

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values [n, h, T, d] with the virtual ones before them: [n, h, P + T, d]."""
        n, heads, _, size = key.shape
        return tuple(  # type: ignore[return-value]
            torch.cat(
                [
                    self.per_example(name, n)
                    .view(n, -1, heads, size)
                    .transpose(1, 2)
                    .to(found.dtype),
                    found,
                ],
                dim=2,
            )
            for name, found in (("key", key), ("value", value))
        )


class VirtualTokens(PerExampleModule):
    """Prompt tuning (arXiv 2104.08691): P tokens [P, H] before the input of the first adapted
    layer, which is the embeddings' output where all layers are adapted."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(length, size))

    def before(self, hidden: Tensor) -> Tensor:
        """hidden [n, T, H] -> [n, P + T, H]"""
        return torch.cat([self.per_example("tokens", len(hidden)).to(hidden.dtype), hidden], dim=1)


def inject(adapter: Adapter, top: nn.ModuleList, size: int) -> VirtualTokens | None:
    """Put the contract's adapter into the layers; what stands before them is returned. DataError
    E310 if a target is no part of them."""
    if isinstance(adapter, Prompt):
        return VirtualTokens(adapter.length, size)
    if isinstance(adapter, Prefix):
        for module in top.modules():
            if hasattr(module, "is_causal") and hasattr(module, "scaling"):  # attention
                heads = getattr(module, "num_key_value_groups", 1)
                module.add_module("prefix", VirtualKeys(adapter.length, size // heads))
        return None
    linears = {
        name: module for name, module in top.named_modules() if isinstance(module, nn.Linear)
    }
    chosen = targeted(adapter.targets, list(linears))
    _check_rank(adapter, [linears[name] for name in chosen])
    if isinstance(adapter, IA3 | Core):
        for name in chosen:
            place, _, last = name.rpartition(".")
            base = linears[name]
            part = (
                IA3Linear(base)
                if isinstance(adapter, IA3)
                else LoraXsLinear(base, adapter.rank, adapter.alpha / adapter.rank)
            )
            setattr(top.get_submodule(place), last, part)
        return None
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        use_rslora=adapter.kind == "rslora",
        target_modules=list(adapter.targets),
    )
    inject_adapter_in_model(config, top)
    fuse_lora(top)
    return None


def targeted(targets: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Of the names of linear layers those that end in a target, as PEFT chooses them. DataError
    E310 that names each target without a layer: PEFT passes over it in silence."""
    found: dict[str, None] = {}
    unknown = []
    for target in targets:
        own = [name for name in linears if f".{name}".endswith(f".{target}")]
        found |= dict.fromkeys(own)
        unknown += [] if own else [target]
    if unknown:
        known = sorted({name.rsplit(".", 1)[-1] for name in linears})
        hints = "".join(did_you_mean(target, known) for target in unknown)
        raise DataError(
            f"adapter.targets names {', '.join(repr(target) for target in unknown)}, which no "
            f"adapted layer of this model is called.{hints} Known: {', '.join(known)}.",
            code="E310",
        )
    return [name for name in linears if name in found]


def correct(top: nn.Module) -> None:
    """Let the Linears that carry LoRA have a residual."""
    for module in top.modules():
        if isinstance(module, LoraLinear):
            assert isinstance(module.base_layer, nn.Linear)
            module.base_layer = ResidualLinear(module.base_layer)


def _check_rank(adapter: Adapter, linears: Sequence[nn.Linear]) -> None:
    """DataError E310 if a rank is beyond what a layer has."""
    most = min(min(linear.in_features, linear.out_features) for linear in linears)
    if isinstance(adapter, Lora | Core) and adapter.rank > most:
        raise DataError(
            f"adapter.rank = {adapter.rank} is more than the {most} inputs or outputs of a layer "
            "it is for. Lower it, or take that layer out of adapter.targets.",
            code="E310",
        )


def trainable_modules(module: nn.Module) -> list[nn.Module]:
    """The modules whose parameters an adapter trains: LoRA's B, and every Part."""
    return [
        found
        for name, found in module.named_modules()
        if isinstance(found, PerExampleModule) or name.endswith(".lora_B.default")
    ]


def lora_a_modules(module: nn.Module) -> list[nn.Module]:
    """LoRA's A."""
    return [found for name, found in module.named_modules() if name.endswith(".lora_A.default")]


def public_name(name: str) -> str | None:
    """The name of one of the layers' parameters in a message, None for a frozen one."""
    for suffix in (".lora_A.default.weight", ".lora_B.default.weight"):
        if name.endswith(suffix):
            return name.removesuffix(".default.weight")
    if name.endswith(".base_layer.residual"):
        return name.replace(".base_layer.residual", ".residual")
    last = name.rsplit(".", 2)
    return name if last[-1] in ("ia3", "core") or last[-2] in ("prefix", "ends") else None


def begin(arrays: Arrays, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Give the adapter's arrays, all zero, their first values, from the contract's public seed: A
    orthonormal, or as PEFT draws it (B stays zero), virtual tokens small and random (IA3's stay
    zero), a core's ends the base's singular vectors. modules: by the names that their arrays begin
    with."""
    for name, module in modules.items():
        if isinstance(module, LoraXsLinear):
            arrays[f"{name}.ends.down"], arrays[f"{name}.ends.up"] = module.singular()
    rng = np.random.default_rng(adapter.seed)
    for name in sorted(arrays):
        shape: Any = arrays[name].shape
        if name.endswith(".lora_A") and isinstance(adapter, Lora) and adapter.initial == "kaiming":
            most = shape[1] ** -0.5
            arrays[name] = rng.uniform(-most, most, shape).astype(np.float32)
        elif name.endswith(".lora_A"):
            arrays[name] = orthonormal(shape[0], shape[1], rng)
        elif not isinstance(adapter, Lora | IA3 | Core) and not name.startswith("head."):
            arrays[name] = (STD * rng.standard_normal(shape)).astype(np.float32)
