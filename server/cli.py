"""`silotune server`: what the operator does."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from silotune.common import contract as contracts
from silotune.common.cli import emit, next_step, reading_options, reading_words, warning_lines
from silotune.common.errors import RunError, UsageError
from silotune.common.journal import Journal
from silotune.common.terminal import echo

if TYPE_CHECKING:
    from silotune.common.reading import Reading
    from silotune.server.events import Events
    from silotune.server.place import Place

FOLDER = click.option(
    "--folder", default=".", type=click.Path(path_type=Path), help="The server's folder."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
LOOK_SECONDS = 0.5
SHOWN = ("loss", "accuracy", "auc")  # of the public rows
FIRST_SECONDS = 120.0  # until Flower has begun a run
BUILD_SECONDS = 1800.0  # until its process has built the model
RUN_NAME = r"[a-z0-9][a-z0-9-]{0,63}"
CLOSED_SUM = "does not open"
DIED = "The process that carried out the run ended without a word."


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
    next:   send federation/ca.crt to the sites, …, then: silotune server add REQUEST …
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
        next_step(
            "server", "add", "REQUEST", "--fingerprint", "FINGERPRINT", "--folder", folder,
            first=f"send {folder / 'ca.crt'} to the sites, have their requests sent to you, then: ",
            note="once for each request, with the fingerprint that its site reads out",
        ),
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
        next_step("server", "start", "--folder", folder,
                  note="if it runs already: stop it first"),
    ]))


@server.command()
@FOLDER
def fingerprint(folder: Path) -> None:
    """Print what to read out to the sites: the fingerprint of the CA.

    \b
    $ silotune server fingerprint --folder federation
    91:0C:…
    """
    from silotune.server import authority

    echo(authority.fingerprint((folder / "ca.crt").read_bytes()))


@server.command("contract")
@click.argument("draft", type=click.Path(path_type=Path))
@click.option("--unmasked", is_flag=True, help="Without secure aggregation: the server sees each "
              "site's update by itself.")
@FOLDER
@JSON
def contract_(draft: Path, unmasked: bool, folder: Path, as_json: bool) -> None:
    """Make the contract that the sites get: a draft with the keys of the sites in the roster.

    \b
    $ silotune server contract heart.toml --folder federation
    ✓ heart-diagnosis for cleveland, hungary, va-long-beach (not in the roster: switzerland)
      the server sees sums of at least 3 of 3 sites; 3 open one
    sha256  3f9a…
    next:   send federation/contracts/heart-diagnosis.json to the sites; silotune server start …
    """
    from silotune.server.place import Place

    place, wanted = Place(folder), contracts.load(draft)
    made = place.with_roster(wanted, masked=not unmasked)
    path = place.write_contract(made)
    names = [site.name for site in made.sites]
    absent = [site.name for site in wanted.sites if site.name not in names]
    emit({"contract": str(path), "sha256": made.hash, "sites": names, "absent": absent,
          "warnings": made.warnings}, as_json,
         "\n".join([
             f"✓ {made.name} for {', '.join(names)}"
             + (f" (not in the roster: {', '.join(absent)})" if absent else ""),
             f"  {made.masks}", f"sha256  {made.hash}", *warning_lines(made),
             next_step("server", "start", "--folder", folder,
                       first=f"send {path} to the sites, then: "),
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
@click.option("--test", type=click.Path(path_type=Path), help="Public rows to score by: a file.")
@reading_options
@FOLDER
def run(
    contract: Path, name: str | None, model: Path | None, test: Path | None, reading: Reading,
    folder: Path,
) -> None:
    """Carry out a contract with the sites that are connected, and show its rounds.

    \b
    $ silotune server run heart.toml --folder federation
    run heart-diagnosis-20261122-1015
      1/30   4 sites
    """
    found = contracts.load(contract)
    if name is None:
        slug = re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-")[:40] or "run"
        name = f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(RUN_NAME, name):
        raise UsageError(f"'{name}' cannot be a run's name: use up to 64 small letters, digits and "
                         "'-', a letter or digit first.")
    _carry_out(folder, contract, name, model, test, reading, "")


@server.command()
@click.argument("name")
@click.option("--skip-round", is_flag=True, help="Without the next round: what it cost is lost.")
@click.option("--model", type=click.Path(path_type=Path), help="The base model's folder.")
@click.option("--test", type=click.Path(path_type=Path), help="Public rows to score by: a file.")
@reading_options
@FOLDER
def resume(
    name: str, skip_round: bool, model: Path | None, test: Path | None, reading: Reading,
    folder: Path,
) -> None:
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
    _carry_out(folder, path, name, model, test, reading, "skip" if skip_round else "yes")


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
        f"{s['run']}   {s['round']}/{s['rounds']}   {s['state']}{_without(s['absent'])}"
        for s in found
    )
    emit({"runs": found}, as_json, text or "no run yet")


def _runs(folder: Path) -> list[str]:
    from silotune.server.place import Place

    return sorted(path.parent.name for path in Place(folder).runs.glob("*/contract.json"))


def _standing(folder: Path) -> dict[str, Any]:
    from silotune.server.disk import no_room
    from silotune.server.events import Events, standing
    from silotune.server.registry import held

    found = standing(Events(folder).new())
    if (folder / "adapter.safetensors").is_file():
        state = "done"
    elif not found.why and held(folder):
        state = "running"
    else:
        state = f"stopped: {found.why or no_room(folder) or DIED}"
    if state == "running" and found.waiting:
        state = _waiting(found.waiting)
    return {"run": folder.name, "round": max(found.committed, default=0), "rounds": found.planned,
            "state": state, "absent": dict(found.absent)}


def _carry_out(
    folder: Path, contract: Path, name: str, model: Path | None, test: Path | None,
    reading: Reading, resume: str,
) -> None:
    """Hand a run to Flower and repeat what its events say until it ends."""
    from silotune.server.events import Events
    from silotune.server.fab import write_app
    from silotune.server.metrics import answers
    from silotune.server.place import Place
    from silotune.server.service import flwr

    place = Place(folder)
    where = place.runs / name
    if not resume and (where / "contract.json").exists():
        raise RunError(f"There is a run '{name}' already: silotune server resume {name}")
    agreed = contracts.load(contract)
    for line in warning_lines(agreed):
        echo(line, err=True)
    if test is not None:  # what is wrong with its rows is said now, on this screen
        from silotune.common import records

        records.read(test, agreed, reading)
    events, rounds, token = Events(where), agreed.rounds, secrets.token_hex(8)
    events.new()  # what was before
    app = write_app(
        place.folder / "flwr" / "apps" / name, contract=contract, model=model, run=name,
        runs=place.runs, resume=resume, test=test, reading=reading, token=token,
    )
    end = time.monotonic() + FIRST_SECONDS
    while not answers("127.0.0.1", place.settings.link_port) and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)  # it may just be starting
    more = [word for option, value in (("--model", model), ("--test", test)) if value
            for word in (option, str(value))]
    more += shlex.split(reading_words(reading, "--{key} {value}"))
    again = ["server", "resume", name, "--folder", str(folder), *more]
    flower_run = ""
    try:
        said = flwr(place, "run", app.resolve(), "silotune", "--format", "json")
        flower_run = json.loads(said)["run-id"]
        echo(f"run {name}")
        adapter = _follow(where, events, rounds, token)
    except KeyboardInterrupt:
        echo(_detached(place, name, flower_run, shlex.join(["silotune", *again])), err=True)
        sys.exit(130)
    except RunError as error:
        if (where / "contract.json").is_file():
            echo(next_step(*again))
            if CLOSED_SUM in str(error):
                echo(next_step(
                    *again, "--skip-round", note="without this round; what it cost stays spent"
                ))
        raise
    echo(f"adapter  {adapter}")


def _detached(place: Place, name: str, flower_run: str, again: str) -> str:
    """What Ctrl-C has not done, and how to do it. flower_run: Flower's number of the run, or ""."""
    from silotune.server.service import BIN, environment

    folder = str(place.folder)
    watch = shlex.join(["silotune", "server", "status", "--folder", folder])
    if not flower_run:
        return f"Detached before the run {name} had a number; it may have begun: {watch}"
    kept = environment(place)
    words = [f"{key}={shlex.quote(kept[key])}" for key in ("FLWR_HOME", "FLWR_TELEMETRY_ENABLED")]
    stop = shlex.join([str(BIN / "flwr"), "stop", flower_run, "silotune"])
    return "\n".join([
        f"Detached. The run {name} goes on: its sites train, and each round spends ε.",
        f"watch:   {watch}",
        f"stop:    {' '.join(words)} {stop}",
        f"resume:  {again}   (once it is stopped; what it has committed is kept)",
    ])


def _follow(where: Path, events: Events, rounds: int, token: str) -> Path:
    """Say what happens until the run has its adapter; RunError if it ends without.

    token: of the process that is to carry it out. Another one may be writing here, too.
    """
    from silotune.server.disk import no_room
    from silotune.server.registry import held

    end, ours, alone = time.monotonic() + FIRST_SECONDS, False, 0
    while True:
        for event in events.new():
            kind, whose = event["event"], event.get("token")
            if whose == token and kind == "refused":
                raise RunError(event["why"], code=event["code"])
            if whose == token and kind == "starting":
                end = time.monotonic() + BUILD_SECONDS
            ours |= whose == token and kind == "taken"
            if not ours:
                continue
            _say(event, rounds)
            if kind == "released":
                return where / "adapter.safetensors"
            if kind in ("stopped", "failed"):
                raise RunError(event["why"], code=event["code"])
        if not ours and time.monotonic() > end:
            raise no_room(where.parent) or RunError(
                "Flower did not begin the run; see what the server says."
            )
        alone = alone + 1 if ours and not held(where) else 0
        if alone > 2:  # what it said last has been read since
            raise no_room(where) or RunError(DIED, code="E603")
        time.sleep(LOOK_SECONDS)


def _say(event: dict[str, Any], rounds: int) -> None:
    kind = event["event"]
    if kind == "committed":
        metrics = event.get("metrics", {})
        shown = "".join(
            f"   {name} {metrics[name]:.3f}" for name in SHOWN if metrics.get(name) is not None
        )
        echo(f"{event['round']:>3}/{rounds:<3} {len(event['sites'])} sites{shown}")
    elif kind == "rejected":
        echo(f"        {event['site']}: {event['code']}")
    elif kind == "skipped":
        echo(f"        round {event['round']} is left out: {event['why']}")
    elif kind == "waiting":
        echo(_waiting(event))
    elif kind == "absent":
        echo(f"        the run goes on{_without(event['sites'])}")
    elif kind in ("damaged", "declined", "resumed"):
        echo(f"        {kind}: {json.dumps({k: v for k, v in event.items() if k != 'at'})}")


def _waiting(event: Mapping[str, Any]) -> str:
    from silotune.server.arrivals import in_words

    return f"waiting for {in_words(event)}, {event['seconds']} s of {event['of']}"


def _without(absent: dict[str, str]) -> str:
    """" without hungary (E201), switzerland (E403)", or nothing."""
    return " without " * bool(absent) + ", ".join(f"{s} ({c})" for s, c in sorted(absent.items()))
