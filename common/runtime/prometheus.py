"""Metrics and health over HTTP, for a machine's own Prometheus: 127.0.0.1 alone, GET alone.

/metrics   Prometheus' text format
/healthz   200 "ok", or 503 and one word why not

Any user of the machine can connect, at a site also code that arrives with a Flower app. So a
connection gets a few seconds and few bytes, there are few at a time, and each is answered once:
who asks too much is not answered, and the process that serves it goes on.
"""

from __future__ import annotations

import http.server
import io
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from silotune.common.errors import UsageError

SECONDS = 5.0
LONGEST_HEAD = 4096
AT_ONCE = 8
HOST = "127.0.0.1"

Collect = Callable[[], Iterable[Metric]]
Health = Callable[[], str]  # "" if all is well, otherwise one word


def text(families: Iterable[Metric]) -> bytes:
    """The families in Prometheus' text format."""
    return generate_latest(_Families(families))


def serve(port: int, collect: Collect, health: Health) -> Monitor:
    """Answer on the port until closed; UsageError if it cannot be had."""
    try:
        server = _Server(port, collect, health)
    except OSError as error:
        raise UsageError(
            f"Metrics cannot be served on {HOST}:{port}: {error.strerror}. Choose another port."
        ) from None
    return Monitor(server)


class Monitor:
    """What `serve` has started. port: useful if it was 0."""

    def __init__(self, server: _Server) -> None:
        self._server, self.port = server, int(server.server_address[1])
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is closed, or the process is told to end."""
        self._thread.join()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, collect: Collect, health: Health) -> None:
        self.collect, self.health = collect, health
        self._places = threading.BoundedSemaphore(AT_ONCE)
        super().__init__((HOST, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The other side has gone."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "silotune", ""

    def setup(self) -> None:
        super().setup()
        # Read before it is parsed: a limit on each read would let one connection last without end.
        self.rfile.close()
        self.rfile = io.BytesIO(_head(self.connection))

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.command != "GET":
            self._reply(405, "GET alone\n")
            return False
        return True

    def do_GET(self) -> None:
        if self.path == "/metrics":
            try:
                body = text(self.server.collect())
            except Exception as error:  # whatever it is: its text may hold anything
                self._reply(500, f"not collected ({type(error).__name__})\n")
            else:
                self._reply(200, body.decode(), "text/plain; version=0.0.4; charset=utf-8")
        elif self.path == "/healthz":
            why = self.server.health()
            self._reply(503 if why else 200, f"{why or 'ok'}\n")
        else:
            self._reply(404, "/metrics or /healthz\n")

    def _reply(self, status: int, body: str, kind: str = "text/plain; charset=utf-8") -> None:
        self.close_connection = True
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if status == 405:
            self.send_header("Allow", "GET")
        self.end_headers()
        self.connection.settimeout(SECONDS)
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nobody's requests are worth a line each."""


def _head(connection: socket.socket) -> bytes:
    """A request's head, if it is whole within SECONDS and LONGEST_HEAD; b"" otherwise."""
    end, head = time.monotonic() + SECONDS, b""
    while b"\r\n\r\n" not in head:
        connection.settimeout(max(end - time.monotonic(), 0.001))
        try:
            more = connection.recv(LONGEST_HEAD - len(head))
        except OSError:
            return b""
        if not more:  # the other side has ended, or there is no room for more
            return b""
        head += more
    return head
