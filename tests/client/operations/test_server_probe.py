"""The way to a server: each thing that can be wrong with it is told by its own sentence."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from silotune.client.operations import server_probe
from silotune.client.operations.server_probe import shake
from silotune.client.site.policy import Server
from silotune.common.errors import DataError, PeerError
from silotune.server.operations import certificate_authority

Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """serve(hosts=…, ahead=seconds, body=…, version=…): a TLS server as nginx is, and the way to
    it."""
    servers: list[ThreadingHTTPServer] = []
    _, key, ca = certificate_authority.make_ca("the operator")
    (tmp_path / "ca.crt").write_bytes(ca.public_bytes(certificate_authority.Encoding.PEM))

    def new(
        hosts: tuple[str, ...] = ("127.0.0.1",),
        ahead: float = 0.0,
        body: bytes = b"ok\n",
        version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response_only(200)
                now = datetime.now(UTC) - timedelta(seconds=ahead)
                self.send_header("Date", format_datetime(now, usegmt=True))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        pem = certificate_authority.make_server(list(hosts), key, ca)
        (tmp_path / "server.crt").write_bytes(pem.certificate)
        (tmp_path / "server.key").write_bytes(pem.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = version
        context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return Server(address=f"127.0.0.1:{server.server_address[1]}", ca=tmp_path / "ca.crt")

    yield new
    for server in servers:
        server.shutdown()
        server.server_close()


def told(server: Server) -> str:
    with pytest.raises(PeerError) as error:
        shake(server)
    return str(error.value)


def test_a_good_way(serve: Serve) -> None:
    assert "TLS 1.3" in shake(serve())


@pytest.mark.parametrize(
    ("ahead", "sentence"),
    [
        (300.0, "5 min ahead of the server's"),
        (-3600.0, "60 min behind"),
        (80.5, "ahead of the server's; Flower allows 5 s"),
    ],
)
def test_a_clock_that_flower_would_refuse(serve: Serve, ahead: float, sentence: str) -> None:
    found = told(serve(ahead=ahead))
    assert sentence in found
    assert "Set it (NTP)" in found


def test_a_clock_that_is_off_but_allowed_is_told(serve: Serve) -> None:
    assert "5 min off" in shake(serve(ahead=-290.0))


def test_another_authority(serve: Serve, tmp_path: Path) -> None:
    other, _, _ = certificate_authority.make_ca("somebody else")
    (tmp_path / "other.crt").write_bytes(other.certificate)
    found = told(serve().model_copy(update={"ca": tmp_path / "other.crt"}))
    assert "Do not continue; phone the operator" in found
    assert certificate_authority.fingerprint(other.certificate)[:5] in found


def test_another_name(serve: Serve) -> None:
    assert "for another name than 127.0.0.1" in told(serve(("fl.example.org",)))


def test_a_certificate_that_has_expired(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate_authority, "SKEW", timedelta(days=9))
    monkeypatch.setattr(certificate_authority, "SERVER_DAYS", -1)
    assert "not valid at this machine's time" in told(serve())


def test_older_tls(serve: Serve) -> None:
    assert "does not speak TLS 1.3" in told(serve(version=ssl.TLSVersion.TLSv1_2))


def test_something_else_that_answers(serve: Serve) -> None:
    assert "not as a Silotune server does" in told(serve(body=b"<html>It works!</html>"))


def test_nobody_listens(serve: Serve) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        found = told(serve().model_copy(update={"address": f"127.0.0.1:{port}"}))
    assert f"127.0.0.1 refuses port {port}" in found


def test_a_name_that_does_not_resolve(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    server = serve().model_copy(update={"address": "fl.example.org:8443"})
    assert "fl.example.org does not resolve" in told(server)


def test_silence(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_probe, "SECONDS", 0.2)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as mute:
        server = serve().model_copy(update={"address": f"127.0.0.1:{mute.getsockname()[1]}"})
        assert "a firewall?" in told(server)


def test_a_server_that_never_finishes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, the end never does."""
    monkeypatch.setattr(server_probe, "SECONDS", 0.5)
    slow, stop = threading.Event(), threading.Event()

    def drip(*_: object) -> tuple[int, bytes, str]:
        slow.set()
        stop.wait(20)
        return 200, b"", ""

    monkeypatch.setattr(server_probe, "_greet", drip)
    try:
        assert "a firewall?" in told(serve())
    finally:
        stop.set()
    assert slow.is_set()


def test_a_body_without_end_is_not_read(serve: Serve) -> None:
    assert "not as a Silotune server does" in told(serve(body=b"ok\n" * 10_000_000))


@pytest.mark.parametrize("address", ["[::1:1", ".:1", f"{'a' * 64}.org:1"])
def test_what_is_no_address(serve: Serve, address: str) -> None:
    assert "is no address" in told(serve().model_copy(update={"address": address}))


@pytest.mark.parametrize("content", [None, b"", b"not a certificate"])
def test_a_ca_that_cannot_be_read(serve: Serve, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.crt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="holds no certificate"):
        shake(serve().model_copy(update={"ca": path}))
