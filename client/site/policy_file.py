"""Whether the file that names a site is there. It loads nothing heavy."""

from __future__ import annotations

from pathlib import Path

from silotune.common.cli.main import command
from silotune.common.errors import ErrorCode, UsageError


def require(config: Path) -> None:
    """UsageError E102 if no site's policy is at `config`, or this user cannot look there."""
    try:
        config.stat()
    except (FileNotFoundError, NotADirectoryError):
        remedy = command("site", "init", "--name", "NAME", "--folder", config.parent)
        raise UsageError(
            f"There is no site at {config}. Name its site.toml with --config, or make a site: "
            f"{remedy}",
            code=ErrorCode.CONFIG_UNREADABLE,
        ) from None
    except OSError as error:
        raise UsageError(
            f"Policy {config} cannot be read: {error.strerror}. Run this as the site's user.",
            code=ErrorCode.CONFIG_UNREADABLE,
        ) from None
