"""What `silotune doctor` says of a machine: each thing that is wrong is found and has a remedy."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from silotune.common.runtime import machine
from silotune.common.runtime.check import Check, table


def named(rows: Iterator[Check], name: str) -> Check:
    (found,) = (row for row in rows if row.name == name)
    return found


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """cgroup(file=number, …): the limits of a container."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)

    def limit(**numbers: object) -> None:
        for name, number in numbers.items():
            (tmp_path / name.replace("_", ".")).write_text(f"{number}\n")

    return limit


def test_a_folder_that_takes_files_is_fine_and_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet"
    found = machine.folder("cache", path, "another folder")
    assert (found.state, found.name) == ("ok", "cache")
    assert str(path) in found.result
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("needed", "state"), [(True, "problem"), (False, "warning")])
def test_a_folder_that_takes_no_file(tmp_path: Path, needed: bool, state: str) -> None:
    file = tmp_path / "file"
    file.touch()
    found = machine.folder("cache", file, "another folder", needed=needed)
    assert (found.state, found.fix) == (state, "another folder")
    assert f"{file} cannot be written to: Not a directory" in found.result


@pytest.mark.parametrize(("free", "state"), [(1 << 20, "problem"), (1 << 29, "warning")])
def test_a_disk_with_little_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = machine.folder("cache", tmp_path, "another folder")
    assert (found.state, found.fix.startswith("free ")) == (state, True)
    assert f"{free >> 20} MB are free" in found.result


def test_the_memory_is_that_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: Callable[..., None]
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 64000000 kB\nMemAvailable: 6291456 kB\n")
    monkeypatch.setattr(machine, "MEMORY", meminfo)
    cgroup(memory_max="max")
    found = named(machine.checks(), "memory")
    assert found.state == "ok"
    assert found.result.endswith("6.0 GB available")
    cgroup(memory_max=3 << 30, memory_current=2 << 30)
    found = named(machine.checks(), "memory")
    assert (found.state, "3.0 GB memory, 1.0 GB" in found.result) == ("warning", True)
    assert "processes=1" in found.fix


def test_a_clock_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(machine.checks(), "clock").state == "ok"
    monkeypatch.setattr("time.time", lambda: 0.0)
    found = named(machine.checks(), "clock")
    assert found.state == "warning"
    assert found.result.startswith("1970-01-01 00:00 UTC is before")


@pytest.mark.parametrize(
    ("mask", "state", "words"),
    [
        (0o002, "warning", "002: other users can write"),
        (0o022, "ok", "022: other users can read, but not write, the files"),
        (0o077, "ok", "077: only you can read the files"),
    ],
)
def test_a_umask_that_lets_others_write(mask: int, state: str, words: str) -> None:
    before = os.umask(mask)
    try:
        found = named(machine.checks(), "umask")
    finally:
        assert os.umask(before) == mask
    assert (found.state, found.result.startswith(words)) == (state, True)


def test_limits_that_are_too_low(
    monkeypatch: pytest.MonkeyPatch, cgroup: Callable[..., None]
) -> None:
    limits = {resource.RLIMIT_NOFILE: 256, resource.RLIMIT_NPROC: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], limits[which]))
    rows = list(machine.checks())
    files, processes = named(iter(rows), "open files"), named(iter(rows), "processes")
    assert (files.state, files.result) == ("warning", "at most 256 at once")
    assert "ulimit -n 1024" in files.fix
    assert (processes.state, processes.result.split(",")[0]) == ("ok", "at most any number")
    cgroup(pids_max=100, pids_current=40)
    processes = named(machine.checks(), "processes")
    assert processes.state == "warning"
    assert processes.result.startswith("at most 60,")
    limits[resource.RLIMIT_NPROC] = 20
    assert named(machine.checks(), "processes").result.startswith("at most 20,")


def test_a_machine_that_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(machine.checks(), "subprocess").state == "ok"

    def none(*_: Any, **__: Any) -> None:
        raise BlockingIOError

    monkeypatch.setattr(subprocess, "run", none)
    found = named(machine.checks(), "subprocess")
    assert (found.state, "BlockingIOError" in found.result) == ("problem", True)
    assert found.fix


def test_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: f"GPU {at}")

    def memory(at: int) -> tuple[int, int]:
        if at:
            raise RuntimeError("CUDA error")
        return 30 << 30, 80 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    first, second, third = machine.devices()
    assert (first.name, first.state) == ("torch", "ok")
    assert torch.__version__ in first.result
    assert second.result == "GPU 0, 80.0 GB memory, 30.0 GB free"
    assert (third.name, third.state) == ("cuda:1", "problem")


@pytest.mark.parametrize(("cuda", "fix"), [(None, "CUDA build of torch"), ("13.0", "nvidia-smi")])
def test_a_gpu_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, fix: str
) -> None:
    driver = tmp_path / "version"
    driver.touch()
    monkeypatch.setattr(machine, "NVIDIA", driver)

    def unavailable() -> bool:
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (found,) = machine.devices()
    assert (found.state, fix in found.fix) == ("warning", True)
    assert (Path(__file__).parents[3] / machine.GPU_PAGE).is_file()


def test_a_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (found,) = machine.devices()
    assert (found.name, found.state) == ("torch", "problem")
    assert "--force-reinstall torch" in found.fix


def test_the_table_shows_signs_remedies_and_what_is_for_the_owner() -> None:
    rows = [
        Check("one", "ok", "fine", "not shown"),
        Check("second", "warning", "odd", "do this"),
        Check("third", "problem", "bad", "do that", local="cell 'x'"),
    ]
    assert table(rows, end="Nothing was spent.") == [
        "  Check   Result",
        "✓ one     fine",
        "! second  odd",
        "          → do this",
        "✗ third   bad",
        "          → do that",
        "Not ready: 1 problem, 1 warning. Nothing was spent.",
    ]
    assert "          on your screen only: cell 'x'" in table(rows, local=True)
    assert table(rows[:1])[-1] == "Ready: 0 problems, 0 warnings."
