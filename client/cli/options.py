"""Options that the commands of `silotune site` and `silotune privacy` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from silotune.client.site.commands import POLICY
from silotune.common.errors import ErrorCode, UsageError


class _PolicyFile(click.Path):
    """A site's policy, by its own path or by that of its folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.is_dir():
            return path
        if not (path / POLICY).is_file():
            raise UsageError(
                f"--config {path} is a folder without {POLICY}. Name a site's {POLICY}, or the "
                "folder that holds it.",
                code=ErrorCode.CONFIG_UNREADABLE,
            )
        return path / POLICY


CONFIG = click.option(
    "--config",
    default=POLICY,
    show_default=True,
    type=_PolicyFile(),
    help="The site's policy, or its folder.",
)
CONTRACT = click.argument(
    "contract",
    type=click.Path(path_type=Path),
    help="The contract's file, as the operator sent it to the site.",
)
LOG_JSON = click.option("--log-json", is_flag=True, help="Log each event as one line of JSON.")
