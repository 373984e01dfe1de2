"""`silotune model`: the hash by which a contract names a base model."""

from __future__ import annotations

from pathlib import Path

import click

from silotune.common.cli.main import emit
from silotune.common.cli.options import JSON
from silotune.common.model_files import model_folder


@click.group()
def model() -> None:
    """Check the folder of a base model."""


@model.command()
@click.argument(
    "folder",
    type=click.Path(path_type=Path),
    help="The folder with the model's weights, configuration and tokenizer.",
)
@JSON
def check(folder: Path, as_json: bool) -> None:
    """Print a model's files and the hash for a contract.

    The hash, for model.sha256 of a contract, is that of the files that define the model. A folder
    with files that could change the model beside these is refused.

    \b
    $ silotune model check models/all-MiniLM-L6-v2
    sha256 = "9f0c…"
      1a2b3c…       612 bytes  config.json
    """
    found = model_folder.manifest(folder)
    lines = [f"  {file.sha256}  {file.size:>14,} bytes  {file.name}" for file in found.files]
    emit(
        {"sha256": found.sha256, "files": [file._asdict() for file in found.files]},
        as_json,
        "\n".join([f'sha256 = "{found.sha256}"', *lines]),
    )
