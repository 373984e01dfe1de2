"""How a machine computes. Nothing here changes which records count, how they are clipped or how
much noise is added: privacy settings are another type (common/contract/privacy.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from silotune.common.config.diagnostics import CONSTRAINT_VIOLATIONS
from silotune.common.config.types import Count, Flag, Frozen


class Performance(Frozen):
    """How per-example gradients come about is in client/training/per_sample_gradients.py.
    "expanded" is the fastest here. Ghost clipping never holds a single record's gradient, so its
    bound is not exact: a site refuses it unless its owner allows that
    (permits.allow_inexact_clipping).

    torch.compile compiles the first widths that it meets and runs later ones as they are, with
    other roundings; which come first depends on which records were drawn, so a record's gradient
    would depend on other records.

    The cache's file can be opened by no other user and ends with the process.
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$")] = Field(
        default="auto",
        description='"cpu", "cuda" or "cuda:0" and so on; "auto" is the first CUDA device, or the '
        "CPU without one.",
    )
    bf16: Literal["auto", "on", "off"] = Field(
        default="auto",
        description='Whether matrix products of frozen and adapted layers run in bfloat16; "auto" '
        "where the device supports it.",
    )
    gradients: Literal["expanded", "hooks", "ghost"] = Field(
        default="expanded",
        description='How per-example gradients are computed; "hooks" and "ghost" are Opacus\' '
        "methods, in float32 only.",
    )
    checkpointing: Flag = Field(
        default=False,
        description="Whether activations are recomputed in the backward pass (activation "
        "checkpointing): less memory, more time.",
    )
    compile: Flag = Field(
        default=False,
        description="Must be false: torch.compile would make a record's rounding depend on other "
        "records.",
    )
    micro_batch: Annotated[int, Field(ge=1, le=1024, strict=True)] = Field(
        default=16,
        description="Number of records that are computed at once; every block has exactly so many "
        "rows.",
    )
    cache_megabytes: Count = Field(
        default=4096,
        description="Memory in megabytes for the frozen layers' outputs; what exceeds it goes to "
        "a file.",
    )
    cache_folder: Path | None = Field(
        default=None, description="Folder of the cache's file; state/ beside site.toml if absent."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        wrong = [
            (
                key,
                f'{key} = {value} does not go with gradients = "{self.gradients}" (Opacus), '
                'only with "expanded"',
            )
            for key, value, asked in (
                ("bf16", '"on"', self.bf16 == "on"),
                ("checkpointing", "true", self.checkpointing),
            )
            if asked and self.gradients != "expanded"
        ]
        if self.compile:
            wrong.append(
                (
                    "compile",
                    "compile = true is refused: a record's gradient would be "
                    "rounded by which other records were drawn; leave the key out",
                )
            )
        if wrong:
            raise PydanticCustomError(CONSTRAINT_VIOLATIONS, "{wrong}", {"wrong": wrong})
        return self
