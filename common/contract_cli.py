"""`silotune contract`: look at a contract before agreeing to it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from silotune.common import contract as contracts
from silotune.common.cli import emit


@click.group()
def contract() -> None:
    """Show or validate a contract."""


@contract.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the canonical form as JSON.")
def show(file: Path, as_json: bool) -> None:
    """What a contract says, and its hash.

    \b
    $ silotune contract show heart.toml
    heart-diagnosis  f90dd4e5a163…
    """
    found = contracts.load(file)
    p = found.privacy
    guarantee = (
        f"ε ≤ {p.epsilon:g}, δ = {p.delta:g} per {p.unit} and site (RDP; add or remove one)"
        if p.mode == "dp"
        else "NO differential privacy"
    )
    text = [
        f"{found.name}  {found.hash}",
        f"  privacy  {guarantee}; clip {p.clip_norm:g}",
        f"  rounds   {found.rounds}; quorum {found.quorum} of {len(found.sites)}",
        f"  masks    {found.masks}",
        f"  sites    {', '.join(s.name for s in found.sites)}",
        f"  labels   {', '.join(found.label_names)}",
        f"  leaves a site: {found.leaves}",
    ]
    data = json.loads(found.model_dump_json()) | {"sha256": found.hash}
    emit(data, as_json, "\n".join(text))


@contract.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def validate(file: Path, as_json: bool) -> None:
    """Check a contract; every problem is listed with its line, exit code 2 if there is any."""
    found = contracts.load(file)
    emit({"valid": True, "sha256": found.hash}, as_json, f"✓ {file.name} is valid  {found.hash}")
