"""recipe.toml: the facts of a recipe's page, and the plans of the variants beside its contract."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from silotune.common.config.types import Frozen, Name

Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Measured(Frozen):
    """How long one run of the contract's own variant took."""

    seconds: Count = Field(description="Duration of one run in seconds, from start to release.")
    machine: str = Field(description="Processor and number of cores on which it was measured.")
    commit: str = Field(description="Commit of Silotune with which the run was measured.")


class RecipeConfig(Frozen):
    """A recipe beside its contract: what its page says, how often it runs, with what it is
    compared."""

    title: str = Field(description="Title of the recipe, as lists and reports show it.")
    about: str = Field(description="Text about the data and their limits, which the report shows.")
    table: str | None = Field(
        default=None,
        description="Name of the public table that Silotune reads; absent for your own file.",
    )
    metric: str = Field(description="Name of the metric that is reported and compared first.")
    records: Count | None = Field(
        default=None, description="Number of records of the table, training and test together."
    )
    measured: Measured | None = Field(
        default=None, description="How long a run took on a known machine; absent if not recorded."
    )
    repeats: Count = Field(
        description="Number of runs of each variant with an adapter; they differ in their seeds."
    )
    baseline_repeats: Count = Field(
        description="Number of runs of each variant that trains only a head."
    )
    evaluate_every: Count = Field(
        description="Number of rounds between two evaluations on the public test records."
    )
    expect: float | None = Field(
        default=None,
        description="Expected value of the metric for pooled records without differential privacy, "
        "which `make recipes` checks.",
    )
    within: Positive = Field(
        default=0.015, description="How far the metric may be below the expected value."
    )
    bound: Positive | None = Field(
        default=None,
        description="Bound of the entries of a masked update; the default of secure aggregation if "
        "absent.",
    )
    lr_scale: dict[Positive, Positive] = Field(
        default_factory=dict,
        description="Factor of all learning rates at an ε other than the contract's; 1 where an ε "
        "is absent.",
    )
    variants: dict[Name, dict[str, Any]] = Field(
        description="Settings of the other variants (head, one-hot, alone-tuned, no-dp) that "
        "replace the contract's, by the variant's name.",
    )
