"""A study's file: what is varied, and how often."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, model_validator

from silotune.common.config import types
from silotune.common.config.types import Count, Frozen, Name, Positive
from silotune.common.contract.contract import Contract
from silotune.common.errors import UsageError
from silotune.simulations.attacks.poisoning import Poison
from silotune.simulations.datasets.partition import Partition

REPLACED = ("adapter", "model", "phases", "sites")  # sections that a variant gives whole


def _finite(epsilon: float) -> float | None:
    """None for infinity, which is without DP: JSON has none."""
    return epsilon if math.isfinite(epsilon) else None


Budget = Annotated[float, Field(gt=0), PlainSerializer(_finite)]


class StudyVariant(Frozen):
    """One configuration of a study: what differs from the recipe's contract."""

    about: str = Field(
        default="", description="Text about the variant that the study's report shows."
    )
    contract: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings that differ from the recipe's contract; an empty section is left "
        "out.",
    )
    no_dp: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings that also differ in the variant without differential privacy, "
        "such as learning rates.",
    )
    lr_scale: dict[Annotated[float, Field(gt=0)], Positive] = Field(
        default_factory=dict,
        description="Factor of the phases' learning rates at an ε; 1 where an ε is absent.",
    )
    rows: Literal["federated", "alone", "pooled"] = Field(
        default="federated",
        description="Who trains: all sites together, each alone, or one with all sites' rows.",
    )
    epsilons: tuple[Budget, ...] = Field(
        default=(),
        description="Values of ε at which the variant runs; all of the study's if empty.",
    )
    masked: bool = Field(
        default=False,
        description="Whether updates are sent by secure aggregation, with the settings in "
        "contract.",
    )
    poison: Poison | None = Field(
        default=None, description="Attack by some of the sites; all are honest if absent."
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.masked and self.rows != "federated":
            raise ValueError('masks are of sites together: rows = "federated"')
        if not self.masked and "secure_aggregation" in {**self.contract, **self.no_dp}:
            raise ValueError("secure_aggregation goes with masked = true")
        if self.poison and self.rows != "federated":
            raise ValueError('poison is of one among others: rows = "federated"')
        return self


class Study(Frozen):
    title: str = Field(description="Title of the study, as its report shows it.")
    recipe: Name = Field(description="Name of the recipe whose contract and data the study varies.")
    repeats: Count = Field(
        default=5, description="Number of runs of each cell, which differ in their seeds."
    )
    evaluate_every: Count = Field(
        default=5, description="Number of rounds between two evaluations on the public test rows."
    )
    sites: Count | None = Field(
        default=None,
        description="Number of sites among which the rows are dealt; the recipe's sites if absent.",
    )
    by_site: bool = Field(
        default=False,
        description="Whether the table also shows the metric on each site's own rows.",
    )
    validation: bool = Field(
        default=False,
        description="Whether runs are scored on a quarter of the training rows, to choose "
        "learning rates by.",
    )
    epsilons: tuple[Budget, ...] = Field(
        default=(math.inf, 8.0, 3.0, 1.0),
        min_length=1,
        description="Values of ε at which each variant runs; infinity is without "
        "differential privacy.",
    )
    partitions: dict[Name, Partition] = Field(
        default_factory=lambda: {"natural": Partition()},
        min_length=1,
        description="Ways of dealing the training rows to the sites, by name.",
    )
    variants: dict[Name, StudyVariant] = Field(
        min_length=1, description="The compared configurations, by name; at least one."
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if len(set(self.epsilons)) != len(self.epsilons):
            raise ValueError("an ε stands twice")
        for name, variant in self.variants.items():
            if other := set(variant.lr_scale) - set(variant.epsilons or self.epsilons):
                raise ValueError(
                    f"variant '{name}' has lr_scale for ε {min(other):g}, at which it is not"
                )
        if self.sites and any(p.kind == "natural" for p in self.partitions.values()):
            raise ValueError("with sites rows cannot stay natural: name partitions of other kinds")
        return self


def load_study(file: Path) -> Study:
    """UsageError or ContractError for a file that is none."""
    text = types.read_text(file, "Study")
    if is_contract(text):
        raise UsageError(
            f"{file} is a contract: name its table, data=FILE.csv, and the --rates to compare."
        )
    found: Study = types.parse(text, file.name, Study)
    return found


def is_contract(text: str) -> bool:
    """Whether a file's text is a contract and no study."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return {"task", "privacy"} <= set(found)


def study_of(contract: Contract) -> Study:
    """The study of a contract of one's own: its one variant at its ε, for `rates_of`."""
    return Study(
        title=contract.name,
        recipe=contract.name,
        evaluate_every=contract.rounds,
        epsilons=(contract.privacy.epsilon,),
        variants={contract.name: StudyVariant()},
    )


def rates_of(study: Study, factors: Sequence[float]) -> Study:
    """The study by which rates are chosen: each variant with its learning rates times each of
    these, once, scored on a quarter of the training rows. With three quarters of the rows and the
    whole noise, rates that are right here are a little low for all rows."""
    variants = {
        f"{name} x{factor:g}": variant.model_copy(
            update={
                "lr_scale": {
                    e: variant.lr_scale.get(e, 1.0) * factor
                    for e in variant.epsilons or study.epsilons
                }
            }
        )
        for name, variant in study.variants.items()
        for factor in factors
    }
    return study.model_copy(
        update={
            "title": f"{study.title}: rates",
            "variants": variants,
            "repeats": 1,
            "validation": True,
        }
    )


def study_file(name: str) -> Path:
    """A study's file: a path, or the name of a shipped one. UsageError if there is none."""
    path = Path(name)
    shipped = Path(__file__).parents[1] / "studies" / f"{name}.toml"
    if path.suffix == ".toml" and path.is_file():
        return path
    if shipped.is_file():
        return shipped
    known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.toml")))
    raise UsageError(f"There is no study '{name}'. Name a .toml file, or: {known or 'none'}.")
