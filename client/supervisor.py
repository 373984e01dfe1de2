"""`silotune site start`: one command that keeps a site's two processes, as two users.

The worker may read records, keys and ledger; the relay (Flower's SuperNode, which runs code that
arrives with Flower apps) may reach the worker's socket and its own folder. The socket is opened
here and handed to the worker. If the worker ends, all ends; a relay that ends is started again,
later each time, because the server refuses a node that comes back within a minute.
"""

from __future__ import annotations

import os
import pwd
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from silotune.client import wire
from silotune.client.policy import Server
from silotune.client.site import Site
from silotune.common.errors import PeerError, RefusalError, UsageError

READY_SECONDS = 600.0
STOP_SECONDS = 20.0
LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Users:
    """The ids by which the two processes run; None: this process's own."""

    worker: int | None = None
    relay: int | None = None

    @classmethod
    def parse(cls, worker: str | None, relay: str | None, *, one_user: bool) -> Users:
        """From names or numbers. Refuses one user for both unless that was asked for."""
        if worker is None and relay is None and one_user:
            return cls()
        if worker is None or relay is None or (found := cls(_id(worker), _id(relay))).one:
            raise RefusalError(
                "Worker and relay need two users (--worker-user, --relay-user; as root), so that "
                "code which arrives with a Flower app cannot read the records. To try things out "
                "on public data: --one-user.", code="E207",
            )
        if os.geteuid() != 0:
            raise UsageError("Only root can start processes as other users; or use systemd's "
                             "units (client/deploy).")
        return found

    @property
    def one(self) -> bool:
        return self.worker == self.relay or 0 in (self.worker, self.relay)


def _id(user: str) -> int:
    try:
        return int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"There is no user '{user}' on this machine.") from None


class Supervisor:
    """Starts, watches and stops the two processes; `run` returns the exit code."""

    def __init__(
        self, site: Site, contract: Path, server: Server, users: Users,
        say: Callable[[str], None],
    ) -> None:
        self.site, self.contract, self.server, self.users, self.say = (
            site, contract, server, users, say
        )
        self._stopping = False
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            worker = self._start_worker()
            self.say(f"worker is ready on {self.site.socket}")
            return self._watch(worker)
        finally:
            self._end_all()

    def _watch(self, worker: subprocess.Popen[bytes]) -> int:
        relay, began, pause = self._start_relay(), time.monotonic(), 1.0
        self.say(f"relay is connecting to {self.server.address}")
        while not self._stopping:
            if worker.poll() is not None:
                self.say(f"the worker ended with {worker.returncode}; its log says why")
                return 1
            if relay.poll() is not None:
                self._running.remove(relay)
                if time.monotonic() - began > LONGEST_PAUSE:
                    pause = 1.0
                self.say(f"the relay ended with {relay.returncode}; again in {pause:.0f} s")
                end = time.monotonic() + pause
                while time.monotonic() < end and not self._stopping and worker.poll() is None:
                    time.sleep(0.1)
                pause = min(2 * pause, LONGEST_PAUSE)
                if not self._stopping and worker.poll() is None:
                    relay, began = self._start_relay(), time.monotonic()
            time.sleep(0.1)
        self.say("stopped")
        return 0

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _start_worker(self) -> subprocess.Popen[bytes]:
        """The worker, once it says that it is ready. PeerError if it ends before."""
        readable, writable = os.pipe()
        with wire.listen(self.site.socket, self.users.relay) as listener:
            worker = self._start(
                [Path(sys.executable).parent / "silotune", "site", "worker", self.contract,
                 "--config", self.site.config, "--fd", str(listener.fileno()),
                 "--ready-fd", str(writable)],
                self.users.worker, dict(os.environ), (listener.fileno(), writable),
            )
        os.close(writable)
        with os.fdopen(readable, "rb") as pipe:
            end = time.monotonic() + READY_SECONDS
            while not self._stopping and time.monotonic() < end:
                if select.select([pipe], [], [], 0.2)[0]:
                    break
            # Closed without a word: it ended.
            if self._stopping or time.monotonic() > end or pipe.read(1) != wire.READY:
                raise PeerError("The worker did not start; the lines above say why.")
        return worker

    def _start_relay(self) -> subprocess.Popen[bytes]:
        relay = self.site.relay
        key = relay / "node.key"
        if self.users.relay is not None:
            for path in (relay, key):
                if path.lstat().st_uid != self.users.relay:
                    os.chown(path, self.users.relay, -1, follow_symlinks=False)
        # Nothing of this process's environment: what arrives with a Flower app can read it.
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(relay),
            "USER": "silotune-relay", "LANG": "C.UTF-8", "FLWR_HOME": str(relay / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        return self._start(
            [Path(sys.executable).parent / "flower-supernode",
             "--root-certificates", self.server.ca, "--superlink", self.server.address,
             "--auth-supernode-private-key", key, "--port", str(_free_port()),
             "--node-config", f'socket="{self.site.socket}"'],
            self.users.relay, environment,
        )

    def _start(
        self, command: list[str | Path], user: int | None, environment: dict[str, str],
        fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, pass_fds=fds,
            stdin=subprocess.DEVNULL, cwd="/", umask=0o077, start_new_session=True,
            user=user, group=None if user is None else _group(user),
            extra_groups=None if user is None else [],
        )
        self._running.append(process)
        return process

    def _end_all(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._running:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue
            end = time.monotonic() + STOP_SECONDS
            for process in self._running:
                try:
                    process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue


def _group(user: int) -> int:
    """The user's own group; for a number that no name has, the same number."""
    try:
        return pwd.getpwuid(user).pw_gid
    except KeyError:
        return user


def _free_port() -> int:
    """A port for the SuperNode's own local API; several sites can then share a machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
