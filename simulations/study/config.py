"""A study's file: what is varied, and how often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, model_validator

from silotune.common.config import types
from silotune.common.config.types import Count, Frozen, Name, Positive
from silotune.common.errors import UsageError
from silotune.simulations.attacks.poisoning import Poison
from silotune.simulations.datasets.partition import Partition

REPLACED = ("adapter", "model", "phases", "sites")  # sections that an arm gives whole


def _finite(epsilon: float) -> float | None:
    """None for infinity, which is without DP: JSON has none."""
    return epsilon if math.isfinite(epsilon) else None


Budget = Annotated[float, Field(gt=0), PlainSerializer(_finite)]


class StudyArm(Frozen):
    """What differs from the recipe's contract; an empty section is left out. no_dp: what differs
    in addition without DP, where other rates are right. lr_scale: what its phases' learning rates
    are multiplied by at an ε. rows: who trains, all sites together, each alone, or one with the
    rows of all. epsilons: if not all of the study's. masked: with secure aggregation, as `contract`
    sets it."""

    about: str = ""
    contract: dict[str, Any] = Field(default_factory=dict)
    no_dp: dict[str, Any] = Field(default_factory=dict)
    lr_scale: dict[Annotated[float, Field(gt=0)], Positive] = Field(default_factory=dict)
    rows: Literal["federated", "alone", "pooled"] = "federated"
    epsilons: tuple[Budget, ...] = ()
    masked: bool = False
    poison: Poison | None = None

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
    title: str
    recipe: Name
    repeats: Count = 5
    evaluate_every: Count = 5
    sites: Count | None = None  # so many instead of the recipe's: the rows must be re-partitioned
    by_site: bool = False  # whether the table has each site's own rows, too
    validation: bool = False  # scored on a quarter of the training rows: rates are chosen by that
    epsilons: tuple[Budget, ...] = Field(default=(math.inf, 8.0, 3.0, 1.0), min_length=1)
    partitions: dict[Name, Partition] = Field(
        default_factory=lambda: {"natural": Partition()}, min_length=1
    )
    arms: dict[Name, StudyArm] = Field(min_length=1)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if len(set(self.epsilons)) != len(self.epsilons):
            raise ValueError("an ε stands twice")
        for name, arm in self.arms.items():
            if other := set(arm.lr_scale) - set(arm.epsilons or self.epsilons):
                raise ValueError(
                    f"arm '{name}' has lr_scale for ε {min(other):g}, at which it is not"
                )
        if self.sites and any(p.kind == "natural" for p in self.partitions.values()):
            raise ValueError("with sites rows cannot stay natural: name partitions of other kinds")
        return self


def load_study(file: Path) -> Study:
    """UsageError or ContractError for a file that is none."""
    found: Study = types.parse(types.read_text(file, "Study"), file.name, Study)
    return found


def rates_of(study: Study, factors: Sequence[float]) -> Study:
    """The study by which rates are chosen: each arm with its learning rates times each of these,
    once, scored on a quarter of the training rows. With three quarters of the rows and the whole
    noise, rates that are right here are a little low for all rows."""
    arms = {
        f"{name} x{factor:g}": arm.model_copy(
            update={
                "lr_scale": {
                    e: arm.lr_scale.get(e, 1.0) * factor for e in arm.epsilons or study.epsilons
                }
            }
        )
        for name, arm in study.arms.items()
        for factor in factors
    }
    return study.model_copy(
        update={
            "title": f"{study.title}: rates",
            "arms": arms,
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
