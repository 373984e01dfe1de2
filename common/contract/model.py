"""What a contract says of the base model, and how texts become features.

Optional settings are None when absent, and what is None is no part of a contract's hash.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from silotune.common.config.types import (
    Bound,
    Count,
    Flag,
    Frozen,
    Name,
    Positive,
    Rate,
    Sha256,
)


class Standardise(Frozen):
    """A public linear map after pooling: centre and whiten by synthetic or listed public text.

    For a table the text is `records` rows drawn uniformly from the schema's own choices; for
    free text it is `sentences`. Neither has anything to do with a record, so it is free of charge.
    """

    seed: int = 0
    records: Count = 400
    shrinkage: Rate = 0.2
    whiten: Flag = True
    norm: Positive = 2.0
    sentences: tuple[str, ...] = ()


class EncoderModel(Frozen):
    """A BERT- or Llama-type model, mean-pooled, with a linear head."""

    kind: Literal["encoder"] = "encoder"
    name: Name
    sha256: Sha256
    max_tokens: Annotated[int, Field(ge=8, le=512, strict=True)]
    normalise: Flag = True
    standardise: Standardise | None = None


class OneHotModel(Frozen):
    """Columns one-hot by the contract's public bins, with a linear head: the bank's baseline.

    Each row is scaled to the L2 norm `norm`, so that the clip norm fits any number of columns.
    hidden: the units of a layer between (tanh), for what is not additive.
    """

    kind: Literal["one-hot"] = "one-hot"
    norm: Bound = 2.0
    hidden: Annotated[int, Field(ge=1, le=1024, strict=True)] | None = None


class LanguageModel(Frozen):
    """A causal language model of Llama's type, which learns answers by its adapter alone."""

    kind: Literal["language-model"] = "language-model"
    name: Name
    sha256: Sha256
    max_tokens: Annotated[int, Field(ge=8, le=4096, strict=True)]


Model = Annotated[EncoderModel | OneHotModel | LanguageModel, Field(discriminator="kind")]
