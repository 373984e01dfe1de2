"""A round is there or it is not: whatever a crash leaves behind is never taken for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from silotune.common.contract.contract import Contract
from silotune.common.errors import RunError
from silotune.common.protocol.messages import Arrays
from silotune.common.runtime.atomic_files import write_durably
from silotune.server.storage import run_store as module
from silotune.server.storage.run_store import RunStore

ADAPTER: Arrays = {
    "head.bias": np.array([1, 2], np.float32),
    "head.weight": np.ones((2, 3), np.float32),
}
STATE: Arrays = {"velocity/head.bias": np.zeros(2, np.float32)}


@pytest.fixture
def registry(tmp_path: Path, table_contract: Contract) -> RunStore:
    return RunStore.create(tmp_path / "runs" / "one", table_contract)


def commit(registry: RunStore, number: int) -> None:
    registry.commit(number, ADAPTER, STATE, {"round": number})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_create_writes_the_contract(registry: RunStore, table_contract: Contract) -> None:
    written = json.loads((registry.folder / "contract.json").read_text(encoding="utf-8"))
    assert Contract.model_validate(written).hash == table_contract.hash
    assert registry.rounds() == []


def test_create_refuses_a_folder_that_holds_a_run(
    registry: RunStore, table_contract: Contract
) -> None:
    commit(registry, 1)
    before = {p: p.read_bytes() for p in registry.folder.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="already holds a run") as caught:
        RunStore.create(registry.folder, table_contract.changed(quorum=1))
    assert caught.value.code == "E601"
    assert {p: p.read_bytes() for p in registry.folder.rglob("*") if p.is_file()} == before


def test_the_contract_is_utf8_wherever_it_runs(tmp_path: Path, table_contract: Contract) -> None:
    """A phrase such as 'Alter über 50' must not stop a run on a server with LANG=C."""
    dump = table_contract.model_dump(mode="json")
    dump["input"]["columns"][0]["phrase"] = "Alter über 50 岁"
    code = (
        "import json, sys; from pathlib import Path\n"
        "from silotune.common.contract.contract import Contract\n"
        "from silotune.server.storage.run_store import Registry\n"
        "Registry.create(Path(sys.argv[1]), Contract.model_validate(json.loads(sys.argv[2])))\n"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.defpath}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), json.dumps(dump)],
        env=plain,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-300:]
    written = (tmp_path / "run" / "contract.json").read_text(encoding="utf-8")
    assert Contract.model_validate_json(written).hash == Contract.model_validate(dump).hash


def test_a_committed_round(registry: RunStore) -> None:
    commit(registry, 1)
    folder = registry.folder / "rounds" / "0001"
    assert names(folder) == ["adapter.safetensors", "round.json", "state.safetensors"]
    assert names(registry.folder / "rounds") == ["0001"]
    read = load_file(folder / "adapter.safetensors")
    assert {n: a.tolist() for n, a in read.items()} == {n: a.tolist() for n, a in ADAPTER.items()}
    assert [facts["round"] for facts in registry.rounds()] == [1]


def test_arrays_keep_their_layout(registry: RunStore) -> None:
    """safetensors writes raw memory: a transposed view must not come back transposed."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    registry.release({"x": array.T, "y": np.asfortranarray(array), "z": array[:, ::2]})
    back = registry.adapter()
    np.testing.assert_array_equal(back["x"], array.T)
    np.testing.assert_array_equal(back["y"], array)
    np.testing.assert_array_equal(back["z"], array[:, ::2])


@pytest.mark.parametrize("where", ["rename", "round.json", "state"])
def test_a_crash_leaves_no_round(
    registry: RunStore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    commit(registry, 1)

    def crash(*_: Any, **__: Any) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        if where == "rename":
            patch.setattr(module, "rename_durably", crash)
        else:
            patch.setattr(
                module,
                "write_durably",
                lambda path, data: crash() if where in path.name else write_durably(path, data),
            )
        with pytest.raises(OSError, match="power cut"):
            commit(registry, 2)
    assert not (registry.folder / "rounds" / "0002").exists()
    assert [r["round"] for r in registry.rounds()] == [1]
    # What the crash left over is in nobody's way.
    commit(registry, 2)
    assert [r["round"] for r in registry.rounds()] == [1, 2]
    assert names(registry.folder / "rounds") == ["0001", "0002"]


def test_half_written_rounds_are_ignored(registry: RunStore) -> None:
    commit(registry, 1)
    half = registry.folder / "rounds" / ".0002.tmp"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    (half / "leftover").write_bytes(b"from another version")
    assert [r["round"] for r in registry.rounds()] == [1]
    commit(registry, 2)
    assert "leftover" not in names(registry.folder / "rounds" / "0002")


def test_a_round_is_committed_once(registry: RunStore) -> None:
    commit(registry, 1)
    with pytest.raises(OSError, match="not empty"):
        registry.commit(1, {}, {}, {"round": 99})
    assert [facts["round"] for facts in registry.rounds()] == [1]


def test_everything_is_on_the_disk_before_the_rename(
    registry: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files, then the folder that names them, then the rename, then the folder above."""
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    commit(registry, 1)
    # Each file is written under another name, is on the disk, gets its name, and that is on it too.
    assert ["rename" if s == "rename" else s.rpartition(".")[2] for s in steps] == [
        *(["tmp", "rename", "half"] * 3),
        "rename",
        "rounds",
    ]


def test_rounds_come_in_order(registry: RunStore) -> None:
    for number in (2, 10_000, 9_999, 1):
        commit(registry, number)
    assert [r["round"] for r in registry.rounds()] == [1, 2, 9_999, 10_000]


def test_release_is_atomic(registry: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="no released adapter"):
        registry.adapter()

    def crash(*_: Any) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(OSError, match="power cut"):
            registry.release(ADAPTER)
    with pytest.raises(RunError, match="did not finish") as caught:
        registry.adapter()
    assert caught.value.code == "E601"
    assert registry.release(ADAPTER) == registry.folder / "adapter.safetensors"
    assert registry.adapter().keys() == ADAPTER.keys()


def test_events_are_one_json_object_a_line(registry: RunStore) -> None:
    registry.event("run", run="a\nb", site="Königsberg\u2028x")
    registry.event("stopped", failed={"north": "E500"})
    lines = (registry.folder / "events.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    first, second = map(json.loads, lines)
    assert (first["event"], first["run"]) == ("run", "a\nb")
    assert second["failed"] == {"north": "E500"}
    assert second["at"] >= first["at"] > 1e9
