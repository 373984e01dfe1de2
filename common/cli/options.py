"""Options that commands of every side share."""

from __future__ import annotations

import click

JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON instead of text."
)
