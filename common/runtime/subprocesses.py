"""A supervisor's child processes: what they say, and that none of them is left (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

SET_DEATH_SIGNAL, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS = 1, 36, 38  # linux/prctl.h
QUIET = 5  # looks in a row at which nobody is there: one that forks can hide from a single one
MOST_PROCESSES = 1024  # of a relay's user, threads counted
STOP_SECONDS = 20.0
LONGEST_LINE = 2000
LINES_A_SECOND = 100  # of one process; more are left out


def adopt_orphans() -> None:
    """From here on, a descendant whose parent has ended becomes this process's own child."""
    _prctl(SET_CHILD_SUBREAPER, 1)


def no_new_privileges() -> None:
    """From here on, no program that this process or a descendant starts gains rights by its file
    (setuid, setgid, capabilities)."""
    _prctl(SET_NO_NEW_PRIVS, 1)


def end_user(user: int) -> None:
    """Kill every process of a user at once: one that forks cannot slip through (root only)."""
    subprocess.run(
        ["/bin/sh", "-c", "kill -KILL -1"],
        user=user,
        extra_groups=[],
        check=False,
        stderr=subprocess.DEVNULL,
    )


def end_with_parent() -> None:
    """From here on, this process gets SIGTERM when the one that started it ends."""
    _prctl(SET_DEATH_SIGNAL, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def end_all(but: int = 0, seconds: float = STOP_SECONDS) -> None:
    """End every descendant except `but`: first by SIGTERM, after `seconds` by SIGKILL."""
    end = time.monotonic() + seconds
    asked: set[int] = set()
    quiet = 0
    while quiet < QUIET:
        pids = descendants() - {but}
        quiet = 0 if pids else quiet + 1
        late = time.monotonic() > end
        for pid in pids if late else pids - asked:
            try:
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            except ProcessLookupError:
                continue
        asked |= pids
        time.sleep(0.02)


def reap(but: set[int]) -> None:
    """Take note of adopted orphans that have ended; not of the children `but`, whose exit codes
    are asked for elsewhere."""
    for pid, state, parent in _processes():
        if state == "Z" and parent == os.getpid() and pid not in but:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def descendants() -> set[int]:
    """The live processes below this one."""
    # Of one that has ended (Z, X) only its parent still has the exit code.
    parents = {pid: parent for pid, state, parent in _processes() if state not in "ZX"}
    found, new = set[int](), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def _processes() -> Iterator[tuple[int, str, int]]:
    """(number, state, parent) of every process of the machine."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # "pid (name) state parent …"; the name may hold anything.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            yield int(entry.name), state, int(parent)


def repeat_lines(
    process: subprocess.Popen[bytes], write_line: Callable[[str], None]
) -> threading.Thread:
    """Pass a process's output on, a line at a time, without control characters and not endlessly:
    what it writes may be meant for the terminal that shows it. The thread ends with the output.
    """
    assert process.stdout is not None
    stream = process.stdout

    def repeat() -> None:
        second, lines = 0, 0
        with stream:
            while line := stream.readline(LONGEST_LINE):
                if int(time.monotonic()) != second:
                    if lines > LINES_A_SECOND:
                        write_line(f"({lines - LINES_A_SECOND} lines were left out)")
                    second, lines = int(time.monotonic()), 0
                lines += 1
                # Whole colour codes first: without its first character one is text.
                text = click.unstyle(line.decode(errors="replace"))
                text = "".join(c for c in text if c.isprintable()).strip()
                if text and lines <= LINES_A_SECOND:
                    write_line(text)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    return thread
