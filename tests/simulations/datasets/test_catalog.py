"""Fetching: hashes are checked, a missing network is one sentence."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from silotune.common.errors import DataError, UsageError
from silotune.common.model_files import model_folder
from silotune.simulations.datasets import catalog, gguf, pickled_table


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path))
    return tmp_path


def test_a_changed_file_is_refused(home: Path) -> None:
    folder = home / "sources" / "heart-disease-uci"
    folder.mkdir(parents=True)
    (folder / "heart_disease_uci.csv").write_text("id,age\n1,63\n")
    with pytest.raises(DataError, match="SHA-256") as error:
        catalog.fetch("heart-disease-uci")
    assert error.value.code == "E305"
    assert "Delete the folder" in str(error.value)


def test_no_network_is_one_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DataError, match="Is there a network") as error:
        catalog.fetch("heart-disease-uci")
    assert error.value.code == "E306"
    assert "\n" not in str(error.value)
    assert not (home / "sources" / "heart-disease-uci").exists()


def test_an_unknown_source_is_named(home: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'airline-tweets'"):
        catalog.fetch("airline-tweet")


GGUF, WEIGHTS = b"GGUF", b"weights"


def convert(file: Path, folder: Path) -> None:
    """Stands in for the conversion, which test_gguf_model.py tests."""
    assert file.read_bytes() == GGUF
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "tokenizer.json").write_bytes(b"{}")


def index_of(
    monkeypatch: pytest.MonkeyPatch, requirement: str, name: str, members: dict[str, bytes]
) -> None:
    """The index has the archive `name` with these members, and the catalogue has its SHA-256."""
    packed = io.BytesIO()
    if name.endswith(".whl"):
        with zipfile.ZipFile(packed, "w") as wheel:
            for member, content in members.items():
                wheel.writestr(member, content)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for member, content in members.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[4:6] == [requirement.partition("==")[0], name]
        Path(command[-1]).write_bytes(packed.getvalue())
        return subprocess.CompletedProcess([], 0, "", "")

    sha256 = hashlib.sha256(packed.getvalue()).hexdigest()
    monkeypatch.setitem(catalog.ARCHIVES, requirement, catalog.Archive(name, sha256))
    monkeypatch.setattr(catalog, "subprocess", types.SimpleNamespace(run=download))


@pytest.fixture
def model(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF source 'lm' on an index of its own; the cache's folder of sources, empty."""
    (home / "lm.gguf").write_bytes(GGUF)
    convert(home / "lm.gguf", home / "expected")
    sha256 = hashlib.sha256(GGUF).hexdigest()
    converted = model_folder.manifest(home / "expected").sha256
    source = catalog.Source("lm", "lm==1", "lm", ("lm.gguf",), sha256, "", "", converted)
    monkeypatch.setitem(catalog.SOURCES, "lm", source)
    index_of(monkeypatch, "lm==1", "lm-1-py3-none-any.whl", {"lm/lm.gguf": GGUF})
    monkeypatch.setattr(gguf, "find_spec", lambda _: True)
    monkeypatch.setattr(gguf, "convert", convert)
    return home / "sources"


def test_a_gguf_model_is_kept_as_what_it_converts_to(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert catalog.fetch("lm") == model / "lm"
    files = sorted(p.name for p in (model / "lm").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    monkeypatch.setattr(catalog.subprocess, "run", lambda *_, **__: pytest.fail("is there already"))
    assert catalog.fetch("lm") == model / "lm"
    for file, content in (("model.safetensors", b"other"), ("config.json", b'{"a": 1}')):
        before = (model / "lm" / file).read_bytes()
        (model / "lm" / file).write_bytes(content)
        with pytest.raises(DataError, match="Delete the folder"):
            catalog.fetch("lm")
        (model / "lm" / file).write_bytes(before)


def test_an_interrupted_conversion_leaves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: Path, folder: Path) -> None:
        convert(file, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            catalog.fetch("lm")
    assert list(model.iterdir()) == []
    assert catalog.fetch("lm").is_dir()


@pytest.mark.parametrize(
    ("which", "says"), [("GGUF", "lm==1 holds another file"), ("WEIGHTS", "constraints.txt")]
)
def test_another_gguf_and_other_weights_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, which: str, says: str
) -> None:
    monkeypatch.setitem(globals(), which, b"other")
    index_of(monkeypatch, "lm==1", "lm-1-py3-none-any.whl", {"lm/lm.gguf": GGUF})
    with pytest.raises(DataError, match=says) as error:
        catalog.fetch("lm")
    assert error.value.code == "E305"
    assert list(model.iterdir()) == []


def test_without_the_reader_nothing_is_downloaded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    monkeypatch.setattr(
        catalog.subprocess, "run", lambda *_, **__: pytest.fail("downloads in vain")
    )
    with pytest.raises(DataError, match="`pip install gguf`") as error:
        catalog.fetch("lm")
    assert "\n" not in str(error.value)
    assert not model.exists()


def test_a_source_archive_is_read_and_every_hash_checked(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = [hashlib.sha256(text).hexdigest() for text in (b"good\n", b"bad\n")]
    source = catalog.Source(
        "texts",
        "texts==1",
        "texts-1/t",
        ("a.txt", "b.txt"),
        hashes[0],
        "",
        "",
        others=(hashes[1],),
    )
    monkeypatch.setitem(catalog.SOURCES, "texts", source)
    index_of(
        monkeypatch,
        "texts==1",
        "texts-1.tar.gz",
        {"texts-1/t/a.txt": b"good\n", "texts-1/t/b.txt": b"bad\n"},
    )
    folder = catalog.fetch("texts")
    assert (folder / "b.txt").read_text() == "bad\n"
    (folder / "b.txt").write_text("other\n")
    with pytest.raises(DataError, match=r"b\.txt has SHA-256"):
        catalog.fetch("texts")


def test_a_pickled_table_is_kept_as_csv(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = io.BytesIO()
    pd.DataFrame({"a": [1.5, None], "b": ["x", ""]}).to_pickle(pickled, compression="xz")
    content, csv = pickled.getvalue(), b"a,b\n1.5,x\n,\n"
    members = ("t.pkl.compress",)
    sha256, converted = (hashlib.sha256(b).hexdigest() for b in (content, csv))
    source = catalog.Source("t", "t==1", "t", members, sha256, "", "", converted)
    monkeypatch.setitem(catalog.SOURCES, "t", source)
    index_of(monkeypatch, "t==1", "t-1-py3-none-any.whl", {"t/t.pkl.compress": content})
    folder = catalog.fetch("t")
    assert [path.name for path in folder.iterdir()] == [pickled_table.CSV]
    assert (folder / pickled_table.CSV).read_bytes() == csv


def test_another_pickle_is_not_even_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = catalog.Source("t", "t==1", "t", ("t.pkl.compress",), "0" * 64, "", "", "1" * 64)
    monkeypatch.setitem(catalog.SOURCES, "t", source)
    index_of(monkeypatch, "t==1", "t-1-py3-none-any.whl", {"t/t.pkl.compress": b"code"})
    monkeypatch.setattr(pickled_table, "convert", lambda *_: pytest.fail("was read"))
    with pytest.raises(DataError, match="t==1 holds another file"):
        catalog.fetch("t")


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
        catalog.fetch("banking77")
    (tmp_path / "banking77").mkdir()
    with pytest.raises(DataError, match=r"train\.csv does not exist"):
        catalog.fetch("banking77")
    (tmp_path / "banking77" / "train.csv").write_text("text,category\n")
    with pytest.raises(DataError, match="SHA-256"):
        catalog.fetch("banking77")
    assert not (catalog.home() / "sources" / "banking77").exists()


# --- an index, and a package that runs code when it is built ---------------------------------

BACKEND = """
from pathlib import Path
Path({marker!r}).touch()
def get_requires_for_build_wheel(settings=None): return []
get_requires_for_build_sdist = get_requires_for_build_wheel
def prepare_metadata_for_build_wheel(folder, settings=None): raise SystemExit
build_wheel = prepare_metadata_for_build_wheel
"""
SETUP = "from pathlib import Path\nPath({marker!r}).touch()\n"
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
POEM = b"a line\n"


class Index:
    """A package index with one source archive, on this machine."""

    def __init__(self, folder: Path) -> None:
        self.marker, self.pages = folder / "code-ran", folder / "simple"
        self.archive = self.pages / "poems" / "poems-1.tar.gz"
        self.archive.parent.mkdir(parents=True)
        self.pack({})

    def pack(self, more: dict[str, tarfile.TarInfo]) -> None:
        """Write the archive, with further members, and say its SHA-256 to pip as an index does."""
        marker = str(self.marker)
        members = {
            "poems-1/PKG-INFO": b"Metadata-Version: 2.1\nName: poems\nVersion: 1\n",
            "poems-1/pyproject.toml": PROJECT.encode(),
            "poems-1/text/poem.txt": POEM,
            "poems-1/backend.py": BACKEND.format(marker=marker).encode(),
            "poems-1/setup.py": SETUP.format(marker=marker).encode(),
        }
        with tarfile.open(self.archive, "w:gz") as archive:
            for name, content in members.items():
                if name not in more:
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
            for entry in more.values():
                archive.addfile(entry)
        (self.archive.parent / "index.html").write_text(
            f'<a href="poems-1.tar.gz#sha256={self.sha256}">poems-1.tar.gz</a>'
        )

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.archive.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The index that pip is configured to use, over HTTP; SOURCES has 'poems' from it."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    found = Index(tmp_path / "index")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(found.pages)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path / "home"))
    source = catalog.Source(
        "poems", "poems==1", "poems-1/text", ("poem.txt",), hashlib.sha256(POEM).hexdigest(), "", ""
    )
    monkeypatch.setitem(catalog.SOURCES, "poems", source)
    monkeypatch.setitem(
        catalog.ARCHIVES, "poems==1", catalog.Archive("poems-1.tar.gz", found.sha256)
    )
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_source_archives_code_does_not_run(index: Index) -> None:
    folder = catalog.fetch("poems")
    assert [(p.name, p.read_bytes()) for p in folder.iterdir()] == [("poem.txt", POEM)]
    assert not index.marker.exists()


def test_pip_itself_would_run_that_code(index: Index, tmp_path: Path) -> None:
    """What the test above is worth: `pip download` runs the build backend of this archive."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--dest",
            str(tmp_path / "to"),
            "poems==1",
        ],
        capture_output=True,
        check=False,
    )
    assert index.marker.exists()


def test_an_index_of_files_serves_too(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index.pages.as_uri())
    monkeypatch.setenv("PIP_ONLY_BINARY", ":all:")
    assert (catalog.fetch("poems") / "poem.txt").read_bytes() == POEM
    assert not index.marker.exists()


def test_another_archive_is_refused_before_anything_in_it_is_read(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index.pack({"poems-1/more": tarfile.TarInfo("poems-1/more")})
    monkeypatch.setattr(catalog, "_open", lambda _: pytest.fail("the archive was read"))
    with pytest.raises(DataError, match=r"poems-1\.tar\.gz has SHA-256") as error:
        catalog.fetch("poems")
    assert error.value.code == "E305"
    assert list((tmp_path / "home" / "sources").iterdir()) == []
    assert not index.marker.exists()


def test_the_archive_with_the_right_hash_is_taken_of_several_with_one_name(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = Index(tmp_path / "other")  # has another marker in it, so another hash
    assert other.sha256 != index.sha256
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", other.pages.as_uri())
    assert catalog.fetch("poems").is_dir()
    monkeypatch.setitem(
        catalog.ARCHIVES, "poems==1", catalog.Archive("poems-1.tar.gz", other.sha256)
    )
    shutil.rmtree(tmp_path / "home")
    assert catalog.fetch("poems").is_dir()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, b"absent"])
def test_a_member_that_is_no_regular_file_is_refused(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: bytes
) -> None:
    """Also with the right hash: a link could lead to another member or out of the archive."""
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    name = "poems-1/text/poem.txt"
    entry = tarfile.TarInfo(name if kind != b"absent" else "elsewhere")
    entry.type = kind if kind != b"absent" else tarfile.REGTYPE
    entry.linkname = str(secret) if kind == tarfile.SYMTYPE else "poems-1/PKG-INFO"
    index.pack({name: entry})
    monkeypatch.setitem(
        catalog.ARCHIVES, "poems==1", catalog.Archive("poems-1.tar.gz", index.sha256)
    )
    with pytest.raises(DataError, match=r"no regular file poems-1/text/poem\.txt") as error:
        catalog.fetch("poems")
    assert error.value.code == "E305"


def test_members_that_nobody_asks_for_are_not_unpacked(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    more = {name: tarfile.TarInfo(name) for name in (str(outside), "../outside", "poems-1/../x")}
    index.pack(more)
    monkeypatch.setitem(
        catalog.ARCHIVES, "poems==1", catalog.Archive("poems-1.tar.gz", index.sha256)
    )
    folder = catalog.fetch("poems")
    assert [path.name for path in folder.iterdir()] == ["poem.txt"]
    assert not outside.exists()
    assert [p.name for p in (tmp_path / "home" / "sources").iterdir()] == ["poems"]


def test_a_file_that_no_index_has_is_one_sentence(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.archive.unlink()
    for name, why in (("poems-1.tar.gz", "404"), ("poems-2.tar.gz", "no index that pip uses has")):
        monkeypatch.setitem(
            catalog.ARCHIVES, "poems==1", catalog.Archive(name, index_hash := "0" * 64)
        )
        with pytest.raises(DataError, match=why) as error:
            catalog.fetch("poems")
        assert error.value.code == "E306"
        assert "\n" not in str(error.value)
        assert index_hash not in str(error.value)


def test_every_source_on_an_index_has_its_archive() -> None:
    requirements = {
        source.requirement
        for source in catalog.SOURCES.values()
        if source.requirement not in (catalog.LAID, catalog.SHIPPED)
    }
    assert requirements == set(catalog.ARCHIVES)
    for requirement, archive in catalog.ARCHIVES.items():
        project, version = requirement.split("==")
        assert archive.file.lower().replace("_", "-").startswith(f"{project}-{version}")
        assert archive.file.endswith((".whl", ".tar.gz"))
        assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
