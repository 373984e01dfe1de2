"""`silotune server`: what the operator does."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from silotune.common.cli.completion import known
from silotune.common.cli.main import (
    emit,
    next_step,
    reading_options,
    reading_words,
    warning_lines,
)
from silotune.common.cli.options import JSON
from silotune.common.contract import contract as contracts
from silotune.common.contract.model import OneHotModel
from silotune.common.errors import ErrorCode, PeerError, RunError, UsageError
from silotune.common.model_files import model_folder, model_source
from silotune.common.runtime.atomic_files import write_durably
from silotune.common.runtime.journal import Journal
from silotune.common.runtime.terminal import echo

if TYPE_CHECKING:
    from silotune.common.contract.contract import Contract
    from silotune.common.data.text_decoding import Reading
    from silotune.server.operations.server_folder import ServerFolder
    from silotune.server.storage.events import Event, Events

FOLDER = click.option(
    "--folder",
    default=".",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of the server, which `server init` makes.",
)
RUN = click.argument(
    "name",
    metavar="RUN",
    shell_complete=known(lambda context: _run_names(context.params.get("folder", Path()))),
    help="Name of a run, as `silotune server status` lists it.",
)
LOOK_SECONDS = 0.5
SHOWN = ("loss", "accuracy", "auc")  # of the public rows
START_SECONDS = 10.0  # until a server that is just being started answers
FIRST_SECONDS = 120.0  # until Flower has begun a run
BUILD_SECONDS = 1800.0  # until its process has built the model
MODEL_HELP = "The base model's folder, if it is no packaged one."
RUN_NAME = r"[a-z0-9][a-z0-9-]{0,63}"
CLOSED_SUM = "does not open"
NOT_BEGUN = "not begun"
DIED = "The process of the run ended without an error message."


@click.group()
def server() -> None:
    """Run the server of a federation."""


@server.command()
@click.option("--host", required=True, help="The name or address that sites connect to.")
@click.option("--port", default=8443, show_default=True, help="The port that sites connect to.")
@click.option(
    "--link-port",
    default=8000,
    show_default=True,
    help="Port of Flower's SuperLink on this machine alone.",
)
@click.option("--metrics-port", type=int, help="Serve /metrics and /healthz on 127.0.0.1.")
@FOLDER
@JSON
def init(
    host: str, port: int, link_port: int, metrics_port: int | None, folder: Path, as_json: bool
) -> None:
    """Create a server: a CA, its certificate, an empty roster.

    \b
    $ silotune server init --host fl.example.org --folder federation
    ✓ CA and certificate for fl.example.org in federation (keys 0600; they stay here)
    CA fingerprint  …  (read it out to each site)
    next:   send federation/ca.crt to the sites, …, then: silotune server add REQUEST …
    """
    from silotune.common.config import types
    from silotune.server.operations import certificate_authority
    from silotune.server.operations.server_folder import ServerFolder, ServerSettings

    given = {"host": host, "port": port, "link_port": link_port, "metrics_port": metrics_port}
    options = {key: f"--{key.replace('_', '-')}" for key in given}
    settings = types.of_options(ServerSettings, options, given)
    place = ServerFolder.create(folder, settings)
    print_ = certificate_authority.fingerprint((place.folder / "ca.crt").read_bytes())
    emit(
        {"folder": str(folder), "ca_sha256": print_},
        as_json,
        "\n".join(
            [
                f"✓ CA and certificate for {host} in {folder} (keys 0600; they stay here)",
                f"CA fingerprint  {print_}  (read it out to each site)",
                next_step(
                    "server",
                    "add",
                    "REQUEST",
                    "--fingerprint",
                    "FINGERPRINT",
                    "--folder",
                    folder,
                    first=f"send {folder / 'ca.crt'} to the sites, have their requests sent to "
                    "you, then: ",
                    note="once for each request, with the fingerprint that its site reads out",
                ),
            ]
        ),
    )


@server.command()
@click.argument(
    "request",
    type=click.Path(path_type=Path),
    help="The request file (NAME.request.json) that the site sent.",
)
@click.option("--fingerprint", required=True, help="As the site's administrator reads it out.")
@FOLDER
@JSON
def add(request: Path, fingerprint: str, folder: Path, as_json: bool) -> None:
    """Add a site to the roster.

    The fingerprint shows that the request is the one that the site made.

    \b
    $ silotune server add hospital-a.request.json --fingerprint A8:26:…:CC
    ✓ hospital-a is in the roster
    """
    from silotune.common.protocol import join_request
    from silotune.server.operations.server_folder import ServerFolder

    place, found = ServerFolder.open(folder), join_request.load(request)
    place.admit(found, fingerprint)
    entry = f'[[sites]]\nname = "{found.site}"\npublic_key = "{found.public_key}"'
    emit(
        {"site": found.site, "public_key": found.public_key},
        as_json,
        "\n".join(
            [
                f"✓ {found.site} is in the roster; for the contract:",
                entry,
                next_step(
                    "server", "start", "--folder", folder, note="if it runs already: stop it first"
                ),
            ]
        ),
    )


@server.command()
@FOLDER
def fingerprint(folder: Path) -> None:
    """Print the fingerprint of the CA, to read out to the sites.

    \b
    $ silotune server fingerprint --folder federation
    91:0C:…
    """
    from silotune.common.config import types
    from silotune.server.operations import certificate_authority
    from silotune.server.operations.server_folder import ServerFolder

    path = ServerFolder.open(folder).folder / "ca.crt"
    try:
        echo(certificate_authority.fingerprint(types.read_text(path, "Certificate").encode()))
    except ValueError:
        raise UsageError(
            f"{path} holds no PEM certificate.", code=ErrorCode.CONFIG_UNREADABLE
        ) from None


@server.command("contract")
@click.argument(
    "draft",
    type=click.Path(path_type=Path),
    help="A contract's file whose sites have no keys yet.",
)
@click.option(
    "--unmasked",
    is_flag=True,
    help="Without secure aggregation: the server sees each site's update by itself.",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Replace a contract of the same name that no site and no run uses.",
)
@FOLDER
@JSON
def contract_(draft: Path, unmasked: bool, replace: bool, folder: Path, as_json: bool) -> None:
    """Make the contract that the sites get, from a draft.

    It has the keys of the sites in the roster.

    \b
    $ silotune server contract heart.toml --folder federation
    ✓ heart-diagnosis for cleveland, hungary, va-long-beach (not in the roster: switzerland)
      masks: the server sees sums of at least 3 of 3 sites; 3 open one
    sha256  3f9a…
    next:   send federation/contracts/heart-diagnosis.json to the sites; silotune server start …
    """
    from silotune.server.operations.server_folder import ServerFolder

    place, wanted = ServerFolder.open(folder), contracts.load(draft)
    made = place.with_roster(wanted, masked=not unmasked)
    path = place.write_contract(made, draft, replace=replace)
    names = [site.name for site in made.sites]
    absent = [site.name for site in wanted.sites if site.name not in names]
    warnings, masks = list(made.warnings), f"masks: {made.masks}"
    if made.quorum < wanted.quorum:
        warnings.append(
            f"quorum: {made.quorum}, not {wanted.quorum} as in the draft: that many "
            "sites are in the roster"
        )
    if made.secure_aggregation is None and not unmasked:
        warnings.append(masks)
    add = (
        [
            next_step(
                "server",
                "add",
                "REQUEST",
                "--fingerprint",
                "FINGERPRINT",
                "--folder",
                folder,
                note=f"for {', '.join(absent)}; make the contract again afterwards, with --replace "
                "if no site has this one",
            )
        ]
        if absent
        else []
    )
    emit(
        {
            "contract": str(path),
            "sha256": made.hash,
            "sites": names,
            "absent": absent,
            "warnings": warnings,
        },
        as_json,
        "\n".join(
            [
                f"✓ {made.name} for {', '.join(names)}"
                + (f" (not in the roster: {', '.join(absent)})" if absent else ""),
                *([] if masks in warnings else [f"  {masks}"]),
                f"sha256  {made.hash}",
                *(f"! {warning}" for warning in warnings),
                *add,
                next_step(
                    "server", "start", "--folder", folder, first=f"send {path} to the sites, then: "
                ),
            ]
        ),
    )


@server.command()
@FOLDER
@click.option("--log-json", is_flag=True, help="Log each event as one line of JSON.")
def start(folder: Path, log_json: bool) -> None:
    """Run Flower's SuperLink and nginx before it, until stopped.

    \b
    $ silotune server start --folder federation
    hospital-a may connect
    sites can connect to fl.example.org:8443
    """
    from silotune.server.operations.server_folder import ServerFolder
    from silotune.server.operations.service import Service

    sys.exit(Service(ServerFolder.open(folder), Journal("server", as_json=log_json)).run())


@server.command()
@click.argument(
    "contract",
    type=click.Path(path_type=Path),
    help="The contract's file that `silotune server contract` made.",
)
@click.option("--run", "name", help="The run's name; by default the contract's, with the time.")
@click.option("--model", type=click.Path(path_type=Path), help=MODEL_HELP)
@click.option("--test", type=click.Path(path_type=Path), help="Public rows to score by: a file.")
@reading_options
@FOLDER
def run(
    contract: Path,
    name: str | None,
    model: Path | None,
    test: Path | None,
    reading: Reading,
    folder: Path,
) -> None:
    """Run a contract with the sites that are connected.

    Its rounds are shown until it ends.

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
        raise UsageError(
            f"'{name}' cannot be a run's name: use up to 64 small letters, digits and "
            "'-', a letter or digit first."
        )
    _carry_out(folder, contract, name, model, test, reading, "")


@server.command()
@RUN
@click.option(
    "--skip-round", is_flag=True, help="Skip the next round: the ε that it cost stays spent."
)
@click.option("--model", type=click.Path(path_type=Path), help=MODEL_HELP)
@click.option("--test", type=click.Path(path_type=Path), help="Public rows to score by: a file.")
@reading_options
@FOLDER
def resume(
    name: str,
    skip_round: bool,
    model: Path | None,
    test: Path | None,
    reading: Reading,
    folder: Path,
) -> None:
    """Resume a stopped run from its last complete round.

    Sites answer what they were asked before with what they answered then.

    \b
    $ silotune server resume heart-diagnosis-20261122-1015 --folder federation
     12/30   4 sites
    """
    from silotune.server.operations.server_folder import ServerFolder

    place = ServerFolder.open(folder)
    path = place.runs / name / "contract.json"
    if not path.is_file():
        states = {found["run"]: found["state"] for found in map(_standing, _runs(place))}
        if name in states:
            raise UsageError(
                f"The run '{name}' has no round to resume from ({states[name]}). Begin "
                f"it again: silotune server run CONTRACT --run {name}"
            )
        raise _unknown(place, name)
    _carry_out(folder, path, name, model, test, reading, "skip" if skip_round else "yes")


@server.command()
@RUN
@FOLDER
def stop(name: str, folder: Path) -> None:
    """Stop a run.

    The open round is given up; what was committed is kept, and what a site was charged stays spent.

    \b
    $ silotune server stop heart-diagnosis-20261122-1015 --folder federation
    ✓ heart-diagnosis-20261122-1015: stop requested
    """
    from silotune.server.operations.server_folder import ServerFolder
    from silotune.server.operations.service import flwr

    place = ServerFolder.open(folder)
    if not (number := _number(place, name)).is_file():
        raise _unknown(place, name)
    flwr(place, "stop", number.read_text(encoding="utf-8"), "silotune")
    echo(f"✓ {name}: stop requested")
    if (place.runs / name / "contract.json").is_file():
        echo(
            next_step(
                "server",
                "resume",
                name,
                "--folder",
                folder,
                note="resumes it from its last complete round",
            )
        )


@server.command()
@FOLDER
@JSON
def status(folder: Path, as_json: bool) -> None:
    """List the runs of this server and where each stands.

    \b
    $ silotune server status --folder federation
    heart-diagnosis-20261122-1015   12/30   stopped: 2 of 4 sites counted (…)
    """
    from silotune.server.operations.server_folder import ServerFolder

    found = [_standing(run) for run in _runs(ServerFolder.open(folder))]
    text = "\n".join(
        f"{s['run']}   {s['round']}/{s['rounds'] or '–'}   {s['state']}{_without(s['absent'])}"
        for s in found
    )
    emit({"runs": found}, as_json, text or "no run yet")


def _run_names(folder: Path) -> list[str]:
    names = {file.parent.name for file in folder.glob("runs/*/events.jsonl")}
    return sorted(name for name in names if re.fullmatch(RUN_NAME, name))


def _runs(place: ServerFolder) -> list[Path]:
    """The folders of all runs, also of those that ended before their first round."""
    files = [
        file for name in ("contract.json", "events.jsonl") for file in place.runs.glob(f"*/{name}")
    ]
    return sorted({file.parent for file in files})


def _unknown(place: ServerFolder, name: str) -> UsageError:
    runs = ", ".join(run.name for run in _runs(place))
    return UsageError(f"There is no run '{name}'. Runs: {runs or 'none'}.")


def _number(place: ServerFolder, name: str) -> Path:
    """The file with Flower's own number of a run."""
    return place.folder / "flwr" / "apps" / f"{name}.run-id"


def _standing(folder: Path) -> dict[str, Any]:
    from silotune.server.storage.disk import no_room
    from silotune.server.storage.events import Events, run_status
    from silotune.server.storage.run_store import is_running

    found = run_status(Events(folder).new())
    if (folder / "adapter.safetensors").is_file():
        state = "done"
    elif not (folder / "contract.json").is_file():
        state = f"failed before its first round: {found.code} {found.why}"
        state = state if found.why else NOT_BEGUN
    elif not found.why and is_running(folder):
        state = "running"
    else:
        state = f"stopped: {found.why or no_room(folder) or DIED}"
    if state == "running" and found.waiting:
        state = _waiting(found.waiting)
    return {
        "run": folder.name,
        "round": max(found.committed, default=0),
        "rounds": found.planned,
        "state": state,
        "code": found.code,
        "absent": dict(found.absent),
    }


def _carry_out(
    folder: Path,
    contract: Path,
    name: str,
    model: Path | None,
    test: Path | None,
    reading: Reading,
    resume: str,
) -> None:
    """Hand a run to Flower and repeat what its events say until it ends."""
    from silotune.server.flower.app_bundle import write_app
    from silotune.server.operations.server_folder import ServerFolder
    from silotune.server.operations.service import flwr
    from silotune.server.storage.events import Events

    place = ServerFolder.open(folder)
    where = place.runs / name
    if not resume and (where / "contract.json").exists():
        raise RunError(f"There is a run '{name}' already: silotune server resume {name}")
    agreed = contracts.load(contract)
    for line in warning_lines(agreed):
        echo(line, err=True)
    if not resume:  # a site may have been removed since: a run goes on without it
        place.check_sites(agreed)
    base = _model(agreed, model)
    if test is not None:  # what is wrong with its rows is said now, on this screen
        from silotune.common.data import records

        records.read(test, agreed, reading)
    _reach(place)
    events, rounds, token = Events(where), agreed.rounds, secrets.token_hex(8)
    events.new()  # what was before
    app = write_app(
        place.folder / "flwr" / "apps" / name,
        contract=contract,
        model=base,
        run=name,
        runs=place.runs,
        resume=resume,
        test=test,
        reading=reading,
        token=token,
    )
    more = [
        word
        for option, value in (("--model", model), ("--test", test))
        if value
        for word in (option, str(value))
    ]
    more += shlex.split(reading_words(reading, "--{key} {value}"))
    again = ["server", "resume", name, "--folder", str(folder), *more]
    number = ""
    try:
        said = flwr(place, "run", app.resolve(), "silotune", "--format", "json")
        number = str(json.loads(said)["run-id"])
        write_durably(_number(place, name), number.encode())
        echo(f"run {name}")
        adapter = _follow(where, events, rounds, token)
    except KeyboardInterrupt:
        echo(_detached(place, name, number, token, again), err=True)
        sys.exit(130)
    except RunError as error:
        if (where / "contract.json").is_file():
            echo(next_step(*again))
            if CLOSED_SUM in str(error):
                echo(
                    next_step(
                        *again, "--skip-round", note="without this round; what it cost stays spent"
                    )
                )
        raise
    echo(f"adapter  {adapter}")


def _model(contract: Contract, named: Path | None) -> Path | None:
    """The folder of the contract's base model, if it has one; DataError if that is another model,
    or not there."""
    found = model_source.required(contract, named, "--model FOLDER")
    if found is None:
        return None
    assert not isinstance(contract.model, OneHotModel)
    model_folder.check(found, contract.model.sha256)
    return found


def _reach(place: ServerFolder) -> None:
    """Wait a moment for the server, which may just be starting; PeerError E406 if it is not."""
    from silotune.server.operations.telemetry import answers

    words, said = ["server", "start", "--folder", str(place.folder)], False
    end = time.monotonic() + START_SECONDS
    while not answers("127.0.0.1", place.settings.link_port):
        if not said:
            echo(f"waiting for the server ({shlex.join(['silotune', *words])})", err=True)
            said = True
        if time.monotonic() > end:
            echo(next_step(*words, note="in another terminal; it runs until it is stopped"))
            raise PeerError(
                f"No server answers at {place.link}.", code=ErrorCode.SERVER_UNREACHABLE
            )
        time.sleep(LOOK_SECONDS)


def _detached(place: ServerFolder, name: str, number: str, token: str, again: Sequence[str]) -> str:
    """What Ctrl-C has not done, and how to do it; what became of the run, if it has ended.

    number: Flower's own of the run, or "". token: of the process that is to carry it out. again:
    the command that resumes it.
    """
    from silotune.server.storage import events, run_store

    where = place.runs / name

    def command(*words: str) -> str:
        return shlex.join(["silotune", "server", *words, "--folder", str(place.folder)])

    said = events.Events(where).new()
    end, begun = _end_of(said, token)
    if end is None and begun and not run_store.is_running(where):
        end = {"event": "failed", "code": ErrorCode.RUN_INTERRUPTED, "why": DIED}
    if not number and not begun and end is None:
        return f"Detached before the run {name} had a number; it may have begun: " + command(
            "status"
        )
    if end is None and not begun and (why := _ended_in_flower(place, number)):
        end = {"event": "refused", "code": ErrorCode.RUN_NOT_BEGUN, "why": why}
        events.append(
            where, **{"what" if k == "event" else k: v for k, v in end.items()}, token=token
        )
    if end is not None and end["event"] == "released":
        return f"The run {name} is done: {where / 'adapter.safetensors'}"
    if end is not None:
        resume = [next_step(*again)] if (where / "contract.json").is_file() else []
        return "\n".join([f"The run {name} has ended: {end['code']} {end['why']}", *resume])
    lines = [f"watch:   {command('status')}", f"stop:    {command('stop', name)}"]
    if not begun:
        return "\n".join([f"Detached. The run {name} has not begun; Flower has it.", *lines])
    waiting = events.run_status(said).waiting
    does = f"it is {_waiting(waiting)}, then" if waiting else "its"
    return "\n".join(
        [
            f"Detached. The run {name} continues: {does} sites train, and each round spends ε.",
            *lines,
            f"resume:  {shlex.join(['silotune', *again])}   (once it is stopped; what it has "
            "committed is kept)",
        ]
    )


def _end_of(said: Sequence[Event], token: str) -> tuple[Event | None, bool]:
    """How the process with this token ended its run (None: not yet); whether it has begun it."""
    begun = False
    for event in said:
        own, kind = event.get("token") == token, event["event"]
        begun |= own and kind == "taken"
        if (own and kind == "refused") or (begun and kind in ("released", "stopped", "failed")):
            return event, begun
    return None, begun


def _ended_in_flower(place: ServerFolder, number: str) -> str:
    """A sentence, if Flower has ended the run of this number; "" if not, or if it cannot say."""
    from silotune.server.operations.service import flwr

    try:
        said = flwr(place, "list", "silotune", "--run-id", number, "--format", "json")
        status = str(json.loads(said)["runs"][0]["status"])
    except (PeerError, ValueError, LookupError, TypeError):
        return ""
    if not status.startswith("finished"):
        return ""
    return f"Flower ended it before its first round ({status}); see what the server says."


def _follow(where: Path, events: Events, rounds: int, token: str) -> Path:
    """Say what happens until the run has its adapter; RunError if it ends without.

    token: of the process that is to carry it out. Another one may be writing here, too.
    """
    from silotune.server.storage.disk import no_room
    from silotune.server.storage.events import append
    from silotune.server.storage.run_store import is_running

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
            _print_event(event, rounds)
            if kind == "released":
                return where / "adapter.safetensors"
            if kind in ("stopped", "failed"):
                raise RunError(event["why"], code=event["code"])
        if not ours and time.monotonic() > end:
            late = no_room(where.parent) or RunError(
                "Flower did not begin the run; see what the server says.",
                code=ErrorCode.RUN_NOT_BEGUN,
            )
            with contextlib.suppress(OSError):  # so that `server status` shows it
                append(where, "refused", code=late.code, why=str(late), token=token)
            raise late
        alone = alone + 1 if ours and not is_running(where) else 0
        if alone > 2:  # what it said last has been read since
            raise no_room(where) or RunError(DIED, code=ErrorCode.RUN_INTERRUPTED)
        time.sleep(LOOK_SECONDS)


def _print_event(event: dict[str, Any], rounds: int) -> None:
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
    from silotune.server.rounds.arrivals import in_words

    return f"waiting for {in_words(event)}, {event['seconds']} s of {event['of']}"


def _without(absent: dict[str, str]) -> str:
    """ " without hungary (E201), switzerland (E403)", or nothing."""
    return " without " * bool(absent) + ", ".join(f"{s} ({c})" for s, c in sorted(absent.items()))
