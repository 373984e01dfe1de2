"""What a contract asks of each record: the task, its public labels or bounds, its target column.

A target is read from one cell of the task's `label_column` by `target`; ValueError says what is
allowed there. `metrics` are what tables show of a task, `answers` is what it tells, in words. What
is learnt from targets is in common/tasks/, how it is scored in common/tasks/metrics.py. Optional
settings are None when absent, so that older contracts keep their hash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from silotune.common.config.types import (
    Bound,
    Cells,
    Distinct,
    Flag,
    Frozen,
    Name,
    Number,
    Positive,
    kind_or,
)
from silotune.common.formats import tag_schemes
from silotune.common.formats.cell_values import index_among, number_of, unread

TaskKind = Literal["classification", "multi-label", "tokens", "regression", "ranking", "language"]
Target = Any  # int, float, a list of ints or text, by task

Smoothing = Annotated[float, Field(gt=0, lt=1, strict=True)]
LOWER_IS_BETTER = frozenset({"loss", "mae", "rmse", "perplexity", "calibration"})


def signed_score(metric: str, value: float) -> float:
    """A metric's value, turned where less of it is better."""
    return -value if metric in LOWER_IS_BETTER else value


class Label(Frozen):
    """One public class: its name and the raw values in the label column that mean it."""

    name: Name = Field(description="Name of the class, as reports and predictions show it.")
    values: Annotated[tuple[str, ...], Field(min_length=1), Cells] = Field(
        description="Raw values in the label column that stand for this class."
    )


def _distinct(labels: tuple[Label, ...]) -> None:
    names = [label.name for label in labels]
    values = [value for label in labels for value in label.values]
    for what, found in (("name", names), ("value", values)):
        twice = sorted({x for x in found if found.count(x) > 1})
        if twice:
            raise ValueError(f"label {what} {twice[0]!r} stands twice")


def _one_weight_each(weights: Sequence[float] | None, classes: Sequence[object], what: str) -> None:
    if weights and len(weights) != len(classes):
        raise ValueError(
            f"class_weights needs one weight for each of {len(classes)} {what}, has {len(weights)}"
        )


class Classification(Frozen):
    """One of the labels a record."""

    metrics: ClassVar[tuple[str, ...]] = (
        "auc",
        "auprc",
        "accuracy",
        "macro_f1",
        "calibration",
        "loss",
    )
    kind: Literal["classification"] = Field(
        default="classification",
        description="Single-label classification: each record has exactly one of the labels; the "
        "default kind.",
    )
    label_column: str = Field(description="Name of the column that holds the record's label.")
    labels: tuple[Label, ...] = Field(
        min_length=2, description="The public classes, in the order of the model's outputs."
    )
    class_weights: tuple[Positive, ...] | None = Field(
        default=None,
        description="Weight of each label's records in training and in a released loss, in the "
        "order of labels; equal if absent.",
    )
    label_smoothing: Smoothing | None = Field(
        default=None,
        description="Share of the target probability that is spread evenly over all labels; none "
        "if absent.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct(self.labels)
        _one_weight_each(self.class_weights, self.labels, "labels")
        return self

    @property
    def answers(self) -> str:
        return ", ".join(label.name for label in self.labels)

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def target(self, cell: str) -> int:
        values = [value for label in self.labels for value in label.values]
        found = index_among(values, cell)
        if found is None:
            raise ValueError(f"one of the contract's labels ({', '.join(values)})")
        return next(at for at, label in enumerate(self.labels) if values[found] in label.values)


class MultiLabel(Frozen):
    """Any number of the labels a record, their raw values between separators."""

    metrics: ClassVar[tuple[str, ...]] = (
        "micro_f1",
        "macro_f1",
        "accuracy",
        "exact_match",
        "loss",
    )
    kind: Literal["multi-label"] = Field(
        default="multi-label",
        description="Multi-label classification: each record has any number of the labels.",
    )
    label_column: str = Field(
        description="Name of the column that holds the record's labels, joined by the separator."
    )
    labels: tuple[Label, ...] = Field(
        min_length=2, description="The public labels, in the order of the model's outputs."
    )
    separator: Annotated[str, Field(min_length=1, max_length=4)] = Field(
        default="|", description="Text between two labels in one cell of the label column."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct(self.labels)
        for value in (value for label in self.labels for value in label.values):
            if not value or self.separator in value:
                raise ValueError(
                    f"label value {value!r} can stand in no cell: values are what is between "
                    f"separators, and separator = {self.separator!r}"
                )
        return self

    @property
    def answers(self) -> str:
        return "any of " + ", ".join(label.name for label in self.labels)

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def target(self, cell: str) -> list[int]:
        """1 for each label that the record has, else 0."""
        found = [0] * len(self.labels)
        places = {value: at for at, label in enumerate(self.labels) for value in label.values}
        values = list(places)
        for value in filter(None, map(str.strip, cell.split(self.separator))):
            index = index_among(values, value)
            if index is None:
                raise ValueError(
                    f"the contract's labels ({', '.join(values)}) between '{self.separator}'"
                )
            found[places[values[index]]] = 1
        return found


class Tokens(Frozen):
    """A label for each word: the tags B-x and I-x of the entities, and O. Words stand between
    spaces in the input's column, as many tags in the label column. Tags of other schemes are read
    as those of IOB2 (common/formats/tag_schemes.py), in which scores are computed, too."""

    metrics: ClassVar[tuple[str, ...]] = (
        "f1",
        "precision",
        "recall",
        "accuracy",
        "loss",
    )
    kind: Literal["tokens"] = Field(
        default="tokens", description="Token classification: each word of a text has a tag."
    )
    label_column: str = Field(
        description="Name of the column that holds one tag for each word, between spaces."
    )
    entities: tuple[Name, ...] = Field(
        min_length=1, description="Entity types; each has the tags B-x and I-x."
    )
    class_weights: tuple[Bound, ...] | None = Field(
        default=None,
        min_length=1,
        description="Weight of each tag's words in training and in a released loss, in the order "
        "O, B-x, I-x of the first entity, and so on; equal if absent.",
    )

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for name in self.entities:
            if self.entities.count(name) > 1:
                raise ValueError(f"entity {name!r} stands twice")
            if " " in name:
                raise ValueError(f"entity {name!r} has a space in it; tags stand between spaces")
        _one_weight_each(self.class_weights, self.tags, "tags")
        return self

    @property
    def tags(self) -> tuple[str, ...]:
        return (tag_schemes.OUTSIDE, *(f"{part}-{name}" for name in self.entities for part in "BI"))

    @property
    def answers(self) -> str:
        return ", ".join(self.tags)

    @property
    def outputs(self) -> int:
        return len(self.tags)

    def target(self, cell: str) -> list[int]:
        """The tags' numbers in IOB2, word by word, whatever scheme the cell is in."""
        try:
            return [self.tags.index(tag) for tag in tag_schemes.to_iob2(cell.split())]
        except ValueError:
            raise ValueError(
                f"the tags {', '.join(self.tags)} between spaces, or those of IOB1, BIOES or BILOU "
                "for the same entities"
            ) from None

    def read_otherwise(self, cell: str) -> str:
        """The message about tags that are not IOB2 and are read as if they were; '' of others."""
        try:
            scheme = tag_schemes.scheme_of(cell.split())
        except ValueError:
            return ""
        return tag_schemes.READ_OTHERWISE.get(scheme, "")


class Regression(Frozen):
    """A number between public bounds; what is outside counts as the bound. With `log` the model
    learns log(1 + number), so that a bill of 50 is not drowned by one of 50,000."""

    metrics: ClassVar[tuple[str, ...]] = (
        "r2",
        "mae",
        "rmse",
        "loss",
    )
    kind: Literal["regression"] = Field(
        default="regression",
        description="Regression: each record has a number between public bounds.",
    )
    label_column: str = Field(description="Name of the column that holds the number to predict.")
    lowest: Number = Field(
        description="Public lower bound of the target; smaller values count as it."
    )
    highest: Number = Field(
        description="Public upper bound of the target; larger values count as it."
    )
    log: Flag | None = Field(
        default=None,
        description="Whether the model learns log(1 + number) instead of the number; false if "
        "absent.",
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if not self.lowest < self.highest:
            raise ValueError("lowest must be below highest")
        if self.log and self.lowest <= -1:
            raise ValueError("log = true needs lowest above -1: it learns log(1 + number)")
        return self

    @property
    def answers(self) -> str:
        return f"{self.lowest:g} to {self.highest:g}" + " (log)" * bool(self.log)

    @property
    def outputs(self) -> int:
        return 1

    def target(self, cell: str) -> float:
        """The place between the bounds, 0 to 1, on the scale that is learnt."""
        number = self._number(cell)
        if math.isnan(number):
            raise ValueError(f"numbers{unread(cell)}")
        low, high = self._scale(self.lowest), self._scale(self.highest)
        return (self._scale(min(max(number, self.lowest), self.highest)) - low) / (high - low)

    def read_otherwise(self, cell: str) -> str:
        """The message about a number outside the bounds, which counts as the bound; '' of
        others."""
        number = self._number(cell)
        if math.isnan(number) or self.lowest <= number <= self.highest:
            return ""
        return self.read_as_bound

    @property
    def read_as_bound(self) -> str:
        return f"is not within {self.answers}: counts as the bound"

    @staticmethod
    def _number(cell: str) -> float:
        """NaN if it is none."""
        try:
            return number_of(cell)
        except ValueError:
            return math.nan

    def number(self, place: float) -> float:
        """The number at a place between the bounds: the inverse of `target`."""
        low, high = self._scale(self.lowest), self._scale(self.highest)
        learnt = low + min(max(place, 0.0), 1.0) * (high - low)
        return math.expm1(learnt) if self.log else learnt

    def _scale(self, number: float) -> float:
        return math.log1p(number) if self.log else number


class Ranking(Frozen):
    """Does the second text of a pair belong to the first? Candidates are ranked among those of the
    same query."""

    metrics: ClassVar[tuple[str, ...]] = (
        "mrr",
        "ndcg",
        "recall_at_10",
        "auc",
        "loss",
    )
    kind: Literal["ranking"] = Field(
        default="ranking",
        description="Ranking: the candidates of each query are ordered by relevance.",
    )
    label_column: str = Field(
        description="Name of the column that says whether a pair is relevant."
    )
    query_column: str = Field(
        description="Name of the column whose equal values group the candidates of one query."
    )
    relevant: Annotated[tuple[str, ...], Field(min_length=1), Distinct, Cells] = Field(
        description="Raw values in the label column that mark a relevant pair."
    )
    others: Annotated[tuple[str, ...], Field(min_length=1), Distinct, Cells] = Field(
        description="Raw values in the label column that mark a pair as not relevant."
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        both = sorted(set(self.relevant) & set(self.others))
        if both:
            raise ValueError(f"value {both[0]!r} is both relevant and not")
        return self

    @property
    def answers(self) -> str:
        return f"relevant or not, ranked within each {self.query_column}"

    @property
    def outputs(self) -> int:
        return 1

    def target(self, cell: str) -> int:
        values = (*self.relevant, *self.others)
        found = index_among(values, cell)
        if found is None:
            raise ValueError(", ".join(values))
        return int(found < len(self.relevant))


class Language(Frozen):
    """An answer to each prompt, by a causal language model: the loss is on the answer alone.

    The input's column is what the user says, `system` what the model is told before. Both are put
    into the model's own chat template.
    """

    metrics: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "exact_match",
        "perplexity",
        "loss",
    )
    kind: Literal["language"] = Field(
        default="language",
        description="Language modelling: a causal language model learns an answer to each prompt.",
    )
    label_column: str = Field(description="Name of the column that holds the answer to learn.")
    system: str | None = Field(
        default=None,
        description="System message before every prompt, put into the model's chat template; none "
        "if absent.",
    )

    @property
    def answers(self) -> str:
        return "answers"

    @property
    def outputs(self) -> int:
        return 0

    def target(self, cell: str) -> str:
        if not cell.strip():
            raise ValueError("a text that is not empty")
        return cell


Task = Annotated[
    Annotated[Classification, Tag("classification")]
    | Annotated[MultiLabel, Tag("multi-label")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[Regression, Tag("regression")]
    | Annotated[Ranking, Tag("ranking")]
    | Annotated[Language, Tag("language")],
    Discriminator(kind_or("classification")),
]
