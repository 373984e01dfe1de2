"""`silotune server`: what the operator does."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from silotune.common import contract as contracts
from silotune.common.cli import emit
from silotune.common.errors import RunError, UsageError
from silotune.common.journal import Journal

FOLDER = click.option(
    "--folder", default=".", type=click.Path(path_type=Path), help="The server's folder."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
LOOK_SECONDS = 0.5
FIRST_SECONDS = 120.0  # until Flower has begun a run


@click.group()
def server() -> None:
    """Run the server of a federation."""


@server.command()
@click.option("--host", required=True, help="The name or address that sites connect to.")
@click.option("--port", default=8443, show_default=True, help="The port that sites connect to.")
@click.option("--link-port", default=8000, show_default=True, help="Of the SuperLink.")
@click.option("--metrics-port", type=int, help="Serve /metrics and /healthz on 127.0.0.1.")
@FOLDER
@JSON
def init(
    host: str, port: int, link_port: int, metrics_port: int | None, folder: Path, as_json: bool
) -> None:
    """Make a server: a certificate authority, the server's certificate, an empty roster.

    \b
    $ silotune server init --host fl.example.org --folder federation
    ✓ CA and certificate for fl.example.org in federation (keys 0600; they stay here)
    CA fingerprint  91:0C…  (read it out to each site)
    next:   send federation/ca.crt to the sites; then: silotune server add REQUEST
    """
    from silotune.common import fields
    from silotune.server import authority
    from silotune.server.place import Place, ServerSettings

    settings = fields.parse(
        json.dumps({"host": host, "port": port, "link_port": link_port,
                    "metrics_port": metrics_port}), "options.json", ServerSettings,
    )
    place = Place.create(folder, settings)
    print_ = authority.fingerprint((place.folder / "ca.crt").read_bytes())
    emit({"folder": str(folder), "ca_sha256": print_}, as_json, "\n".join([
        f"✓ CA and certificate for {host} in {folder} (keys 0600; they stay here)",
        f"CA fingerprint  {print_}  (read it out to each site)",
        f"next:   send {folder / 'ca.crt'} to the sites, have their requests sent to you, and: "
        f"silotune server add REQUEST --folder {folder}",
    ]))


@server.command()
@click.argument("request", type=click.Path(path_type=Path))
@click.option("--fingerprint", required=True, help="As the site's administrator reads it out.")
@FOLDER
@JSON
def add(request: Path, fingerprint: str, folder: Path, as_json: bool) -> None:
    """Add a site to the roster, if its request is the one that the site made.

    \b
    $ silotune server add hospital-a.request.json --fingerprint A8:26:…:CC
    ✓ hospital-a is in the roster
    """
    from silotune.common import join
    from silotune.server.place import Place

    found = join.load(request)
    Place(folder).admit(found, fingerprint)
    entry = f'[[sites]]\nname = "{found.site}"\npublic_key = "{found.public_key}"'
    emit({"site": found.site, "public_key": found.public_key}, as_json, "\n".join([
        f"✓ {found.site} is in the roster; for the contract:", entry,
        f"next:   silotune server start --folder {folder}   (again, if it runs)",
    ]))


@server.command()
@FOLDER
@click.option("--log-json", is_flag=True, help="Say each event as one line of JSON.")
def start(folder: Path, log_json: bool) -> None:
    """Run Flower's SuperLink and nginx before it, until stopped.

    \b
    $ silotune server start --folder federation
    hospital-a may connect
    sites can connect to fl.example.org:8443
    """
    from silotune.server.place import Place
    from silotune.server.service import Service

    sys.exit(Service(Place(folder), Journal("server", as_json=log_json)).run())


@server.command()
@click.argument("contract", type=click.Path(path_type=Path))
@click.option("--run", "name", help="The run's name; by default the contract's, with the time.")
@click.option("--model", type=click.Path(path_type=Path), help="The base model's folder.")
@FOLDER
def run(contract: Path, name: str | None, model: Path | None, folder: Path) -> None:
    """Carry out a contract with the sites that are connected, and show its rounds.

    \b
    $ silotune server run heart.toml --folder federation
    run heart-diagnosis-20261122-1015
      1/30   4 sites
    """
    found = contracts.load(contract)
    name = name or f"{found.name}-{time.strftime('%Y%m%d-%H%M%S')}".lower().replace(" ", "-")
    _carry_out(folder, contract, name, model, "")


@server.command()
@click.argument("name")
@click.option("--skip-round", is_flag=True, help="Without the next round: what it cost is lost.")
@click.option("--model", type=click.Path(path_type=Path), help="The base model's folder.")
@FOLDER
def resume(name: str, skip_round: bool, model: Path | None, folder: Path) -> None:
    """Go on with a run that stopped, from its last whole round. Sites answer what they were asked
    before with what they answered then.

    \b
    $ silotune server resume heart-diagnosis-20261122-1015 --folder federation
     12/30   4 sites
    """
    from silotune.server.place import Place

    path = Place(folder).runs / name / "contract.json"
    if not path.is_file():
        raise UsageError(f"{path.parent} holds no run. Runs: {', '.join(_runs(folder)) or 'none'}.")
    _carry_out(folder, path, name, model, "skip" if skip_round else "yes")


@server.command()
@FOLDER
@JSON
def status(folder: Path, as_json: bool) -> None:
    """The runs of this server and where each stands.

    \b
    $ silotune server status --folder federation
    heart-diagnosis-20261122-1015   12/30   stopped: 2 of 4 sites counted (…)
    """
    from silotune.server.place import Place

    found = [_standing(Place(folder).runs / name) for name in _runs(folder)]
    text = "\n".join(
        f"{s['run']}   {s['round']}/{s['rounds']}   {s['state']}" for s in found
    )
    emit({"runs": found}, as_json, text or "no run yet")


def _runs(folder: Path) -> list[str]:
    from silotune.server.place import Place

    return sorted(path.parent.name for path in Place(folder).runs.glob("*/contract.json"))


def _events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def _standing(folder: Path) -> dict[str, Any]:
    events = _events(folder)
    committed = [e["round"] for e in events if e["event"] in ("committed", "skipped")]
    last = next((e for e in reversed(events) if e["event"] in ("stopped", "failed")), None)
    begun = max((n for n, e in enumerate(events) if e["event"] == "run"), default=0)
    state = "running, or its server died"
    if (folder / "adapter.safetensors").is_file():
        state = "done"
    elif last is not None and events.index(last) > begun:
        state = f"stopped: {last['why']}"
    rounds = next((e["rounds"] for e in events if e["event"] == "run"), 0)
    return {"run": folder.name, "round": max(committed, default=0), "rounds": rounds,
            "state": state}


def _carry_out(
    folder: Path, contract: Path, name: str, model: Path | None, resume: str
) -> None:
    """Hand a run to Flower and repeat what its events say until it ends."""
    from silotune.server.fab import write_app
    from silotune.server.place import Place
    from silotune.server.service import flwr

    place = Place(folder)
    where = place.runs / name
    if not resume and where.exists():
        raise RunError(f"There is a run '{name}' already: silotune server resume {name}")
    before, rounds = len(_events(where)), contracts.load(contract).rounds
    app = write_app(
        place.folder / "flwr" / "apps" / name, contract=contract, model=model, run=name,
        runs=place.runs, resume=resume,
    )
    flwr(place, "run", app.resolve(), "silotune")
    click.echo(f"run {name}")
    end = time.monotonic() + FIRST_SECONDS
    while True:
        events = _events(where)
        for event in events[before:]:
            _say(event, rounds)
        if any(event["event"] in ("stopped", "failed") for event in events[before:]):
            click.echo(f"next:   silotune server resume {name} --folder {folder}")
            sys.exit(1)
        before = len(events)
        if before and events[-1]["event"] == "released":
            click.echo(f"adapter  {where / 'adapter.safetensors'}")
            return
        if not before and time.monotonic() > end:
            raise RunError("Flower did not begin the run; see what the server says.")
        time.sleep(LOOK_SECONDS)


def _say(event: dict[str, Any], rounds: int) -> None:
    kind = event["event"]
    if kind == "committed":
        click.echo(f"{event['round']:>3}/{rounds:<3} {len(event['sites'])} sites")
    elif kind == "rejected":
        click.echo(f"        {event['site']}: {event['code']}")
    elif kind in ("stopped", "failed"):
        click.echo(f"✗ {event['code']} {event['why']}")
    elif kind in ("damaged", "skipped", "resumed"):
        click.echo(f"        {kind}: {json.dumps({k: v for k, v in event.items() if k != 'at'})}")
