"""Room for frozen outputs: memory, or a file without a name that ends with the process."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from silotune.client.privacy.accountant import Mechanism
from silotune.client.training import dataset, dp_optimizer
from silotune.client.training.local_round import train_round
from silotune.client.training.noise import NoiseSource
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.data.records import table
from silotune.common.errors import DataError
from silotune.common.models import activation_cache, adapted
from silotune.common.models.activation_cache import allocate
from silotune.common.models.encoder import Encoder

Rows = Callable[..., Path]
LIMIT = 4096  # bytes


def mapped(folder: Path, process: str = "self") -> list[str]:
    """What a process has mapped or open of files in `folder`."""
    found = [
        line
        for line in Path(f"/proc/{process}/maps").read_text().splitlines()
        if str(folder) in line
    ]
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        found += [target] if target.startswith(str(folder)) else []
    return found


def test_what_fits_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", pytest.fail)
    found = allocate(32, 32, torch.float32, most_bytes=LIMIT, folder=tmp_path / "not there")
    assert found.shape == (32, 32)
    assert found.dtype == torch.float32
    assert not found.any()
    assert not mapped(tmp_path)
    assert len(allocate(0, 384, torch.float32, most_bytes=0, folder=None)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_is_in_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = LIMIT // 32 // dtype.itemsize
    for more in (0, 1):
        found = allocate(rows + more, 32, dtype, most_bytes=LIMIT, folder=tmp_path)
        assert bool(mapped(tmp_path)) is bool(more)
        assert found.shape == (rows + more, 32)
        assert found.dtype == dtype
        assert not found.any()


def test_the_file_has_no_name_and_is_its_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, int, int]] = []
    seen: list[os.stat_result] = []
    original, fallocate = os.open, os.posix_fallocate

    def spy(path: Any, flags: int, mode: int = 0o777) -> int:
        asked.append((path, flags, mode))
        return original(path, flags, mode)

    def facts(file: int, start: int, size: int) -> None:
        fallocate(file, start, size)
        seen.append(os.fstat(file))

    before = os.umask(0)  # the mode is asked for, and not only what a umask leaves of it
    try:
        monkeypatch.setattr(os, "open", spy)
        monkeypatch.setattr(os, "posix_fallocate", facts)
        found = allocate(100, 100, torch.float32, most_bytes=LIMIT, folder=tmp_path)
    finally:
        os.umask(before)
        monkeypatch.undo()
    ((place, flags, mode),) = asked
    assert place == tmp_path
    assert flags & os.O_TMPFILE == os.O_TMPFILE
    assert flags & os.O_CLOEXEC
    assert mode == 0o600
    assert stat.S_IMODE(seen[0].st_mode) == 0o600
    assert (seen[0].st_nlink, seen[0].st_size) == (0, 40_000)
    assert seen[0].st_blocks * 512 >= 40_000  # the room is taken now
    found += 1
    assert list(tmp_path.iterdir()) == []
    # The file's descriptor is closed; the one that the mapping holds is not for a child.
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith(str(tmp_path)):
                assert not os.get_inheritable(int(number))
        except OSError:
            continue


def test_what_is_written_is_read_and_the_room_is_given_back(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    wanted = torch.randn(300, 64, generator=g)
    one, two = (
        allocate(300, 64, torch.float32, most_bytes=LIMIT, folder=tmp_path) for _ in range(2)
    )
    one[:] = wanted
    two[:] = 0.5
    part = one[100:200].clone()
    assert torch.equal(one, wanted)
    assert bool((two == 0.5).all())
    half = one[:7]  # a view keeps the file
    assert mapped(tmp_path)
    del one, two
    assert torch.equal(half, wanted[:7])
    del half
    assert not mapped(tmp_path)
    assert torch.equal(part, wanted[100:200])


def test_without_a_folder_it_is_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = allocate(100, 100, torch.float32, most_bytes=LIMIT, folder=None)
    assert mapped(tmp_path)
    assert found.shape == (100, 100)


CHILD = """
import sys, time
from pathlib import Path
import torch
from silotune.common.models.activation_cache import allocate
found = allocate(2000, 1000, torch.float32, most_bytes=1, folder=Path(sys.argv[1]))
found[:] = 7.0
print("ready", flush=True)
time.sleep(60)
print(found.sum())
"""


def test_nothing_is_left_of_a_process_that_is_killed(tmp_path: Path) -> None:
    """While it lives the records' outputs lie on the disk without a name; then they are gone."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert list(tmp_path.iterdir()) == []
        lines = mapped(tmp_path, str(child.pid))
        assert lines
        assert all(line.endswith("(deleted)") for line in lines)
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        assert child.stdout is not None
        child.stdout.close()
    assert list(tmp_path.iterdir()) == []
    assert not Path(f"/proc/{child.pid}/maps").exists()


def test_a_full_disk_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DataError) as error:
        allocate(10_000, 1_000, torch.float32, most_bytes=LIMIT, folder=tmp_path)
    assert error.value.code == "E308"
    assert str(error.value) == (
        f"The frozen layers' outputs need a file of 38 MB in {tmp_path}, which cannot be had: No "
        "space left on device. Make room there, name another folder (performance.cache_folder), or "
        "allow more memory (performance.cache_megabytes)."
    )
    assert error.value.local == ""
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["absent", "a file"])
def test_a_folder_that_is_none_is_told(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(DataError, match=r"performance\.cache_folder") as error:
        allocate(100, 100, torch.float32, most_bytes=LIMIT, folder=tmp_path / wrong)
    assert error.value.code == "E308"
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_that_cannot_hold_such_a_file_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have no files without a name: never one with a name instead."""

    def unknown(*_: Any) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "open", unknown)
    with pytest.raises(DataError, match="Operation not supported") as error:
        allocate(100, 100, torch.float32, most_bytes=LIMIT, folder=tmp_path)
    assert error.value.code == "E308"
    assert list(tmp_path.iterdir()) == []


# The encoder's outputs in a file


class Silent(NoiseSource):
    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.zeros(shape)


@pytest.mark.download
@pytest.mark.parametrize("bf16", ["off", "on"])
def test_training_from_a_file_is_training_from_memory_bit_by_bit(
    lora_contract: Contract,
    encoder_folder: Path,
    write_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bf16: str,
) -> None:
    monkeypatch.setattr(dp_optimizer, "NOISE_ROUNDING_LOG2", -40)
    folder = tmp_path / "cache"
    folder.mkdir()
    rows = table(write_rows(tmp_path / "rows.csv", 24))
    model = Encoder(
        lora_contract,
        encoder_folder,
        Performance.model_validate({"bf16": bf16, "cache_folder": folder}),
    )
    rng = np.random.default_rng(0)
    adapter = {
        n: a if n.endswith("lora_A") else rng.normal(0, 0.05, a.shape).astype(np.float32)
        for n, a in model.initial_arrays().items()
    }
    limits: list[int] = []

    def tiny(*shape: Any, most_bytes: int, folder: Path | None) -> torch.Tensor:
        limits.append(most_bytes)
        return activation_cache.allocate(*shape, most_bytes=1 << 10, folder=folder)

    changes, features = [], []
    for put in (allocate, tiny):
        monkeypatch.setattr(adapted, "allocate", put)
        dataset._encode.cache_clear()
        data = dataset.load(rows, lora_contract, model)
        assert bool(mapped(folder)) is (put is tiny)
        assert list(folder.iterdir()) == []
        features.append(data.encoded.features)
        changes.append(
            train_round(
                lora_contract,
                lora_contract.round_plan(2),
                Mechanism(1.0, 1.0, 2),
                model,
                data,
                adapter,
                Silent(site="x"),
                0.1,
            )[0]
        )
    assert limits == [4096 << 20]
    assert torch.equal(features[0], features[1])
    for name, change in changes[0].items():
        assert np.array_equal(change, changes[1][name])
        assert change.any()
    del data
    dataset._encode.cache_clear()
    assert not mapped(folder)


@pytest.mark.download
def test_encoding_again_does_not_pile_up_files(
    lora_contract: Contract, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Encoder(lora_contract, encoder_folder, Performance(cache_folder=tmp_path))
    monkeypatch.setattr(
        adapted,
        "allocate",
        lambda *shape, most_bytes, folder: activation_cache.allocate(
            *shape, most_bytes=1, folder=folder
        ),
    )
    rows = [(0, 1), (1, None), (0, 0)]
    for _ in range(3):
        encoded = model.encode(rows)
        assert encoded.hidden is not None
    assert len([line for line in mapped(tmp_path) if not line.startswith("/")]) == 1
    with torch.no_grad():
        assert model(encoded, torch.arange(3), adapter=True).shape == (3, 2)
