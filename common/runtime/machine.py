"""What a machine offers to Silotune: devices, memory, folders, its clock and its limits.

Nothing is read from the environment but what names a folder, and no value of it is shown.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from silotune.common.errors import counted
from silotune.common.runtime.check import Check, State

GIB, MIB = 1 << 30, 1 << 20
LEAST_MEMORY = 2 * GIB  # of `make demo`
LEAST_DISK = 50 * MIB
LITTLE_DISK = 1 * GIB  # of the cache: the packaged models and tables
LEAST_FILES = 1024  # open at once
LEAST_PROCESSES = 256  # threads count
CGROUP, MEMORY = Path("/sys/fs/cgroup"), Path("/proc/meminfo")
NVIDIA = Path("/proc/driver/nvidia/version")  # there where the kernel has a driver
GPU_PAGE = "docs/how-to/use-a-gpu.md"


def checks() -> Iterator[Check]:
    """One row for each part, torch and folders left out."""
    yield _memory()
    yield _clock()
    yield _umask()
    yield from _limits()
    yield _process()


def devices() -> Iterator[Check]:
    """torch, and each CUDA device that it can use."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it does not load
        yield Check(
            "torch",
            "problem",
            f"it cannot be loaded ({type(error).__name__})",
            f"{sys.executable} -m pip install --force-reinstall torch",
        )
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    threads = torch.get_num_threads()
    said = f"{torch.__version__}, build for {build}, {counted(threads, 'thread')}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old: the row says so
        usable = torch.cuda.is_available()
    if not usable and NVIDIA.exists():
        fix = (
            "compare the driver's CUDA version (nvidia-smi) with torch's"
            if torch.version.cuda
            else f"install a CUDA build of torch ({GPU_PAGE})"
        )
        yield Check("torch", "warning", f"{said}; it cannot use the GPU that is here", fix)
    else:
        yield Check("torch", "ok", said)
    for at in range(torch.cuda.device_count()):
        name = f"cuda:{at}"
        try:
            free, total = torch.cuda.mem_get_info(at)
            shown = f"{torch.cuda.get_device_name(at)}, {_gb(total)} memory, {_gb(free)} free"
        except RuntimeError:
            yield Check(name, "problem", "the device does not answer", "look at it with nvidia-smi")
        else:
            yield Check(name, "ok", shown)


def folder(name: str, path: Path, fix: str, *, needed: bool = True) -> Check:
    """Whether a folder can be written to and its disk has room. One that does not exist is not
    made: what counts is the nearest folder above it.

    Args:
        name: of the row.
        path: the folder.
        fix: the remedy if it cannot be written to.
        needed: False if commands can do without it.
    """
    lacking: State = "problem" if needed else "warning"
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(name, lacking, f"{path} cannot be written to: {error.strerror}", fix)
    if free < LEAST_DISK:
        room = f"free at least {LEAST_DISK // MIB} MB"
        return Check(name, lacking, f"{free // MIB} MB are free in {path}", room)
    if free < LITTLE_DISK:
        return Check(
            name, "warning", f"only {free // MIB} MB are free in {path}", "free a gigabyte"
        )
    return Check(name, "ok", f"{path}, {_gb(free)} free")


def _gb(size: int) -> str:
    return f"{size / GIB:.1f} GB"


def _number(path: Path) -> int | None:
    """The number in a file of the kernel; None if there is none, or it says 'max'."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _memory() -> Check:
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, KeyError, ValueError):  # there on Linux alone
        lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = _number(CGROUP / "memory.max")
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (_number(CGROUP / "memory.current") or 0))
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    said = f"{counted(cores, 'core')}, {_gb(total)} memory, {_gb(free)} available"
    if free < LEAST_MEMORY:
        return Check(
            "memory",
            "warning",
            said,
            f"end other programs: `make demo` needs {_gb(LEAST_MEMORY)}; processes=1 of `silotune "
            "sim run` needs less",
        )
    return Check("memory", "ok", said)


def _clock() -> Check:
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < Path(__file__).stat().st_mtime:
        return Check(
            "clock",
            "warning",
            f"{shown} is before Silotune was installed; certificates will be refused",
            "set the machine's clock",
        )
    return Check("clock", "ok", f"{shown}; `silotune site check` compares it with the server's")


def _umask() -> Check:
    mask = os.umask(0o077)
    os.umask(mask)
    if mask & 0o022 != 0o022:
        return Check(
            "umask",
            "warning",
            f"{mask:03o}: other users can write to the files that you make",
            "umask 077, before you copy records or make a folder for a site or a server",
        )
    said = "only you can read" if mask & 0o077 == 0o077 else "other users can read, but not write,"
    return Check("umask", "ok", f"{mask:03o}: {said} the files that you make")


def _limits() -> Iterator[Check]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        yield Check(
            "open files",
            "warning",
            f"at most {files} at once",
            f"ulimit -n {LEAST_FILES}, before the command",
        )
    else:
        yield Check("open files", "ok", f"at most {_shown(files)} at once")
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    most = _number(CGROUP / "pids.max")
    if most is not None:
        left = most - (_number(CGROUP / "pids.current") or 0)
        processes = left if processes == resource.RLIM_INFINITY else min(processes, left)
    if processes != resource.RLIM_INFINITY and processes < LEAST_PROCESSES:
        yield Check(
            "processes",
            "warning",
            f"at most {processes}, threads included",
            f"let this user or container have {LEAST_PROCESSES} (ulimit -u, --pids-limit)",
        )
    else:
        yield Check("processes", "ok", f"at most {_shown(processes)}, threads included")


def _shown(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _process() -> Check:
    """A process of our own can be started: a relay, a worker or a simulated site is one."""
    try:
        subprocess.run([sys.executable, "-c", ""], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return Check(
            "subprocess",
            "problem",
            f"no process can be started ({type(error).__name__})",
            "raise the limit on processes or memory, and let this user run "
            f"{os.path.basename(sys.executable)}",
        )
    return Check("subprocess", "ok", "a process can be started")
