"""A file is replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from silotune.common.runtime.atomic_files import write_durably


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "head"
    write_durably(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o600

    def fails(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("silotune.common.runtime.atomic_files.os.fsync", fails)
    with pytest.raises(OSError, match="no space"):
        write_durably(path, b"newer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    (tmp_path / "head").symlink_to(tmp_path / "elsewhere")
    write_durably(tmp_path / "head", b"mine")
    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"
    assert not (tmp_path / "head").is_symlink()
