"""`silotune site`: what a site's administrator does."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import click

from silotune.client.cli import checks
from silotune.client.cli.options import CONFIG, CONTRACT, LOG_JSON
from silotune.client.cli.personal import own
from silotune.client.cli.prepare import prepare
from silotune.client.cli.worker import worker
from silotune.client.site.commands import JOIN, JOIN_NOTE, on_site
from silotune.common.cli.main import command, emit, next_step
from silotune.common.cli.options import JSON
from silotune.common.contract import contract as contracts
from silotune.common.errors import SilotuneError, UsageError, counted
from silotune.common.runtime.journal import Journal
from silotune.common.runtime.terminal import echo

PORT = click.IntRange(1, 65535)
KEY = click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="File of the owner's private key, which signs the policy.",
)

ADDRESS = click.option(
    "--server", "address", required=True, help="The server's HOST:PORT, as the operator says."
)
CA = click.option(
    "--ca",
    required=True,
    type=click.Path(path_type=Path),
    help="File of the operator's CA certificate.",
)


@click.group()
def site() -> None:
    """Run a site."""


site.add_command(prepare)
site.add_command(own)
site.add_command(worker)


@site.command()
@click.option("--name", required=True, help="This site's name in the contract.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="The file with the records; by default records.csv in the site's folder.",
)
@click.option(
    "--folder",
    default=".",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder in which the site's files are made.",
)
@JSON
def init(name: str, data: Path | None, folder: Path, as_json: bool) -> None:
    """Create a site: keys, an empty ledger, and a policy to edit.

    \b
    $ silotune site init --name hospital-a --folder hospital-a
    ✓ keys made in hospital-a/keys (0600); they stay here
    ✓ policy  hospital-a/site.toml
    ✓ request hospital-a/hospital-a.request.json, for the operator: public parts only
    ! records …/hospital-a/records.csv is not there yet: …
    fingerprint  …  (read it out to the operator)
    next:   edit hospital-a/site.toml, then: silotune site sign --config hospital-a/site.toml
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from jinja2 import Environment, StrictUndefined
    from pydantic import TypeAdapter, ValidationError

    from silotune.client.privacy.keys import Keys, make_private_folder
    from silotune.client.privacy.ledger import PrivacyLedger
    from silotune.client.site.folder import SiteFolder
    from silotune.common.config.types import Name, as_toml
    from silotune.common.runtime.atomic_files import write_durably

    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise UsageError(
            f"'{name}' cannot be a site's name: use letters, digits, space, '.', '_' or '-'."
        ) from None
    if not folder.exists():
        make_private_folder(folder)
    made = SiteFolder(folder / "site.toml")
    if made.config.exists():
        raise UsageError(f"{made.config} is there already. Choose another folder.")
    keys = Keys.create(made.keys)
    PrivacyLedger.create(made.state, keys, name)
    make_private_folder(made.relay)
    node = ec.generate_private_key(ec.SECP384R1())  # the kind of key Flower's SuperNode takes
    write_durably(
        made.relay / "node.key",
        node.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
    )
    write_durably(
        made.relay / "node.pub",
        node.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        + b"\n",
    )
    records = data or Path("records.csv")
    if data is not None and data.exists():  # the reader's folder counts before the site's
        records = made.from_policy(data)
    expected = made.folder / records
    template = (resources.files("silotune.client.site") / "site.toml.j2").read_text(
        encoding="utf-8"
    )
    text = (
        Environment(
            undefined=StrictUndefined,
            keep_trailing_newline=True,
            autoescape=False,  # noqa: S701
        )
        .from_string(template)
        .render(name=name, data=as_toml(str(records)))
    )
    write_durably(made.config, text.encode())
    request = made.request(name)
    file = folder / f"{name}.request.json"
    write_durably(file, request.model_dump_json(indent=1).encode())
    facts = {
        "name": name,
        "config": str(made.config),
        "public_key": keys.public,
        "request": str(file),
        "fingerprint": request.fingerprint,
        "data": str(expected),
        "data_is_there": expected.is_file(),
    }
    emit(
        facts,
        as_json,
        "\n".join(
            [
                f"✓ keys made in {folder / 'keys'} (0600); they stay here",
                f"✓ policy  {made.config}",
                f"✓ request {file}, for the operator: public parts only",
                *(
                    []
                    if expected.is_file()
                    else [
                        f"! records {expected} is not there yet: put the records there, or correct "
                        f"data.file in {made.config}"
                    ]
                ),
                f"fingerprint  {request.fingerprint}  (read it out to the operator)",
                next_step(*on_site(made.config, "sign"), first=f"edit {made.config}, then: "),
            ]
        ),
    )


@site.command()
@CONFIG
def fingerprint(config: Path) -> None:
    """Print the fingerprint of this site's request.

    The site's administrator reads it out to the operator, who compares it (server add).

    \b
    $ silotune site fingerprint
    A8:26:…:CC
    """
    from silotune.client.site import policy as policies
    from silotune.client.site.folder import SiteFolder
    from silotune.common.protocol import join_request

    found, name = SiteFolder.at(config), policies.load(config).name
    file = found.folder / f"{name}.request.json"
    request = found.request(name)
    if file.exists() and join_request.load(file) != request:
        raise UsageError(f"{file} does not have this site's keys. Do not send it.")
    echo(request.fingerprint)


@site.command("join")
@CONTRACT
@CONFIG
@ADDRESS
@CA
@click.option(
    "--fingerprint", required=True, help="Fingerprint of the CA, as the operator reads it out."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another setting to write into site.toml.",
)
@KEY
def join_(
    contract: Path,
    config: Path,
    address: str,
    ca: Path,
    fingerprint: str,
    settings: tuple[str, ...],
    key: Path | None,
) -> None:
    """Permit a contract and its server in site.toml, and sign it.

    \b
    $ silotune site join heart.json --server fl.example.org:8443 --ca ca.crt --fingerprint 91:0C:…
    ✓ ca.crt is the CA that the operator read out
    ✓ leaves the site: updates of head, clipped per record and noised, masked so that …
    ✓ site.toml is policy number 1 of hospital-a: ε ≤ 8, δ = 0.0001 per record, 1 contract
    """
    from silotune.client.site.enrolment import enrol
    from silotune.client.site.folder import SiteFolder

    pairs = [setting.partition("=") for setting in settings]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise UsageError(
            f"--set takes KEY=VALUE, such as data.duplicate_records=keep, not '{wrong[0]}'."
        )
    found = contracts.load(contract)
    enrol(
        SiteFolder.at(config),
        found,
        address=address,
        ca=ca,
        fingerprint=fingerprint,
        settings={name: value for name, _, value in pairs},
    )
    echo(f"✓ {ca} is the CA that the operator read out")
    echo(f"✓ leaves the site: {found.leaves}")
    _sign(config, key, contract, as_json=False)


@site.command()
@CONFIG
@KEY
@JSON
def sign(config: Path, key: Path | None, as_json: bool) -> None:
    """Sign the policy as its owner.

    From now on runs begin under this version and no earlier one. A worker that is running finishes
    the run it has begun, as far as this version permits it: refusals and tighter limits hold at
    once. It takes part in another run after its next start.

    \b
    $ silotune site sign
    ✓ site.toml is policy number 2 of hospital-a: ε ≤ 8, δ = 0.0001 per record, 1 contract
    """
    _sign(config, key, None, as_json=as_json)


def _sign(config: Path, key: Path | None, contract: Path | None, *, as_json: bool) -> None:
    from silotune.client.privacy.keys import Keys
    from silotune.client.privacy.ledger import PrivacyLedger
    from silotune.client.site import signed_policy
    from silotune.client.site.folder import SiteFolder

    found = SiteFolder.at(config)
    keys = Keys.load(found.keys)
    ledger = PrivacyLedger.open(found.state, keys)
    signed = signed_policy.sign(
        config, key or found.keys / "owner.key", ledger.policy.serial if ledger.policy else 0
    )
    policy = signed_policy.adopt(
        config, ledger, keys.owner
    )  # or an earlier one could still come first
    permitted = len(policy.permits.contracts)
    limits = {unit: asdict(limit) for unit, limit in policy.limits.items()}
    emit(
        {"serial": signed.serial, "policy": signed.policy, "budgets": limits},
        as_json,
        f"✓ {config} is policy number {signed.serial} of {policy.name}: "
        f"{policy.limits_in_words()}, {counted(permitted, 'contract')}\n"
        "A worker that is running finishes the run it has begun, as far as this policy permits "
        "it. For another run, start it again.\n"
        + next_step(
            *on_site(config, "check", contract or "CONTRACT"),
            note="" if contract else "CONTRACT: the file that the operator sent",
        ),
    )


@site.command()
@CONTRACT
@CONFIG
@JSON
def check(contract: Path, config: Path, as_json: bool) -> None:
    """Check whether this site can take part in a contract.

    The server gets only a TLS handshake; nothing is spent.

    \b
    $ silotune site check heart.toml
      Check            Result                                          How to fix
    ✓ ledger           12 entries, chain, MACs and head verified
    ✗ data access      notes.csv is open to other users (mode 644).    chmod 600 notes.csv
    Not ready: 1 problem, 0 warnings. No record was sent, nothing was spent.
    """
    checks.stop_unless(checks.show(config, contract, as_json=as_json, local=True, network=True))
    if as_json:
        return
    from silotune.client.site import policy as policies  # loads torch

    if policies.load(config).server is None:
        echo(next_step(*on_site(config, "join", contract, *JOIN), note=JOIN_NOTE))
    else:
        echo(
            next_step(
                *on_site(config, "start", contract),
                "--worker-user",
                "USER",
                "--relay-user",
                "OTHER",
                note="as root; two users of this machine, made for this",
            )
        )


@site.command()
@CONTRACT
@CONFIG
@click.option("--worker-user", help="Who may read the records: a user of this machine.")
@click.option(
    "--relay-user",
    help="User for the relay (Flower's SuperNode). It must not be able to read the records, and "
    "must have no other use: all its processes end with the site.",
)
@click.option("--one-user", is_flag=True, help="Run both as this user: NOT for private records.")
@click.option("--metrics-port", type=PORT, help="Serve /metrics and /healthz on 127.0.0.1.")
@LOG_JSON
def start(
    contract: Path,
    config: Path,
    worker_user: str | None,
    relay_user: str | None,
    one_user: bool,
    metrics_port: int | None,
    log_json: bool,
) -> None:
    """Check, then run worker and relay until they are stopped.

    \b
    $ silotune site start heart.toml --worker-user silotune --relay-user silotune-relay
    worker is ready on /run/silotune-x1/worker.sock
    relay is connecting to server.example.org:8443
    """
    from silotune.client.operations.supervisor import Supervisor, Users
    from silotune.client.site import policy as policies
    from silotune.client.site.folder import SiteFolder
    from silotune.common.data import sql_source

    users = Users.parse(worker_user, relay_user, one_user=one_user)
    SiteFolder.at(config)
    policy = policies.load(config)
    if policy.server is None:
        raise UsageError(
            f"{config} has no [server]: "
            f"{command(*on_site(config, 'join', contract, *JOIN))} ({JOIN_NOTE})"
        )
    journal = Journal("supervisor", as_json=log_json)
    if users.worker is None:  # with two users only the worker's may read what is checked
        checks.stop_unless(checks.show(config, contract, write_line=journal.emit))
    file = contract.resolve()
    secrets = sql_source.variables(policy.data.url or "")
    if users.worker is not None and not all(name.startswith("SILOTUNE_") for name in secrets):
        # Of root's environment the policy, whose signature the worker checks later, names parts.
        raise UsageError(
            f"{config}: data.url names {', '.join(secrets)}. `site start` hands on variables whose "
            "names begin with SILOTUNE_ alone."
        )
    found = SiteFolder(config.resolve())
    sys.exit(Supervisor(found, file, policy.server, users, journal, metrics_port, secrets).run())


@site.command(hidden=True)
@ADDRESS
@CA
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path),
    help="File of the node's key, which the server admits.",
)
def admission(address: str, ca: Path, key: Path) -> None:
    """Ask the server whether it accepts this node key (internal).

    `site start` runs this as the relay's user.
    """
    from silotune.client.operations import node_admission
    from silotune.client.site.policy import Server

    try:
        found = node_admission.check(Server(address=address, ca=ca), key)
    except SilotuneError as error:
        echo(str(error))
    else:
        echo(f"{found}; after an unclean end it takes a site back within a minute")


@site.command()
@CONFIG
@click.option("--port", type=PORT, required=True, help="Port on 127.0.0.1 that serves the metrics.")
def metrics(config: Path, port: int) -> None:
    """Serve the metrics of a worker until stopped.

    /metrics and /healthz are those of a worker that another process of this machine runs, as the
    same user. `site start --metrics-port` needs no such process.

    \b
    $ silotune site metrics --config /var/lib/silotune/site.toml --port 9464
    http://127.0.0.1:9464/metrics
    """
    from silotune.client.operations.telemetry import FILE, SiteMonitor
    from silotune.client.site import policy_file
    from silotune.common.runtime import prometheus

    policy_file.require(config)
    file = config.resolve().parent / "state" / FILE  # not by Site, which loads torch
    if not file.parent.is_dir() or file.parent.stat().st_uid != os.geteuid():
        raise UsageError(
            f"{file.parent} does not exist or is not this user's: the site's worker makes it. Run "
            "this as the worker's user, after it."
        )
    shown = SiteMonitor(file, os.geteuid())
    served = prometheus.serve(port, shown.collect, shown.health)
    echo(f"http://{prometheus.HOST}:{served.port}/metrics")
    served.wait()
