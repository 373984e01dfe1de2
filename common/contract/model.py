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

    seed: int = Field(
        default=0, description="Seed by which the synthetic rows of a table are drawn."
    )
    records: Count = Field(
        default=400, description="Number of synthetic rows drawn from a table's schema."
    )
    shrinkage: Rate = Field(
        default=0.2,
        description="Weight of the scaled identity matrix in the covariance, against that of the "
        "public texts' features.",
    )
    whiten: Flag = Field(
        default=True,
        description="Whether features are whitened by the covariance; false only centres and "
        "scales them.",
    )
    norm: Positive = Field(
        default=2.0,
        description="Root mean square L2 norm of the public texts' features after the map.",
    )
    sentences: tuple[str, ...] = Field(
        default=(),
        description="Public sentences that replace the synthetic rows where the input is free "
        "text.",
    )


class EncoderModel(Frozen):
    """A BERT- or Llama-type model, mean-pooled, with a linear head."""

    kind: Literal["encoder"] = Field(
        default="encoder",
        description="A text encoder of BERT's or Llama's type with a linear head.",
    )
    name: Name = Field(
        description="Name of the base model; a packaged one is found in the cache by it."
    )
    sha256: Sha256 = Field(description="SHA-256 of the model's folder, which every site checks.")
    max_tokens: Annotated[int, Field(ge=8, le=512, strict=True)] = Field(
        description="Number of tokens after which a text is cut off."
    )
    normalise: Flag = Field(
        default=True, description="Whether pooled features are scaled to L2 norm 1."
    )
    standardise: Standardise | None = Field(
        default=None,
        description="Linear map of the features, computed from public text; none if absent.",
    )


class OneHotModel(Frozen):
    """Columns one-hot by the contract's public bins, with a linear head: the bank's baseline.

    Each row is scaled to one L2 norm, so that the clip norm fits any number of columns. A hidden
    layer learns what is not additive.
    """

    kind: Literal["one-hot"] = Field(
        default="one-hot",
        description="One-hot encoding of a table's columns with a linear head, without a base "
        "model.",
    )
    norm: Bound = Field(
        default=2.0, description="L2 norm to which each row's one-hot vector is scaled."
    )
    hidden: Annotated[int, Field(ge=1, le=1024, strict=True)] | None = Field(
        default=None,
        description="Units of a tanh layer before the head; the model is linear if absent.",
    )


class LanguageModel(Frozen):
    """A causal language model of Llama's type, which learns answers by its adapter alone."""

    kind: Literal["language-model"] = Field(
        default="language-model",
        description="A causal language model of Llama's type, which only its adapter trains.",
    )
    name: Name = Field(
        description="Name of the base model; a packaged one is found in the cache by it."
    )
    sha256: Sha256 = Field(description="SHA-256 of the model's folder, which every site checks.")
    max_tokens: Annotated[int, Field(ge=8, le=4096, strict=True)] = Field(
        description="Largest number of tokens of a prompt with its answer; longer ones are cut off."
    )


Model = Annotated[EncoderModel | OneHotModel | LanguageModel, Field(discriminator="kind")]
