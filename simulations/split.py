"""A table as files: each site's training rows, and its public test rows beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from silotune.common.contract import Contract
from silotune.common.durable import write_durably
from silotune.common.errors import DataError, did_you_mean
from silotune.simulations.tables import TABLES

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import

SEED = 2026
LEAST = 8  # rows of a site: a quarter of them is for tests


def split(table_name: str, folder: Path) -> list[dict[str, int | str]]:
    """Write `folder`/{train,test}/<site>.csv: by site, a quarter drawn by a fixed seed is public.
    `pooled.csv` holds all training rows, for the arms that have no silos.

    Where a table has persons (Table.entity) a quarter of them is drawn, with all their rows; where
    its source has a split of its own, that is taken. The public rows stand in for the operator's
    own test rows, so that no figure is read off a site's training records. Returns site, train and
    test counts in order of site name.
    """
    kind = TABLES[table_name]
    rows = kind.make().reset_index(drop=True)
    site, own = rows.pop("site"), rows.pop("split") if "split" in rows else None
    return _write(
        rows, site, folder, rows[kind.entity] if kind.entity else rows.index.to_series(),
        public=None if own is None else own == "test",
    )


def of_file(
    table: Path, contract: Contract, site_column: str | None, folder: Path
) -> list[dict[str, int | str]]:
    """The same of a CSV file of one's own, for the contract's sites. Without `site_column` each
    row, or entity, goes to a site drawn by a fixed seed. DataError."""
    import pandas as pd

    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    sites, entity = list(contract.weights()), contract.privacy.entity
    for column in [*(entity.key if entity else ()), *([site_column] if site_column else [])]:
        if column not in rows:
            raise DataError(
                f"Column '{column}' is not in {table.name}.", code="E302",
                local=f"its first line has: {', '.join(map(str, rows.columns[:40]))}."
                + did_you_mean(column, list(map(str, rows.columns))),
            )
    who = units(rows, contract)
    if site_column is None:
        people = who.unique()
        drawn = np.random.default_rng(SEED).permutation(len(people)) % len(sites)
        of = {person: sites[at] for person, at in zip(people, drawn, strict=True)}
        site = who.map(of)
    else:
        site = rows[site_column]
    few = [name for name in sites if (site == name).sum() < LEAST]
    if few:
        raise DataError(
            f"{table.name} has fewer than {LEAST} rows for: {', '.join(few)}.", code="E304"
        )
    kept = site.isin(sites)
    return _write(rows[kept], site[kept], folder, who[kept])


def validation(source: Path, contract: Contract, folder: Path) -> Path:
    """The split in `source` without its public rows: a quarter of each site's training rows, or
    entities, drawn at random stands for them. What is chosen by these rows was not chosen by the
    public ones. A table whose source has a split of its own, by day say, is easier here than there.
    """
    import pandas as pd

    own = {
        site: pd.read_csv(source / "train" / f"{site}.csv", dtype=str, keep_default_na=False)
        for site in contract.weights()
    }
    rows = pd.concat(own.values(), ignore_index=True)
    site = pd.Series([name for name, part in own.items() for _ in range(len(part))])
    _write(rows, site, folder, units(rows, contract))
    return folder


def units(rows: pd.DataFrame, contract: Contract) -> pd.Series[Any]:
    """Whose each row is, where the contract has entities; else each is its own."""
    entity = contract.privacy.entity
    return rows[list(entity.key)].agg("\0".join, axis=1) if entity else rows.index.to_series()


def _write(
    table: pd.DataFrame, site: pd.Series[str], folder: Path, who: pd.Series[Any],
    public: pd.Series[bool] | None = None,
) -> list[dict[str, int | str]]:
    """site, who, public: of each row its site, whose it is, and whether it is a test row."""
    import pandas as pd

    rng = np.random.default_rng(SEED)
    counts: list[dict[str, int | str]] = []
    pooled: list[pd.DataFrame] = []
    sites = sorted(site.unique())
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for file in (folder / part).glob("*.csv"):
            if file.stem not in sites:  # from when the table had other ones
                file.unlink()
    for name in sites:
        own = site == name
        rows = table[own]
        if public is not None:
            test = public[own].to_numpy()
        else:
            people = who[own].unique()
            drawn = rng.permutation(len(people))[: len(people) // 4]
            test = who[own].isin(people[drawn]).to_numpy()
        _put(rows[test], folder / "test" / f"{name}.csv")
        _put(rows[~test], folder / "train" / f"{name}.csv")
        pooled.append(rows[~test])
        counts.append({"site": name, "train": int((~test).sum()), "test": int(test.sum())})
    _put(pd.concat(pooled), folder / "pooled.csv")
    return counts


def _put(rows: pd.DataFrame, file: Path) -> None:
    """Whole or not at all: another process may be reading the same split."""
    write_durably(file, rows.to_csv(index=False).encode())
