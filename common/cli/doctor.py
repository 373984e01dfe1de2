"""`silotune doctor`: is this machine, with this installation, one that Silotune works on?"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from silotune.common.cli.main import emit
from silotune.common.cli.options import JSON
from silotune.common.runtime import installation, machine
from silotune.common.runtime.check import Check, table
from silotune.common.runtime.terminal import busy

SHOWN = ("name", "state", "result", "fix")


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Check this machine and this installation.

    Checked are packages, devices, folders and limits. A warning (!) names what only some commands
    need. A problem (✗) has to be solved first; the exit code is then 1. Each has its remedy. A site
    has more to check: silotune site check.

    \b
    $ silotune doctor
      Check     Result
    ✓ python    3.11.7 in /opt/silotune/.venv
    ! nginx     it is not installed. Only needed for: `silotune server start`
                → on Debian: apt-get install nginx
    Ready: 0 problems, 1 warning.
    """
    with busy("checking this machine"):
        rows = list(_checks())
    ready = all(row.state != "problem" for row in rows)
    facts = [{key: value for key, value in asdict(row).items() if key in SHOWN} for row in rows]
    emit({"ready": ready, "checks": facts}, as_json, "\n".join(table(rows)))
    if not ready:
        sys.exit(1)


def _checks() -> Iterator[Check]:
    installed = list(installation.checks())
    yield from installed
    yield from machine.devices()
    yield from machine.checks()
    if all(row.state != "problem" for row in installed):  # what is imported needs its packages
        yield from _data_folders()
    yield machine.folder(
        "this folder",
        Path.cwd(),
        "change to a folder of yours, or name one with --out and --folder",
        needed=False,
    )
    yield _temporary()


def _data_folders() -> Iterator[Check]:
    """The cache, and the folder of data that is on no index if there is to be one."""
    from silotune.common.model_files.model_source import SOURCES

    sources = importlib.import_module(SOURCES)
    fix = "set SILOTUNE_HOME to a folder of yours: export SILOTUNE_HOME=FOLDER"
    yield machine.folder("cache", sources.home(), fix)
    if "SILOTUNE_DATA" in os.environ and not sources.laid().is_dir():
        yield Check(
            "data",
            "warning",
            f"SILOTUNE_DATA is {sources.laid()}, which is no folder",
            "set it to the folder that holds the data, or unset it",
        )


def _temporary() -> Check:
    fix = "set TMPDIR to a folder of yours: export TMPDIR=FOLDER"
    try:
        found = tempfile.gettempdir()
    except OSError:
        return Check("temporary", "problem", "no folder for temporary files can be used", fix)
    return machine.folder("temporary", Path(found), fix)
