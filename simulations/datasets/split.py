"""A table as files: each site's training rows, and its public test rows beside them, of which some
can be set aside to calibrate by."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from silotune.common.contract.contract import Contract
from silotune.common.contract.task import Classification, Ranking, Regression, Task
from silotune.common.data import records
from silotune.common.data.calibration_rows import NEEDED, calibration_rows
from silotune.common.data.file_source import Problems
from silotune.common.data.records import Table
from silotune.common.data.text_decoding import Reading
from silotune.common.data.text_table import Row
from silotune.common.errors import DataError, ErrorCode, did_you_mean
from silotune.common.formats.cell_values import index_among
from silotune.common.runtime.atomic_files import write_durably
from silotune.simulations.datasets.tables import TABLES

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import

Counts = list[dict[str, int | str]]
SEED = 2026
LEAST = 8  # rows of a site: a quarter of them is for tests
TEST, CALIBRATION = "test", "calibration"  # folders of public rows


class Split(NamedTuple):
    """counts: site, train and test rows, in order of site name. folder: where the files are. notes:
    what was left out or read otherwise than it stands, in sentences with row numbers and counts."""

    counts: Counts
    folder: Path
    notes: tuple[str, ...] = ()


def split(table_name: str, folder: Path) -> list[dict[str, int | str]]:
    """Write `folder`/{train,test}/<site>.csv: by site, a quarter drawn by a fixed seed is public.
    `pooled.csv` holds all training rows, for the variants that have no silos.

    Where a table has persons (Table.entity) a quarter of them is drawn, with all their rows; where
    its source has a split of its own, that is taken. The public rows stand in for the operator's
    own test rows, so that no figure is read off a site's training records. Returns site, train and
    test counts in order of site name.
    """
    kind = TABLES[table_name]
    rows = kind.make().reset_index(drop=True)
    site, own = rows.pop("site"), rows.pop("split") if "split" in rows else None
    return _write(
        rows,
        site,
        folder,
        rows[kind.entity] if kind.entity else rows.index.to_series(),
        public=None if own is None else own == "test",
    )


def of_file(
    file: Path,
    contract: Contract,
    site_column: str | None,
    folder: Path,
    reading: Reading | None = None,
) -> Split:
    """The same for your own file and the contract's sites. Without `site_column` each row, or
    entity, goes to a site drawn by a fixed seed.

    Raises:
        DataError: the file cannot be read, or rows of the contract's sites do not fit it: all of
            them, by their numbers in the file. Nothing has been written then.
    """
    import pandas as pd

    from silotune.client.training import privacy_units

    table = records.named_by(contract, records.table(file, reading))
    records.check_header(table, contract)
    sites, entity = list(contract.weights()), contract.privacy.entity
    for column in [*(entity.key if entity else ()), *([site_column] if site_column else [])]:
        if table.header.count(column) != 1:
            what = "stands more than once" if column in table.header else "is not"
            raise DataError(
                f"Column '{column}' {what} in {file.name}.",
                code=ErrorCode.SCHEMA_MISMATCH,
                local=f"it has: {', '.join(table.header[:40])}."
                + did_you_mean(column, table.header),
            )
    left_out, of_site = Problems(), list[str]()
    if site_column is not None:
        table, of_site = _of_sites(table, sites, site_column, left_out)
    parsed = records.parse(table, contract)
    if entity is not None:
        privacy_units.of_entities(table, entity)
    notes = (*parsed.notes, *left_out.sentences)
    rows = pd.DataFrame([cells for _, cells in table.rows], columns=table.header, dtype=object)
    who = units(rows, contract)
    if site_column is None:
        people = who.unique()
        drawn = np.random.default_rng(SEED).permutation(len(people)) % len(sites)
        of = {person: sites[at] for person, at in zip(people, drawn, strict=True)}
        site = who.map(of)
    else:
        site = pd.Series(of_site, dtype=object)
    few = [name for name in sites if (site == name).sum() < LEAST]
    if few:
        raise DataError(
            f"{file.name} has fewer than {LEAST} rows for: {', '.join(few)}. Each "
            "site of the contract needs them: add rows, or take the site out of the contract."
            + "".join(f" {note[:1].upper()}{note[1:]}." for note in left_out.sentences),
            code=ErrorCode.TOO_FEW_ROWS,
            local=left_out.local,
        )
    return Split(_write(rows, site, folder, who), folder, notes)


def _of_sites(
    table: Table, sites: list[str], column: str, left_out: Problems
) -> tuple[Table, list[str]]:
    """The rows of the contract's sites, and the site of each. Rows that are no rows of the table
    stay, for `records.parse` to refuse them."""
    at, rows, of_site = table.header.index(column), list[Row](), list[str]()
    for line, cells in table.rows:
        name = cells[at].strip() if at < len(cells) else ""
        found = index_among(sites, name)
        if found is None and len(cells) == len(table.header):
            what = "is of no site of the contract" if name else "names no site"
            left_out.add(
                ErrorCode.SCHEMA_MISMATCH, f"left out, column '{column}' {what}", line, name
            )
            continue
        rows.append((line, cells))
        of_site.append("" if found is None else sites[found])
    if not rows:
        raise DataError(
            f"No row of {table.source} is of a site of the contract: {', '.join(sites)}.",
            code=ErrorCode.TOO_FEW_ROWS,
            local=left_out.local,
        )
    return Table(table.source, table.header, rows, table.notes), of_site


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


def filled(source: Path, contract: Contract, folder: Path) -> Path:
    """The training rows of a split, repeated until each site has as many as the contract expects.

    A site's records, or entities, in an order that is drawn by a fixed seed, are taken one after
    the other, and over again, until there are `privacy.expected_units` of them; where there are
    more, the rest is left out. A repeated entity is one of its own, with a key of its own.

    Args:
        source: A split; it stays as it is.
        contract: Whose rows these are.
        folder: Where `train/` is written.

    Returns:
        The folder.
    """
    import pandas as pd

    rng, entity = np.random.default_rng(SEED), contract.privacy.entity
    expected = max(1, round(contract.privacy.expected_units))
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for site in contract.weights():
        file = Path("train") / f"{site}.csv"
        rows = pd.read_csv(source / file, dtype=str, keep_default_na=False)
        who = units(rows, contract)
        people = rng.permutation(who.unique())
        parts = []
        for copy, taken in enumerate(range(0, expected, len(people))):
            part = rows[who.isin(people[: expected - taken])]
            if entity and copy:
                key = entity.key[0]
                part = part.assign(**{key: part[key] + f" (copy {copy})"})
            parts.append(part)
        _put(pd.concat(parts), folder / file)
    return folder


def public_files(folder: Path, part: str) -> dict[str, Path]:
    """The public rows of each site: those for tests, or those to calibrate by, of which there may
    be none. All who put them behind one another do so in this order."""
    return {file.stem: file for file in sorted((folder / part).glob("*.csv"))}


def calibration(source: Path, contract: Contract, folder: Path) -> Split:
    """Divide the public rows of a split into those for tests and those to calibrate by.

    The rows to calibrate by are drawn by a fixed seed, in proportion to each site and, within a
    site, to each label (of a regression over the range of its numbers). A person's rows, or a
    query's candidates, stay together.

    Args:
        source: A split; it stays as it is.
        contract: Whose rows these are.
        folder: Where `test/` and `calibration/` are written.

    Returns:
        The rows of each site in both parts, and the folder. Where there are too few rows for two
        parts all are for tests, and a note says so.
    """
    import pandas as pd

    tables = {
        site: pd.read_csv(file, dtype=str, keep_default_na=False)
        for site, file in public_files(source, TEST).items()
    }
    rows = pd.concat(tables.values(), ignore_index=True)
    site = pd.Series([name for name, own in tables.items() for _ in range(len(own))])
    who = site + "\0" + _together(rows, contract).astype(str)
    chosen = pd.Series(calibration_rows(_strata(rows, site, contract.task), list(who)))
    counts: Counts = []
    for name in tables:
        own = site == name
        for part, of_part in ((TEST, ~chosen), (CALIBRATION, chosen)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            if part == TEST or (own & of_part).any():
                _put(rows[own & of_part], folder / part / f"{name}.csv")
        counts.append(
            {
                "site": name,
                TEST: int((own & ~chosen).sum()),
                CALIBRATION: int((own & chosen).sum()),
            }
        )
    if chosen.any():
        return Split(counts, folder)
    note = (
        f"no calibration: it needs {NEEDED} test rows, of different persons or queries, and there "
        f"are {who.nunique()}"
    )
    return Split(counts, folder, (note,))


def _together(rows: pd.DataFrame, contract: Contract) -> pd.Series[Any]:
    """What stays in one part: the candidates of a query, the rows of a person, or each row."""
    task = contract.task
    return rows[task.query_column] if isinstance(task, Ranking) else units(rows, contract)


def _strata(rows: pd.DataFrame, site: pd.Series[str], task: Task) -> list[tuple[Any, ...]]:
    """Of each row its site and, where there are few, its label, or its number."""
    import pandas as pd

    if not isinstance(task, (Classification, Regression)):
        return list(zip(site, strict=True))
    label = rows[task.label_column]
    if isinstance(task, Regression):
        label = pd.to_numeric(label)
    return list(zip(site, label, strict=True))


def units(rows: pd.DataFrame, contract: Contract) -> pd.Series[Any]:
    """Whose each row is, where the contract has entities; else each is its own."""
    entity = contract.privacy.entity
    return rows[list(entity.key)].agg("\0".join, axis=1) if entity else rows.index.to_series()


def _write(
    table: pd.DataFrame,
    site: pd.Series[str],
    folder: Path,
    who: pd.Series[Any],
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
    """Whole or not at all: another process may be reading the same split. All cells are quoted, so
    that nothing in a column's name looks like a delimiter."""
    write_durably(file, rows.to_csv(index=False, quoting=csv.QUOTE_ALL).encode())
