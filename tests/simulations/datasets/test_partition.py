"""Rows dealt anew: all of them, to the sites that there are, as skewed as was asked, by a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.common.contract.contract import Contract
from silotune.common.errors import DataError, UsageError
from silotune.simulations.datasets.partition import Partition, deal, draw, repartition

FUZZ = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def skew(groups: np.ndarray, sites: np.ndarray) -> float:
    """The mean over the sites of the total variation between their labels and all labels."""
    every = np.bincount(groups) / len(groups)
    return float(
        np.mean(
            [
                np.abs(
                    np.bincount(groups[sites == s], minlength=len(every)) / (sites == s).sum()
                    - every
                ).sum()
                / 2
                for s in np.unique(sites)
            ]
        )
    )


@FUZZ
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.sampled_from(["iid", "labels", "quantity"]))
def test_every_row_goes_to_one_site_and_each_site_has_some(
    seed: int, sites: int, kind: str
) -> None:
    groups = np.random.default_rng(seed).integers(0, 3, 400)
    partition = Partition.model_validate({"kind": kind} | ({} if kind == "iid" else {"alpha": 1.0}))
    found = deal(groups, sites, partition, np.random.default_rng(seed))
    assert found.shape == groups.shape
    counts = np.bincount(found, minlength=sites)
    assert len(counts) == sites
    assert counts.min() >= 8
    if kind == "iid":
        assert counts.max() - counts.min() <= 1
    again = deal(groups, sites, partition, np.random.default_rng(seed))
    assert (found == again).all()


def test_the_smaller_alpha_the_more_skewed() -> None:
    groups = np.random.default_rng(0).integers(0, 4, 2000)
    means = [
        np.mean(
            [
                skew(
                    groups,
                    deal(
                        groups,
                        4,
                        Partition(kind="labels", alpha=alpha),
                        np.random.default_rng(seed),
                    ),
                )
                for seed in range(10)
            ]
        )
        for alpha in (0.1, 1.0, 100.0)
    ]
    assert means[0] > 0.4 > means[1] > 0.1 > means[2]
    sizes = np.bincount(
        deal(groups, 4, Partition(kind="quantity", alpha=0.3), np.random.default_rng(0))
    )
    assert sizes.max() > 2 * sizes.min()
    alike = deal(groups, 4, Partition(kind="quantity", alpha=0.3), np.random.default_rng(0))
    assert skew(groups, alike) < 0.1


def test_what_cannot_be_dealt_is_said() -> None:
    with pytest.raises(DataError, match="Take a larger alpha"):
        deal(
            np.zeros(20, dtype=np.int64),
            4,
            Partition(kind="quantity", alpha=0.1),
            np.random.default_rng(0),
        )
    for wrong in (
        {"kind": "labels"},
        {"kind": "iid", "alpha": 1.0},
        {"kind": "column", "alpha": 1.0},
    ):
        with pytest.raises(ValidationError):
            Partition.model_validate(wrong)


def contract_of(unit: str = "record") -> Contract:
    privacy: dict[str, object] = {"expected_units": 40.0, "unit": unit}
    if unit == "entity":
        privacy["entity"] = {"key": ["who"], "max_records_per_entity": 3}
    return Contract.model_validate(
        {
            "format": 1,
            "name": "dealt",
            "quorum": 1,
            "task": {
                "label_column": "ill",
                "labels": [{"name": "no", "values": ["0"]}, {"name": "yes", "values": ["1"]}],
            },
            "input": {
                "kind": "table",
                "columns": [
                    {
                        "kind": "category",
                        "name": "smoker",
                        "phrase": "smokes",
                        "values": {"yes": "yes", "no": "no"},
                    }
                ],
            },
            "model": {"kind": "one-hot"},
            "privacy": privacy,
            "phases": [{"trains": "head", "rounds": 1, "sampling_rate": 1.0, "head_lr": 1.0}],
            "sites": [{"name": "a"}, {"name": "b"}],
        }
    )


def split_of(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        for site in ("a", "b"):
            pd.DataFrame(
                {
                    "id": [f"{part}-{site}-{k}" for k in range(100)],
                    "who": [f"{site}{k // 4}" for k in range(100)],
                    "smoker": rng.choice(["yes", "no"], 100),
                    "ill": rng.choice(["0", "1"], 100),
                }
            ).to_csv(folder / part / f"{site}.csv", index=False)
    pd.concat(pd.read_csv(folder / "train" / f"{s}.csv") for s in "ab").to_csv(
        folder / "pooled.csv", index=False
    )
    return folder


def split_where_smokers_are_ill(folder: Path) -> Path:
    """The same rows, with something to learn in them."""
    source = split_of(folder)
    for file in [*source.glob("t*/*.csv"), source / "pooled.csv"]:
        rows = pd.read_csv(file, dtype=str)
        rows["ill"] = (rows["smoker"] == "yes").astype(int)
        rows.to_csv(file, index=False)
    return source


@pytest.mark.parametrize("unit", ["record", "entity"])
@pytest.mark.parametrize(
    "partition",
    [
        {"kind": "iid"},
        {"kind": "labels", "alpha": 0.5},
        {"kind": "quantity", "alpha": 1.0},
        {"kind": "column", "alpha": 0.5, "column": "smoker"},
    ],
)
def test_files_hold_all_training_rows_once_and_no_entity_is_cut(
    tmp_path: Path, partition: dict[str, object], unit: str
) -> None:
    source, contract = split_of(tmp_path / "natural"), contract_of(unit)
    made = repartition(
        source, tmp_path / "new", contract, ["a", "b"], Partition.model_validate(partition), 0
    )
    rows = {s: pd.read_csv(made / "train" / f"{s}.csv", dtype=str) for s in ("a", "b")}
    before = pd.read_csv(source / "pooled.csv", dtype=str)
    assert sorted(pd.concat(rows.values())["id"]) == sorted(before["id"])
    if unit == "entity":
        assert not set(rows["a"]["who"]) & set(rows["b"]["who"])
    for file in ("test/a.csv", "test/b.csv", "pooled.csv"):
        assert (made / file).read_bytes() == (source / file).read_bytes()
    draw(made, contract, ["a", "b"], "rows", tmp_path / "rows.svg")
    assert "training rows" in (tmp_path / "rows.svg").read_text()


def test_labels_are_of_few(tmp_path: Path) -> None:
    source, data = split_of(tmp_path / "natural"), contract_of().model_dump(mode="json")
    data["task"] = {"kind": "regression", "label_column": "ill", "lowest": 0.0, "highest": 1.0}
    with pytest.raises(UsageError, match="a task of regression"):
        repartition(
            source,
            tmp_path / "new",
            Contract.model_validate(data),
            ["a", "b"],
            Partition(kind="labels", alpha=1.0),
            0,
        )


def test_natural_rows_stay_where_they_are_and_an_unknown_column_is_named(tmp_path: Path) -> None:
    source, contract = split_of(tmp_path / "natural"), contract_of()
    assert repartition(source, tmp_path / "new", contract, ["a", "b"], Partition(), 0) == source
    with pytest.raises(DataError, match="'age' is not in"):
        repartition(
            source,
            tmp_path / "new",
            contract,
            ["a", "b"],
            Partition(kind="column", alpha=1.0, column="age"),
            0,
        )
