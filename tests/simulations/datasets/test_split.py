"""The split of a table: fixed, disjoint, by person where there are persons, the source's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from silotune.simulations.datasets.split import (
    calibration,
    filled,
    public_files,
    split,
    validation,
)
from silotune.simulations.datasets.tables import TABLES, Table
from tests import tiny
from tests.simulations.datasets.test_partition import contract_of, split_of


def rows_of(*files: Path) -> list[str]:
    return [row for file in files for row in pd.read_csv(file, dtype=str)["row"]]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """A table 'made-up' of two sites and 61 rows, by `person` of several rows each."""
    table = pd.DataFrame(
        {
            "site": ["b"] * 40 + ["a"] * 21,
            "row": [str(i) for i in range(61)],
            "person": [f"b{i % 12}" for i in range(40)] + [f"a{i % 9}" for i in range(21)],
        }
    )
    monkeypatch.setitem(TABLES, "made-up", Table("heart-disease-uci", table.copy))
    return table


def test_the_split_is_fixed_disjoint_and_a_quarter(made_up: pd.DataFrame, tmp_path: Path) -> None:
    counts = split("made-up", tmp_path / "one")
    assert counts == [{"site": "a", "train": 16, "test": 5}, {"site": "b", "train": 30, "test": 10}]
    split("made-up", tmp_path / "two")
    for path in (tmp_path / "one").rglob("*.csv"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()
    files = {part: sorted((tmp_path / "one" / part).iterdir()) for part in ("train", "test")}
    assert sorted(rows_of(*files["train"], *files["test"]), key=int) == list(made_up["row"])
    assert sorted(rows_of(tmp_path / "one" / "pooled.csv")) == sorted(rows_of(*files["train"]))


def test_a_person_is_on_one_side_with_all_rows(
    made_up: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_person = Table("heart-disease-uci", made_up.copy, entity="person")
    monkeypatch.setitem(TABLES, "made-up", by_person)
    split("made-up", tmp_path)
    for site, people in (("a", 9), ("b", 12)):
        files = [tmp_path / part / f"{site}.csv" for part in ("train", "test")]
        sides = [set(pd.read_csv(file)["person"]) for file in files]
        assert not sides[0] & sides[1]
        assert [len(side) for side in sides] == [people - people // 4, people // 4]


@pytest.mark.parametrize("unit", ["record", "entity"])
def test_rows_to_choose_by_are_training_rows_of_nobody_who_is_trained_on(
    tmp_path: Path, unit: str
) -> None:
    source, column = split_of(tmp_path / "rows"), "who" if unit == "entity" else "id"
    found = validation(source, contract_of(unit), tmp_path / "found")
    for site in ("a", "b"):
        before, train, test = (
            pd.read_csv(folder / f"{site}.csv")
            for folder in (source / "train", found / "train", found / "test")
        )
        assert sorted([*train["id"], *test["id"]]) == sorted(before["id"])
        assert not set(train[column]) & set(test[column])
        assert len(set(test[column])) == len(set(before[column])) // 4
    rows = pd.read_csv(found / "pooled.csv")["id"]
    assert sorted(rows) == sorted(
        row for site in "ab" for row in pd.read_csv(found / "train" / f"{site}.csv")["id"]
    )


def public_split(folder: Path, rows: pd.DataFrame) -> Path:
    """A split with these public rows, whose column `site` says where each is."""
    (folder / "test").mkdir(parents=True)
    for site, own in rows.groupby("site"):
        own.drop(columns="site").to_csv(folder / "test" / f"{site}.csv", index=False)
    return folder


def rows_to_calibrate(n: int, **columns: Any) -> pd.DataFrame:
    """n rows at two sites, of which `a` has a fifth; a fourth of each has label c, the others b."""
    rows = tiny.rows_of("classification", n)
    return pd.DataFrame(rows).assign(
        site=["a" if row % 5 == 0 else "b" for row in range(n)],
        label=["c" if row % 20 < 5 else "b" for row in range(n)],
        **columns,
    )


def ids(folder: Path, part: str) -> dict[str, list[str]]:
    files = public_files(folder, part)
    return {site: list(pd.read_csv(file, dtype=str)["id"]) for site, file in files.items()}


def test_rows_to_calibrate_by_are_no_test_rows_and_in_proportion_to_site_and_label(
    tmp_path: Path,
) -> None:
    rows, contract = rows_to_calibrate(400), tiny.contract_of("classification", "bert")
    source = public_split(tmp_path / "rows", rows)
    counts, folder, notes = calibration(source, contract, tmp_path / "public")
    assert not notes
    assert counts == [
        {"site": "a", "test": 64, "calibration": 16},
        {"site": "b", "test": 256, "calibration": 64},
    ]
    test, held = ids(folder, "test"), ids(folder, "calibration")
    for site in "ab":
        assert not set(test[site]) & set(held[site])
        whole = rows[rows["site"] == site]["id"]
        assert sorted([*test[site], *held[site]]) == sorted(whole)
        labels = pd.read_csv(folder / "calibration" / f"{site}.csv")["label"]
        assert (labels == "c").sum() == len(labels) / 4
    again = calibration(source, contract, tmp_path / "again").folder
    for file in folder.rglob("*.csv"):
        assert file.read_bytes() == (again / file.relative_to(folder)).read_bytes()


@pytest.mark.parametrize(("n", "held"), [(119, 0), (120, 40), (200, 40), (201, 41)])
def test_a_fifth_is_to_calibrate_by_but_never_too_few_rows(
    tmp_path: Path, n: int, held: int
) -> None:
    source = public_split(tmp_path / "rows", rows_to_calibrate(n))
    contract = tiny.contract_of("classification", "bert")
    counts, _, notes = calibration(source, contract, tmp_path / "public")
    assert sum(int(own["calibration"]) for own in counts) == held
    assert sum(int(own["test"]) for own in counts) == n - held
    few = "no calibration: it needs 120 test rows, of different persons or queries, and there are"
    assert notes == (() if held else (f"{few} {n}",))


@pytest.mark.parametrize("kind", ["bi", "classification"])
def test_candidates_of_a_query_and_rows_of_a_person_stay_together(
    tmp_path: Path, kind: str
) -> None:
    column = "query" if kind == "bi" else "person"
    rows = rows_to_calibrate(600, **{column: [f"p{row // 3}" for row in range(600)]})
    rows["site"] = ["a" if row < 150 else "b" for row in range(600)]
    one = {"key": ["person"], "max_records_per_entity": 3}
    contract = tiny.contract_of(kind, "bert")
    if kind == "classification":
        contract = contract.changed(privacy={"unit": "entity", "entity": one})
    counts, folder, _ = calibration(
        public_split(tmp_path / "rows", rows), contract, tmp_path / "public"
    )
    assert sum(int(own["calibration"]) for own in counts) == 3 * 40
    test, held = (
        {who for file in public_files(folder, part).values() for who in pd.read_csv(file)[column]}
        for part in ("test", "calibration")
    )
    assert not test & held
    assert len(held) == 40


def test_of_numbers_the_whole_range_is_to_calibrate_by(tmp_path: Path) -> None:
    """In order of the text 9 would stand behind 80."""
    rows = rows_to_calibrate(400).assign(label=[str(row) for row in range(400)])
    contract = tiny.contract_of("regression", "bert")
    _, folder, _ = calibration(public_split(tmp_path / "rows", rows), contract, tmp_path / "public")
    numbers = np.sort(pd.read_csv(folder / "calibration" / "b.csv")["label"])
    assert (np.diff(numbers) <= 10).all()  # of every fifth row one in five


def test_the_split_of_the_source_is_taken(
    made_up: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = made_up.assign(split=["test" if i % 10 == 0 else "train" for i in range(61)])
    monkeypatch.setitem(TABLES, "made-up", Table("heart-disease-uci", own.copy))
    split("made-up", tmp_path)
    assert rows_of(tmp_path / "test" / "b.csv") == ["0", "10", "20", "30"]
    assert list(pd.read_csv(tmp_path / "test" / "b.csv").columns) == ["row", "person"]


def test_files_of_sites_that_are_gone_are_removed(made_up: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.csv").write_text("row\n1\n")
    split("made-up", tmp_path)
    assert [path.name for path in sorted((tmp_path / "test").iterdir())] == ["a.csv", "b.csv"]


def test_another_process_never_reads_half_a_file(
    made_up: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Studies that start at the same time split the same table: each file is put there whole."""
    split("made-up", tmp_path)
    held = {file: file.open("rb") for file in tmp_path.rglob("*.csv")}
    before = {file: file.read_bytes() for file in held}

    def write(*_: object, **__: object) -> int:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", write)
        with pytest.raises(OSError, match="no space"):
            split("made-up", tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.csv")} == before
    split("made-up", tmp_path)
    for file, stream in held.items():
        with stream:
            assert stream.read() == before[file]  # what was open stays what it was
            assert file.stat().st_ino != Path(f"/proc/self/fd/{stream.fileno()}").stat().st_ino


@pytest.mark.parametrize("unit", ["record", "entity"])
def test_sites_are_filled_to_what_the_contract_expects(tmp_path: Path, unit: str) -> None:
    """Each record, or entity with all its rows, as often as the others, or once more."""
    contract = tiny.contract_of("classification", "one-hot", unit=unit)
    rows = tiny.rows_of("classification", 12)  # of 6 people, two rows each
    (tmp_path / "split" / "train").mkdir(parents=True)
    tiny.write(tmp_path / "split" / "train" / "north.csv", rows)
    place = filled(tmp_path / "split", contract, tmp_path / "filled")
    found = pd.read_csv(place / "train" / "north.csv", dtype=str)
    times = [1, 2] if unit == "record" else [2, 3]
    assert sorted(set(found["id"].value_counts())) == times
    who = found["person"] if unit == "entity" else found.index
    assert who.nunique() == 16
    assert len(found) == (32 if unit == "entity" else 16)
    first = {name.split(" (copy")[0] for name in found["person"]}
    assert first == {row["person"] for row in rows}


def test_more_rows_than_a_contract_expects_are_left_out(tmp_path: Path) -> None:
    contract = tiny.contract_of("classification", "one-hot")
    (tmp_path / "split" / "train").mkdir(parents=True)
    tiny.write(tmp_path / "split" / "train" / "north.csv", tiny.rows_of("classification", 40))
    files = [
        filled(tmp_path / "split", contract, tmp_path / place) / "train" / "north.csv"
        for place in ("one", "two")
    ]
    assert pd.read_csv(files[0], dtype=str)["id"].nunique() == 16
    assert files[0].read_bytes() == files[1].read_bytes()
