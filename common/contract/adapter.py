"""What a contract says of the adapter: which tensors are trained.

Optional settings are None when absent, and what is None is no part of a contract's hash.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from silotune.common.config.types import (
    Count,
    Distinct,
    Frozen,
    Positive,
    kind_or,
)

# The last parts of layers' names, each of which must be the name of some adapted layer.
Targets = Annotated[tuple[str, ...], Field(min_length=1), Distinct]


class Lora(Frozen):
    """LoRA on the top `layers` layers, A orthonormal and frozen (FFA-LoRA, arXiv 2403.12313); with
    initial = "kaiming" as PEFT and the papers draw it: uniform, its rows shorter and not at right
    angles.

    B A x is scaled by alpha / rank; by alpha / sqrt(rank) with kind = "rslora" (arXiv 2312.03732).
    """

    kind: Literal["lora", "rslora"] | None = Field(
        default=None,
        description='"lora" scales B A x by alpha / rank, "rslora" by alpha / sqrt(rank) (arXiv '
        '2312.03732); "lora" if absent.',
    )
    rank: Count = Field(
        default=8, description="Rank r of the low-rank factors A [r, in] and B [out, r]."
    )
    alpha: Positive = Field(
        default=32.0, description="Numerator of the factor by which B A x is scaled."
    )
    layers: Count = Field(
        default=2, description="Number of layers that are adapted, counted from the top."
    )
    targets: Targets = Field(
        description="Last parts of the names of the linear layers that are adapted."
    )
    seed: int = Field(
        default=0, description="Seed of the initial factor A, the same at every site."
    )
    initial: Literal["kaiming"] | None = Field(
        default=None,
        description='Initial A: "kaiming" draws it uniformly as PEFT does; orthonormal rows if '
        "absent.",
    )

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.kind == "rslora" else self.rank)

    @property
    def words(self) -> str:
        name = "rsLoRA" if self.kind == "rslora" else "LoRA"
        return f"{name} r={self.rank}, top {self.layers} layers, A frozen"


class Core(Frozen):
    """LoRA whose factors are both frozen, with a trained core between them: B R A, R [r, r]
    (LoRA-XS, arXiv 2405.17604; federated as Fed-SB, arXiv 2502.15436). A and B are the frozen
    weight's own first singular vectors, which are public. The mean of cores is exact, and r^2
    numbers take less noise than r (in + out).
    """

    kind: Literal["core"] = Field(
        description="LoRA-XS: frozen singular vectors with a trained core between them."
    )
    rank: Count = Field(default=16, description="Rank r of the trained core R [r, r].")
    alpha: Positive = Field(
        default=16.0, description="Numerator of the factor alpha / rank by which B R A x is scaled."
    )
    layers: Count = Field(
        default=2, description="Number of layers that are adapted, counted from the top."
    )
    targets: Targets = Field(
        description="Last parts of the names of the linear layers that are adapted."
    )
    seed: int = Field(
        default=0,
        description="Seed of random initial values; without effect, since none is random here.",
    )

    @property
    def words(self) -> str:
        return f"core of {self.rank} x {self.rank}, top {self.layers} layers, both ends frozen"


class IA3(Frozen):
    """Outputs of the targets, times 1 + a trained vector (arXiv 2205.05638)."""

    kind: Literal["ia3"] = Field(
        description="IA3: the targets' outputs are rescaled by trained vectors."
    )
    layers: Count = Field(
        default=2, description="Number of layers that are adapted, counted from the top."
    )
    targets: Targets = Field(
        description="Last parts of the names of the linear layers that are adapted."
    )
    seed: int = Field(
        default=0,
        description="Seed of random initial values; without effect, since none is random here.",
    )

    @property
    def words(self) -> str:
        return f"IA3, top {self.layers} layers"


class Prefix(Frozen):
    """`length` trained keys and values before those of each adapted layer (arXiv 2101.00190)."""

    kind: Literal["prefix"] = Field(
        description="Prefix tuning: trained keys and values before those of each adapted layer."
    )
    layers: Count = Field(
        default=2, description="Number of layers that are adapted, counted from the top."
    )
    length: Annotated[int, Field(ge=1, le=128, strict=True)] = Field(
        default=8, description="Number of trained keys and values before each adapted layer's own."
    )
    seed: int = Field(default=0, description="Seed of the initial values, the same at every site.")

    @property
    def words(self) -> str:
        return f"prefix of {self.length}, top {self.layers} layers"


class Prompt(Frozen):
    """`length` trained tokens before the first of the top `layers` layers; before the text itself
    where those are all (arXiv 2104.08691)."""

    kind: Literal["prompt"] = Field(
        description="Prompt tuning: trained tokens before the first of the adapted layers."
    )
    layers: Count = Field(
        default=2,
        description="Number of layers that read the trained tokens, counted from the top.",
    )
    length: Annotated[int, Field(ge=1, le=128, strict=True)] = Field(
        default=8, description="Number of trained tokens before the first adapted layer."
    )
    seed: int = Field(default=0, description="Seed of the initial values, the same at every site.")

    @property
    def words(self) -> str:
        return f"prompt of {self.length}, top {self.layers} layers"


Adapter = Annotated[
    Annotated[Lora, Tag("lora")]
    | Annotated[Lora, Tag("rslora")]
    | Annotated[Core, Tag("core")]
    | Annotated[IA3, Tag("ia3")]
    | Annotated[Prefix, Tag("prefix")]
    | Annotated[Prompt, Tag("prompt")],
    Discriminator(kind_or("lora")),
]
