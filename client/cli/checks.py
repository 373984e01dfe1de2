"""The table of a site's checks before a start, as `site check`, `start` and `worker` print it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from silotune.common.cli.main import emit
from silotune.common.runtime.check import table
from silotune.common.runtime.terminal import busy, echo


def show(
    config: Path,
    contract: Path,
    *,
    write_line: Callable[[str], None] = echo,
    as_json: bool = False,
    local: bool = False,
    network: bool = False,
) -> bool:
    """Print the table of what a site must have to take part in a contract.

    Args:
        config: the site's policy.
        contract: the contract's file.
        write_line: prints a line.
        as_json: print one JSON object instead of lines.
        local: also what no log may hold; on the screen only, never in JSON.
        network: also whether the server can be reached.

    Returns:
        Whether there is no problem.
    """
    with busy(f"checking {config} against {contract}"):
        from silotune.client.operations.preflight import (
            check as rows_of,  # loads torch: after the line
        )
        from silotune.client.site.folder import SiteFolder

        rows = rows_of(SiteFolder.at(config), contract, network=network)
    problems = sum(row.state == "problem" for row in rows)
    lines = table(rows, local=local, end="No record was sent, nothing was spent.")
    if as_json:
        shown = [asdict(replace(row, local="")) for row in rows]
        emit({"ready": not problems, "checks": shown}, as_json, "")
    else:
        for line in lines:
            write_line(line)
    return not problems


def stop_unless(ready: bool) -> None:
    """End the command with status 1 if there is a problem."""
    if not ready:
        sys.exit(1)
