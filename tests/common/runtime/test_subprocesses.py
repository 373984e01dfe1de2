"""What a process says is passed on a line at a time, whatever it is."""

from __future__ import annotations

import subprocess
import sys

from silotune.common.runtime import subprocesses


def said(script: str) -> list[str]:
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    lines: list[str] = []
    subprocesses.repeat_lines(process, lines.append).join(30)
    process.wait()
    return lines


def test_bytes_that_are_no_text_end_nothing() -> None:
    """nginx repeats what strangers send: no byte of theirs may stop the reading, or reach a
    terminal as a command."""
    found = said(r"import os; os.write(1, b'a \xff\xfe\x1b]0;owned\x07 b\nsecond\n')")
    assert found == ["a \ufffd\ufffd]0;owned b", "second"]


def test_colours_are_left_out_whole() -> None:
    assert said(r"print('\x1b[92mINFO \x1b[0m:      ready')") == ["INFO :      ready"]


def test_what_is_left_out_is_counted() -> None:
    found = said(
        "import time\nfor k in range(5):\n    for i in range(2000): print(i)\n    time.sleep(0.6)"
    )
    assert len(found) < 1500
    left = sum(int(line.split()[0][1:]) for line in found if "left out" in line)
    assert left > 0
    shown = len([line for line in found if "left out" not in line])
    assert shown + left <= 10_000
