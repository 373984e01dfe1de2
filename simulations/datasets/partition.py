"""Training rows re-partitioned among the sites of a recipe: alike, or skewed by a stated rule and
seed.

The public test rows stay where they are. Where the contract has entities, all rows of one go to one
site. Nothing is copied and nothing is left out.

Shapes: N rows (or entities), k sites.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from silotune.common.config.types import Frozen, Positive
from silotune.common.contract.contract import Contract
from silotune.common.contract.task import Classification, Ranking
from silotune.common.errors import DataError, ErrorCode, UsageError
from silotune.simulations.datasets.split import LEAST, units

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import

TRIES = 1000


class Partition(Frozen):
    """natural   as the recipe's data has them
    iid       drawn at random, as many each
    labels    each label's rows dealt by shares from Dirichlet(alpha) (Yurochkin et al. 2019,
              arXiv 1905.12022, section 4): the smaller alpha, the more a site has of few labels
    column    the same by the values of an input column, as its text is (feature skew)
    quantity  the sites' sizes are shares from Dirichlet(alpha), the rows drawn at random
    """

    kind: Literal["natural", "iid", "labels", "column", "quantity"] = Field(
        default="natural",
        description="How the training rows are dealt to the sites; as in the recipe's data by "
        "default.",
    )
    alpha: Positive | None = Field(
        default=None,
        description="Concentration α of the Dirichlet distribution; smaller is more skewed. Only "
        'with "labels", "column" and "quantity".',
    )
    column: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description='Input column by whose values rows are dealt; only with kind = "column".',
    )

    @model_validator(mode="after")
    def _needs(self) -> Self:
        if (self.alpha is not None) != (self.kind in ("labels", "column", "quantity")):
            raise ValueError('alpha goes with "labels", "column" and "quantity" alone')
        if (self.column is not None) != (self.kind == "column"):
            raise ValueError('column goes with "column", and only with it')
        return self

    @property
    def words(self) -> str:
        what = f"{self.kind} {self.column}" if self.column else self.kind
        return f"{what}, α {self.alpha:g}" if self.alpha else what


def deal(
    groups: NDArray[np.int64], sites: int, partition: Partition, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The site of each of N rows [N], by the rows' groups [N] (labels, or a column's values). It is
    drawn again until each site has LEAST rows; DataError after 1,000 times."""
    n = len(groups)
    if partition.kind == "iid":
        return rng.permutation(n) % sites
    for _ in range(TRIES):
        found = np.zeros(n, dtype=np.int64)
        of_all = np.zeros_like(groups) if partition.kind == "quantity" else groups
        for group in np.unique(of_all):
            rows = rng.permutation(np.flatnonzero(of_all == group))
            shares = rng.dirichlet(np.full(sites, partition.alpha))
            ends = np.round(np.cumsum(shares) * len(rows)).astype(int)[:-1]
            for site, part in enumerate(np.split(rows, ends)):
                found[part] = site
        if np.bincount(found, minlength=sites).min() >= LEAST:
            return found
    raise DataError(
        f"{partition.words}: {n} rows leave a site fewer than {LEAST}, however they are dealt. "
        "Take a larger alpha.",
        code=ErrorCode.TOO_FEW_ROWS,
    )


def repartition(
    source: Path,
    folder: Path,
    contract: Contract,
    sites: list[str],
    partition: Partition,
    seed: int,
) -> Path:
    """The recipe's split (simulations/datasets/split.py) in `source`, with its training rows
    re-partitioned among these sites; returns its folder: `source` itself if it is to stay natural.
    contract: the recipe's. DataError without the column.
    """
    if partition.kind == "natural":
        return source
    import pandas as pd

    rows = pd.concat(
        [
            pd.read_csv(source / "train" / f"{site}.csv", dtype=str, keep_default_na=False)
            for site in contract.weights()
        ],
        ignore_index=True,
    )
    if partition.kind == "labels" and not isinstance(contract.task, Classification | Ranking):
        raise UsageError(
            f"A partition by labels is of few of them; '{contract.name}' is a task of "
            f"{contract.task.kind}."
        )
    column = partition.column or contract.task.label_column
    if column not in rows:
        raise DataError(
            f"Column '{column}' is not in the recipe's table.", code=ErrorCode.SCHEMA_MISMATCH
        )
    who = units(rows, contract).factorize()[0]
    first = np.unique(who, return_index=True)[1]  # an entity goes by its first row
    groups = rows[column].iloc[first].factorize(sort=True)[0]
    site = deal(groups, len(sites), partition, np.random.default_rng((2026, seed)))[who]
    (folder / "train").mkdir(parents=True)
    for at, name in enumerate(sites):
        rows[site == at].to_csv(folder / "train" / f"{name}.csv", index=False)
    shutil.copytree(source / "test", folder / "test")
    shutil.copy(source / "pooled.csv", folder / "pooled.csv")
    return folder


def draw(folder: Path, contract: Contract, sites: list[str], title: str, file: Path) -> None:
    """How many training rows of each label every site has, as an SVG."""
    import pandas as pd

    counts: dict[str, pd.Series[int]] = {}
    for site in sites:
        rows = pd.read_csv(folder / "train" / f"{site}.csv", dtype=str, keep_default_na=False)
        counts[site] = rows[contract.task.label_column].value_counts()
    table = pd.DataFrame(counts).fillna(0).sort_index()
    if len(table) > 12:  # texts, tags or numbers: how many rows, no more
        table = table.sum().to_frame("rows").T
    _bars(table, title, file)


def _bars(table: pd.DataFrame, title: str, file: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "partition"}):
        figure = Figure(figsize=(7, 0.32 * len(table.columns) + 1.3), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(table.columns))
        colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        for at, (label, row) in enumerate(table.iterrows()):
            values = row.to_numpy(dtype=float)
            axes.barh(
                list(table.columns),
                values,
                left=left,
                label=str(label)[:24],
                color=colours[at % 20],
                height=0.7,
            )
            left += values
        axes.invert_yaxis()
        axes.set_xlabel("training rows")
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None})
