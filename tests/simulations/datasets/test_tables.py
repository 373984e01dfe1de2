"""The recipes' tables: the sites that the pages promise, nobody on both sides, always the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from silotune.common.data import records
from silotune.common.errors import DataError
from silotune.simulations.comparison.recipe import load_recipe, recipe_names
from silotune.simulations.datasets.split import split
from silotune.simulations.datasets.tables import TABLES

pytestmark = pytest.mark.download

# Training and public test rows of each site.
SITES = {
    "heart": {
        "Cleveland": (228, 76),
        "Hungary": (220, 73),
        "Switzerland": (93, 30),
        "VA Long Beach": (150, 50),
    },
    "airlines": {
        "American": (1946, 648),
        "JetBlue": (1656, 551),
        "Southwest": (1808, 602),
        "US Airways": (2180, 726),
        "United": (2854, 951),
        "Virgin America": (378, 125),
    },
    "thyroid": {"STMW": (192, 63), "SVHC": (717, 239), "SVI": (1796, 598), "other": (4120, 1373)},
    "lending-club": {
        "CA": (993, 331),
        "FL": (549, 182),
        "GA": (240, 80),
        "IL": (316, 105),
        "NJ": (262, 87),
        "NY": (576, 191),
        "OH": (246, 82),
        "TX": (675, 225),
    },
    "credit": {
        "Silo A": (558, 185),
        "Silo B": (558, 185),
        "Silo C": (557, 185),
        "Silo D": (557, 185),
        "Silo E": (557, 185),
        "Silo F": (557, 185),
    },
    "card-fraud": {
        "Bank A": (34761, 11586),
        "Bank B": (70398, 23466),
        "Bank C": (34768, 11589),
        "Bank D": (66818, 22272),
    },
    "medical-cost": {
        "Site 1": (3352, 1110),
        "Site 2": (3030, 1006),
        "Site 3": (1817, 619),
        "Site 4": (2304, 786),
        "Site 5": (1942, 653),
        "Site 6": (2662, 909),
    },
    "ratings": {
        "Group A": (17327, 8303),
        "Group B": (18264, 6382),
        "Group C": (19261, 5397),
        "Group D": (19485, 5581),
    },
    "r8": {
        "Desk A": (1377, 542),
        "Desk B": (1362, 557),
        "Desk C": (1368, 550),
        "Desk D": (1378, 540),
    },
    "market": {
        "Desk A": (1372, 547),
        "Desk B": (1371, 548),
        "Desk C": (1371, 547),
        "Desk D": (1371, 547),
    },
    "chinese": {
        "Shop A": (3256, 1085),
        "Shop B": (3255, 1085),
        "Shop C": (3255, 1085),
        "Shop D": (3255, 1085),
    },
    "service-answers": {
        "Bank A": (304, 84),
        "Bank B": (350, 64),
        "Bank C": (339, 94),
        "Bank D": (335, 82),
        "Bank E": (364, 76),
    },
    "banking77": {
        "Bank A": (1997, 620),
        "Bank B": (2023, 594),
        "Bank C": (1971, 646),
        "Bank D": (1999, 617),
        "Bank E": (2013, 603),
    },
    "ncbi-disease": {
        "Block A": (1589, 235),
        "Block B": (1589, 235),
        "Block C": (1589, 235),
        "Block D": (1588, 235),
    },
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tables that have been split so far, each once."""
    return {}


@pytest.fixture
def folder(table: str, splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`table` as files; skips where its source cannot be had."""
    if table not in splits:
        made = tmp_path_factory.mktemp(table)
        _split(table, made)
        splits[table] = made
    return splits[table]


def _split(table: str, to: Path) -> list[dict[str, int | str]]:
    try:
        return split(table, to)
    except DataError as error:
        pytest.skip(f"the data cannot be had: {error}")


@pytest.mark.parametrize("table", TABLES)
def test_the_sites_are_those_promised_and_always_the_same(
    table: str, folder: Path, tmp_path: Path
) -> None:
    counts = _split(table, tmp_path)
    found = {str(c["site"]): (c["train"], c["test"]) for c in counts}
    assert found == SITES[table]
    for file in folder.rglob("*.csv"):
        assert file.read_bytes() == (tmp_path / file.relative_to(folder)).read_bytes()


@pytest.mark.parametrize("table", [name for name, kind in TABLES.items() if kind.entity])
def test_nobody_is_on_both_sides_or_at_two_sites(table: str, folder: Path) -> None:
    key = TABLES[table].entity
    seen: set[str] = set()
    for file in [*folder.glob("train/*.csv"), *folder.glob("test/*.csv")]:
        people = set(pd.read_csv(file, dtype=str)[key])
        assert people
        assert not people & seen
        seen |= people


@pytest.mark.parametrize(
    ("name", "table"), [(name, load_recipe(name).table) for name in recipe_names()]
)
def test_a_recipe_reads_its_table(name: str, table: str, folder: Path) -> None:
    contract = load_recipe(name).contract
    assert set(contract.weights()) == set(SITES[table])
    for part in (0, 1):
        for site, rows in SITES[table].items():
            found = records.table(folder / ("train", "test")[part] / f"{site}.csv")
            assert len(found.rows) == rows[part]
            some = dataclasses.replace(found, rows=found.rows[:5000])
            assert len(records.parse(some, contract)) == len(some.rows)


@pytest.mark.parametrize("table", ["ncbi-disease"])
def test_a_sentence_has_as_many_tags_as_words(table: str, folder: Path) -> None:
    rows = pd.read_csv(folder / "pooled.csv", dtype=str, keep_default_na=False)
    assert (rows["words"].str.split().str.len() == rows["tags"].str.split().str.len()).all()
    assert set(" ".join(rows["tags"]).split()) == {"O", "B-Disease", "I-Disease"}


@pytest.mark.parametrize("table", ["chinese"])
def test_no_review_stands_twice(table: str, folder: Path) -> None:
    files = [*folder.glob("train/*.csv"), *folder.glob("test/*.csv")]
    texts = pd.concat(pd.read_csv(file, dtype=str) for file in files)["text"]
    assert texts.is_unique
