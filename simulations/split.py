"""A table as files: each site's training rows, and its public test rows beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from silotune.simulations.tables import TABLES

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import

SEED = 2026


def split(table_name: str, folder: Path) -> list[dict[str, int | str]]:
    """Write `folder`/{train,test}/<site>.csv: by site, a quarter drawn by a fixed seed is public.
    `pooled.csv` holds all training rows, for the arms that have no silos.

    Where a table has persons (Table.entity) a quarter of them is drawn, with all their rows; where
    its source has a split of its own, that is taken. The public rows stand in for the operator's
    own test rows, so that no figure is read off a site's training records. Returns site, train and
    test counts in order of site name.
    """
    import pandas as pd

    kind = TABLES[table_name]
    table = kind.make()
    rng = np.random.default_rng(SEED)
    counts: list[dict[str, int | str]] = []
    pooled: list[pd.DataFrame] = []
    sites = sorted(table["site"].unique())
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for file in (folder / part).glob("*.csv"):
            if file.stem not in sites:  # from when the table had other ones
                file.unlink()
    for site in sites:
        rows = table[table["site"] == site].drop(columns="site")
        if "split" in rows:
            test = (rows.pop("split") == "test").to_numpy()
        elif kind.entity:
            people = rows[kind.entity].unique()
            drawn = rng.permutation(len(people))[: len(people) // 4]
            test = rows[kind.entity].isin(people[drawn]).to_numpy()
        else:
            test = np.zeros(len(rows), dtype=bool)
            test[rng.permutation(len(rows))[: len(rows) // 4]] = True
        rows[test].to_csv(folder / "test" / f"{site}.csv", index=False)
        rows[~test].to_csv(folder / "train" / f"{site}.csv", index=False)
        pooled.append(rows[~test])
        counts.append({"site": site, "train": int((~test).sum()), "test": int(test.sum())})
    pd.concat(pooled).to_csv(folder / "pooled.csv", index=False)
    return counts
