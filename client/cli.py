"""`silotune site`: what a site's administrator does."""

from __future__ import annotations

from pathlib import Path

import click

from silotune.common import contract as contracts


@click.group()
def site() -> None:
    """Run a site."""


@site.command()
@click.argument("contract", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="This site's name in the contract.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The records, CSV.")
@click.option("--model", type=click.Path(path_type=Path), help="Folder of the base model.")
@click.option("--socket", required=True, type=click.Path(path_type=Path),
              help="Unix socket on which the relay asks.")
def worker(contract: Path, name: str, data: Path, model: Path | None, socket: Path) -> None:
    """Start this site's worker: it reads the records, and answers the relay until it is stopped.

    \b
    $ silotune site worker heart.toml --name Cleveland --data notes.csv \\
        --model models/all-MiniLM-L6-v2 --socket run/worker.sock
    Cleveland is ready on run/worker.sock
    """
    from silotune.client.wire import serve
    from silotune.client.worker import SiteConfig, Worker

    found = Worker(SiteConfig(name=name, data=data, model_folder=model), contracts.load(contract))
    serve(found.handle, socket, lambda: click.echo(f"{name} is ready on {socket}"))
