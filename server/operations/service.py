"""`silotune server start`: Flower's SuperLink on the loopback interface, and nginx before it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from silotune.common.errors import PeerError, UsageError
from silotune.common.runtime import installation, prometheus, subprocesses
from silotune.common.runtime.atomic_files import write_durably
from silotune.common.runtime.journal import Journal, Source
from silotune.server.operations.server_folder import ServerFolder
from silotune.server.operations.telemetry import PROBE_SECONDS, ServerMonitor, answers

BIN = Path(sys.executable).parent
READY_SECONDS = 120.0
DRAIN_SECONDS = 20.0
ANSWERED = re.compile(r"\[uvicorn\.access\].* [1-3]\d\d$")  # a request that was as it should be


class Service:
    """Starts both processes, admits the roster's nodes; ends both when one ends or on a signal."""

    def __init__(self, place: ServerFolder, journal: Journal) -> None:
        self.place, self.emit = place, journal.emit
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        subprocesses.adopt_orphans()
        if (nginx := installation.nginx()) is None:
            raise UsageError("nginx is not installed. On Debian: apt-get install nginx")
        folder, settings = self.place.folder.resolve(), self.place.settings
        self.check_ports()
        served = self._serve_metrics()
        temporary = None
        try:
            if os.geteuid() == 0:  # then nginx works as nobody, who cannot pass through the folder
                temporary = Path(tempfile.mkdtemp(prefix="silotune-nginx-"))
                temporary.chmod(0o711)
            self.place.write_files(temporary)
            self._start(
                "superlink",
                [
                    BIN / "flower-superlink",
                    "--ssl-ca-certfile",
                    folder / "ca.crt",
                    "--ssl-certfile",
                    folder / "server.crt",
                    "--ssl-keyfile",
                    folder / "server.key",
                    "--enable-supernode-auth",
                    "--database",
                    folder / "state.db",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(settings.link_port),
                    "--disable-runtime-dependency-installation",
                ],
            )
            self._wait_for("superlink", "127.0.0.1", settings.link_port)
            self._register()
            self._start("nginx", [nginx, "-c", folder / "nginx.conf", "-p", folder / "nginx"])
            self._wait_for("nginx", settings.reachable, settings.port)
            if not self._stopping:
                self.emit(f"sites can connect to {settings.host}:{settings.port}", "ready")
            return self._watch()
        finally:
            # A run in hand says that it was stopped; what Flower has left running ends as well.
            subprocesses.end_all(seconds=DRAIN_SECONDS)
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            if served is not None:
                served.close()

    def check_ports(self) -> None:
        """UsageError for a port of server.toml that is taken: by this folder's own server, or by
        another program."""
        settings = self.place.settings
        for key, host, port in (
            ("link_port", "127.0.0.1", settings.link_port),
            ("port", settings.reachable, settings.port),
        ):
            if not answers(host, port):
                continue
            taken = f"{key} = {port} in {self.place.folder / 'server.toml'} is in use"
            if self._is_ours(host, port):
                raise UsageError(f"{taken}: this folder's own server runs already.")
            raise UsageError(f"{taken} by another program: end that one, or set another {key}.")

    def _is_ours(self, host: str, port: int) -> bool:
        """Whether what answers there shows this server's certificate."""
        own = (self.place.folder / "server.crt").read_text(encoding="utf-8")
        try:
            shown = ssl.get_server_certificate((host, port), timeout=PROBE_SECONDS)
        except OSError:
            return False
        return ssl.PEM_cert_to_DER_cert(shown) == ssl.PEM_cert_to_DER_cert(own)

    def _serve_metrics(self) -> prometheus.Monitor | None:
        if (port := self.place.settings.metrics_port) is None:
            return None
        shown = ServerMonitor(self.place, self._runs)
        try:
            return prometheus.serve(port, shown.collect, shown.health)
        except UsageError as error:
            raise UsageError(f"{error} It is metrics_port in server.toml.") from None

    def _runs(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def _watch(self) -> int:
        while not self._stopping:
            for name, process in self._processes.items():
                if (code := process.poll()) is not None:
                    self.emit(f"{name} ended with {code}; see the lines above", "ended")
                    return 1
            subprocesses.reap(but={process.pid for process in self._processes.values()})
            time.sleep(0.2)
        self.emit("stopped", "stopped")
        return 0

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _start(self, name: Source, command: list[str | Path]) -> None:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environment(self.place),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes[name] = process
        # nginx repeats what strangers send to it.
        subprocesses.repeat_lines(process, partial(self.repeat, name))

    def repeat(self, name: Source, line: str) -> None:
        """Say what a process said; not each request that Flower answered, which would hide what
        this server says itself."""
        if not ANSWERED.search(line):
            self.emit(line, source=name)

    def _wait_for(self, name: str, host: str, port: int) -> None:
        """PeerError if the process ends before it answers on the port, or never does."""
        end = time.monotonic() + READY_SECONDS
        while not self._stopping:
            if self._processes[name].poll() is not None:
                raise PeerError(f"{name} did not start; the lines above say why.")
            if answers(host, port):
                return
            if time.monotonic() > end:
                raise PeerError(f"{name} does not answer on port {port}.")
            time.sleep(0.1)

    def _register(self) -> None:
        """It answers on its port a moment before it takes commands."""
        end = time.monotonic() + READY_SECONDS
        while not self._stopping:
            try:
                for site in register(self.place):
                    self.emit(f"{site} may connect", "registered")
                return
            except PeerError:
                if time.monotonic() > end:
                    raise
                time.sleep(1.0)


def environment(place: ServerFolder) -> dict[str, str]:
    """Flower's files lie in the server's folder; it reports to nobody."""
    return os.environ | {
        "FLWR_HOME": str((place.folder / "flwr").resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PATH": f"{BIN}:{os.environ.get('PATH', '/usr/bin:/bin')}",
        "HF_HUB_OFFLINE": "1",
    }


def flwr(place: ServerFolder, *words: str | Path) -> str:
    """Run Flower's command line against this server's SuperLink; PeerError if it fails."""
    done = subprocess.run(
        [BIN / "flwr", *map(str, words)],
        env=environment(place),
        cwd=place.folder,
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
        check=False,
    )
    if done.returncode:
        words_ = (done.stdout + done.stderr).translate(dict.fromkeys(map(ord, "╭╮╰╯─│"))).split()
        raise PeerError(f"Flower's SuperLink at {place.link} says: {' '.join(words_[-40:])}")
    return done.stdout


def register(place: ServerFolder) -> list[str]:
    """Tell the SuperLink of the roster's nodes that it does not know; returns their sites."""
    done = place.folder.resolve() / "flwr" / "registered"
    done.mkdir(mode=0o700, exist_ok=True)
    added = []
    for request in place.roster():
        mark = done / request.site
        if mark.is_file() and mark.read_text() == request.node_key:
            continue
        key = done / f".{request.site}.pub"
        write_durably(key, f"{request.node_key}\n".encode())
        try:
            flwr(place, "supernode", "register", key, "silotune", "--name", request.site)
        except PeerError as error:  # a crash may have come before the mark
            if "already in use" not in str(error):
                raise
        key.rename(mark)
        write_durably(mark, request.node_key.encode())
        added.append(request.site)
    return added
