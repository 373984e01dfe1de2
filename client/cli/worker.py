"""`silotune site worker`: the process that holds a site's records."""

from __future__ import annotations

import logging
import logging.handlers
import os
import resource
import socket as sockets
from pathlib import Path

import click

from silotune.client.cli import checks
from silotune.client.cli.options import CONFIG, CONTRACT, LOG_JSON
from silotune.common.contract import contract as contracts
from silotune.common.errors import UsageError
from silotune.common.runtime.journal import Journal

LOG_BYTES, LOGS = 10 << 20, 5


@click.command()
@CONTRACT
@CONFIG
@click.option(
    "--socket", type=click.Path(path_type=Path), help="Path of a Unix socket to answer on."
)
@click.option("--fd", type=int, help="Answer on this open socket (systemd: 3).")
@click.option(
    "--ready-fd",
    type=int,
    hidden=True,
    help="Open file that is written to when the worker is ready.",
)
@LOG_JSON
def worker(
    contract: Path,
    config: Path,
    socket: Path | None,
    fd: int | None,
    ready_fd: int | None,
    log_json: bool,
) -> None:
    """Check, then answer the relay until stopped. `site start` and systemd run this.

    \b
    $ silotune site worker heart.toml --config hospital-a/site.toml --socket run/worker.sock
    hospital-a is ready
    train heart-diagnosis-20261122-1015 round 1: ok, 1.2 s
    """
    from silotune.client.operations import telemetry
    from silotune.client.relay import transport
    from silotune.client.site.folder import SiteFolder
    from silotune.client.worker import request_outcome
    from silotune.common.runtime import subprocesses

    if (socket is None) == (fd is None):
        raise UsageError("Give one of --socket and --fd.")
    if ready_fd is not None:
        subprocesses.end_with_parent()
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold records
    journal = Journal("worker", as_json=log_json)
    checks.stop_unless(checks.show(config, contract, write_line=journal.emit))
    from silotune.client.worker.worker import Worker  # torch: not before the cheap checks

    found = SiteFolder(config)
    policy, ledger, _ = found.open()
    handler = logging.handlers.RotatingFileHandler(
        found.state / "worker.log", maxBytes=LOG_BYTES, backupCount=LOGS
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    log = logging.getLogger("silotune")
    log.addHandler(handler)
    log.propagate = False  # Opacus gives the root logger a handler that writes to stderr
    tally = telemetry.Tally(
        found.state / telemetry.FILE, policy.server.ca if policy.server else None
    )

    def log_answer(answered: request_outcome.Answered) -> None:
        tally.note(answered)
        if answered.kind == request_outcome.OTHER:
            return  # counted; of its lines whoever reaches the socket could make any number
        journal.emit(answered.text, "answered", answered.facts)

    answering = Worker(policy, contracts.load(contract), ledger, on_answer=log_answer)
    listener = transport.listen(socket) if socket is not None else sockets.socket(fileno=fd)

    def announce_ready() -> None:
        tally.ready()
        journal.emit(f"{policy.name} is ready", "ready")
        if ready_fd is not None:
            os.write(ready_fd, transport.READY)
            os.close(ready_fd)

    transport.serve(answering.handle, listener, announce_ready)
