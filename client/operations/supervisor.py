"""`silotune site start`: one command that keeps a site's two processes, as two users.

The worker may read records, keys and ledger; the relay (Flower's SuperNode, which runs code that
arrives with Flower apps) may reach the worker's socket and a folder of its own. If the worker ends,
all ends; a relay that ends is started again, later each time, because the server refuses a node
that comes back within a minute.

As root this process trusts neither of the two users. The socket and the relay's folder lie in a
folder that root creates for each start, so neither user can put something else in their place;
what root reads from the site's folder (the relay's key, metrics) must be a plain file of the
worker's user, and of metrics only known names pass; each process gets a list of environment
variables, and pipes instead of root's terminal; no program they start gains rights by its file; and
what a Flower app leaves running ends with all other processes of the relay's user, which therefore
must be a user of its own.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from silotune.client.operations import telemetry
from silotune.client.relay import transport
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import Server
from silotune.client.site.safe_read import read_plain
from silotune.common.errors import PeerError, RefusalError, UsageError
from silotune.common.runtime import prometheus, subprocesses
from silotune.common.runtime.atomic_files import write_durably
from silotune.common.runtime.journal import Journal
from silotune.common.runtime.process_lock import try_lock

READY_SECONDS = 600.0
LONGEST_PAUSE = 60.0
LAST_WORDS_SECONDS = 5.0
# What a round has been charged is lost if it does not end: the server gets its reply later.
DRAIN_SECONDS = 300.0
BIN = Path(sys.executable).parent
OF_ROOT = Path("/run")  # only root can write there
ASK_SECONDS, LONGEST_REASON = 40.0, 400
HIGHEST_USER = 2**32 - 2  # 2^32 - 1 means "do not change it"
PASSED_ON = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


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
                "on public data: --one-user.",
                code="E207",
            )
        if os.geteuid() != 0:
            raise UsageError(
                "Only root can start processes as other users; or use systemd's "
                "units (client/deploy)."
            )
        return found

    @property
    def one(self) -> bool:
        return self.worker == self.relay or 0 in (self.worker, self.relay)


def _id(user: str) -> int:
    try:
        found = int(user) if user.isascii() and user.isdigit() else pwd.getpwnam(user).pw_uid
    except KeyError:
        found = -1
    if not 0 <= found <= HIGHEST_USER:
        raise UsageError(f"There is no user '{user}' on this machine.")
    return found


class Supervisor:
    """Starts, watches and stops the two processes; `run` returns the exit code."""

    def __init__(
        self,
        site: SiteFolder,
        contract: Path,
        server: Server,
        users: Users,
        journal: Journal,
        metrics_port: int | None = None,
        secrets: Sequence[str] = (),
    ) -> None:
        """secrets: names of environment variables that the worker gets, and the relay does not."""
        self.site, self.contract, self.server, self.users = site, contract, server, users
        self.journal, self.emit, self.metrics_port = journal, journal.emit, metrics_port
        self.secrets = secrets
        self.running = telemetry.Running(worker=False, relay=False)
        self.folder = Path()
        self._stopping = False
        self._worker = 0
        self._voices: list[threading.Thread] = []

    def run(self) -> int:
        """Keep both processes until told to stop; 0 then, 1 if the worker has ended.

        Raises:
            UsageError: E104 if another `site start` has this site's folder or its relay's user.
            PeerError: if the worker does not become ready.
        """
        with self._alone():
            return self._run()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the site's folder and the relay's user: a second relay with the same node key would
        be refused by the server, and the first of two with one user to end would kill the other.
        """
        folder, user = self.site.folder, self.users.relay
        wanted = {
            folder: f"Another `silotune site start` runs on {folder}. Stop it first (Ctrl-C, "
            "or SIGTERM to it)."
        }
        if user is not None:
            wanted[_folder_of_root() / f"silotune-relay-user-{user}.lock"] = (
                f"Another `silotune site start` has the relay user {user}, whose processes all end "
                "with that site. Give this site a relay user of its own (--relay-user)."
            )
        with contextlib.ExitStack() as held:
            for path, refusal in wanted.items():
                descriptor = try_lock(path)
                if descriptor is None:
                    raise UsageError(refusal, code="E104")
                held.callback(os.close, descriptor)
            yield

    def _run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        subprocesses.adopt_orphans()
        subprocesses.no_new_privileges()
        served = self._serve_metrics()
        self.folder = Path(tempfile.mkdtemp(prefix="silotune-", dir=_folder_of_root()))
        try:
            self._make_relay_folder()
            worker = self._start_worker()
            if worker is not None:
                self.emit(f"worker is ready on {self.folder / 'worker.sock'}", "ready")
                return self._watch(worker)
            self.emit("stopped", "stopped")
            return 0
        finally:
            self._end_relays_user()
            subprocesses.end_all(but=self._worker)
            subprocesses.end_all(seconds=DRAIN_SECONDS)
            for voice in self._voices:
                voice.join(LAST_WORDS_SECONDS)
            shutil.rmtree(self.folder, ignore_errors=True)
            if served is not None:
                served.close()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _serve_metrics(self) -> prometheus.Monitor | None:
        if self.metrics_port is None:
            return None
        shown = telemetry.SiteMonitor(self.site.state / telemetry.FILE, self._owner, self.running)
        return prometheus.serve(self.metrics_port, shown.collect, shown.health)

    def _watch(self, worker: subprocess.Popen[bytes]) -> int:
        self.running.worker = True
        relay, began, pause = self._start_relay(), time.monotonic(), 1.0
        self.emit(f"relay is connecting to {self.server.address}", "connecting")
        while not self._stopping:
            if worker.poll() is not None:
                self.running.worker = False
                self.emit(
                    f"the worker ended with {worker.returncode}; see the lines above, "
                    "state/worker.log, and dmesg if memory ran out",
                    "ended",
                )
                return 1
            if relay.poll() is not None:
                self.running.relay = False
                self._end_relays_user()  # what its apps have left running
                subprocesses.end_all(but=worker.pid)
                if time.monotonic() - began > LONGEST_PAUSE:
                    pause = 1.0
                self.emit(
                    f"the relay ended with {relay.returncode}; again in {pause:.0f} s"
                    f"{self._of_node_key()}",
                    "restarting",
                )
                end = time.monotonic() + pause
                while time.monotonic() < end and not self._stopping and worker.poll() is None:
                    time.sleep(0.1)
                pause = min(2 * pause, LONGEST_PAUSE)
                if not self._stopping and worker.poll() is None:
                    relay, began = self._start_relay(), time.monotonic()
            subprocesses.reap(but={worker.pid, relay.pid})
            time.sleep(0.1)
        self.emit("stopped", "stopped")
        return 0

    def _end_relays_user(self) -> None:
        if self.users.relay is not None:
            subprocesses.end_user(self.users.relay)

    @property
    def _owner(self) -> int:
        return os.geteuid() if self.users.worker is None else self.users.worker

    def _make_relay_folder(self) -> None:
        """The relay's home for this start: its node key, the CA's certificates, Flower's files."""
        home = self.folder / "relay"
        home.mkdir(mode=0o700)
        write_durably(home / "node.key", read_plain(self.site.relay / "node.key", self._owner).data)
        write_durably(home / "ca.crt", _certificates(self.server.ca))
        (home / "flwr").mkdir(mode=0o700)
        if self.users.relay is not None:
            self.folder.chmod(0o711)
            for path in (home / "node.key", home / "ca.crt", home / "flwr", home):
                os.chown(path, self.users.relay, _group(self.users.relay), follow_symlinks=False)

    def _start_worker(self) -> subprocess.Popen[bytes] | None:
        """The worker, once it says that it is ready; None if told to stop before.

        PeerError if it ends before.
        """
        readable, writable = os.pipe()
        wanted = [*PASSED_ON, *self.secrets]
        environment = {name: os.environ[name] for name in wanted if name in os.environ} | {
            "PATH": f"{BIN}:/usr/bin:/bin",
            "HOME": str(self.site.state),
            "LANG": "C.UTF-8",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        with transport.listen(self.folder / "worker.sock", self.users.relay) as listener:
            worker = self._start(
                [
                    BIN / "silotune",
                    "site",
                    "worker",
                    self.contract,
                    "--config",
                    self.site.config,
                    "--fd",
                    str(listener.fileno()),
                    "--ready-fd",
                    str(writable),
                    *(["--log-json"] if self.journal.as_json else []),
                ],
                self.users.worker,
                environment,
                partial(self.journal.pass_on, source="worker"),
                (listener.fileno(), writable),
            )
        self._worker = worker.pid
        os.close(writable)
        with os.fdopen(readable, "rb") as pipe:
            end = time.monotonic() + READY_SECONDS
            while not self._stopping and time.monotonic() < end:
                if select.select([pipe], [], [], 0.2)[0]:
                    break
            if self._stopping:
                return None
            if time.monotonic() > end:
                raise PeerError(f"The worker was not ready in {READY_SECONDS:.0f} s.")
            if pipe.read(1) != transport.READY:  # closed without a word: it ended
                raise PeerError("The worker did not start; the lines above say why.")
        return worker

    def _start_relay(self) -> subprocess.Popen[bytes]:
        home = self.folder / "relay"
        most = f"--nproc={subprocesses.MOST_PROCESSES}"  # counted over all processes of the user
        limit: list[str | Path] = [] if self.users.relay is None else ["prlimit", most]
        self.running.relay, self.running.relay_starts = True, self.running.relay_starts + 1
        return self._start(
            [
                *limit,
                BIN / "flower-supernode",
                "--root-certificates",
                home / "ca.crt",
                "--superlink",
                self.server.address,
                "--auth-supernode-private-key",
                home / "node.key",
                "--port",
                str(_free_port()),
                "--node-config",
                f'socket="{self.folder / "worker.sock"}"',
            ],
            self.users.relay,
            self._relay_environment(),
            # Always text: what code that arrived prints could look like a line of the worker's.
            partial(self.emit, source="relay"),
        )

    def _relay_environment(self) -> dict[str, str]:
        home = self.folder / "relay"
        return {
            "PATH": f"{BIN}:/usr/bin:/bin",
            "HOME": str(home),
            "USER": "silotune-relay",
            "LANG": "C.UTF-8",
            "FLWR_HOME": str(home / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        }

    def _of_node_key(self) -> str:
        """What the server says of this site's node key, in brackets, or nothing. The relay's user
        asks: root speaks to no server."""
        home = self.folder / "relay"
        process = self._popen(
            [
                BIN / "silotune",
                "site",
                "admission",
                "--server",
                self.server.address,
                "--ca",
                home / "ca.crt",
                "--key",
                home / "node.key",
            ],
            self.users.relay,
            self._relay_environment(),
            stderr=subprocess.DEVNULL,
        )
        try:
            output, _ = process.communicate(timeout=ASK_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return ""
        line = "".join(
            c for c in output.decode(errors="replace")[:LONGEST_REASON] if c.isprintable()
        )
        return f" ({line})" if line else ""

    def _start(
        self,
        command: list[str | Path],
        user: int | None,
        environment: dict[str, str],
        repeat: Callable[[str], None],
        fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:
        process = self._popen(command, user, environment, fds, subprocess.STDOUT)
        self._voices = [voice for voice in self._voices if voice.is_alive()]
        self._voices.append(subprocesses.repeat_lines(process, repeat))
        return process

    @staticmethod
    def _popen(
        command: list[str | Path],
        user: int | None,
        environment: dict[str, str],
        fds: tuple[int, ...] = (),
        stderr: int = subprocess.STDOUT,
    ) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [str(word) for word in command],
                env=environment,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd="/",
                umask=0o077,
                start_new_session=True,
                user=user,
                group=None if user is None else _group(user),
                extra_groups=None if user is None else [],
            )
        except PermissionError:
            raise UsageError(
                f"User {os.geteuid() if user is None else user} may not run {command[0]} or its "
                f"Python ({sys.base_prefix}). Install Silotune where that user can run it, for "
                "example in /opt/silotune.",
                code="E105",
            ) from None


def _folder_of_root() -> Path:
    """Where this process makes what nobody else may put there; the folder for temporary files if
    it is not root."""
    use = os.geteuid() == 0 and OF_ROOT.is_dir()
    return OF_ROOT if use else Path(tempfile.gettempdir())


def _certificates(path: Path) -> bytes:
    """The certificates in a PEM file and nothing else of it: the relay gets to read them."""
    try:
        found = x509.load_pem_x509_certificates(read_plain(path).data)
    except ValueError:
        raise UsageError(f"{path} (server.ca in site.toml) holds no PEM certificate.") from None
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in found)


def _group(user: int) -> int:
    """The user's own group; for a number that nobody has, the same number if no group has it."""
    try:
        return pwd.getpwuid(user).pw_gid
    except KeyError:
        pass
    try:
        name = grp.getgrgid(user).gr_name
    except KeyError:
        return user
    raise UsageError(f"User {user} has no name on this machine, and group {user} is '{name}'.")


def _free_port() -> int:
    """A port for the SuperNode's own local API; several sites can then share a machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
