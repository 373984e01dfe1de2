"""Locks between processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from silotune.common.runtime.process_lock import try_lock

HOLDER = """
import signal, sys
from pathlib import Path
from silotune.common.runtime.process_lock import try_lock
print(try_lock(Path(sys.argv[1])) is not None, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("name", ["folder", "file"])
def test_a_lock_is_one_process_at_a_time_and_ends_with_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert try_lock(path) is None
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    held = try_lock(path)
    assert held is not None
    assert try_lock(path) is None
    os.close(held)
    again = try_lock(path)
    assert again is not None
    os.close(again)


def test_a_link_that_another_user_put_there_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="link"):
        try_lock(tmp_path / "link")
