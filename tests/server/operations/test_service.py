"""What `silotune server start` says before it starts, and what it repeats of its processes."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from silotune.common.errors import UsageError
from silotune.common.runtime.journal import Journal
from silotune.server.operations.server_folder import ServerFolder, ServerSettings
from silotune.server.operations.service import Service


@contextmanager
def listening(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A port that somebody listens on, by TLS if there is a context."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    accepted, _ = server.accept()
                except OSError:  # closed
                    return
                with accepted:
                    if context is not None:
                        try:
                            context.wrap_socket(accepted, server_side=True).close()
                        except OSError:  # a look at the port alone
                            continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(30)


def service(folder: Path, **settings: int) -> Service:
    made = ServerFolder.create(
        folder, ServerSettings.model_validate({"host": "127.0.0.1", **settings})
    )
    return Service(made, Journal("server"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("key", ["port", "link_port"])
def test_a_port_that_another_program_has_is_named_by_its_key(tmp_path: Path, key: str) -> None:
    other = "port" if key == "link_port" else "link_port"
    with listening() as port:
        found = service(tmp_path / "fed", **{key: port, other: free_port()})
        with pytest.raises(UsageError) as caught:
            found.check_ports()
    assert f"{key} = {port} in " in str(caught.value)
    assert f"by another program: end that one, or set another {key}." in str(caught.value)


def test_a_server_that_runs_already_is_known_by_its_certificate(tmp_path: Path) -> None:
    first = service(tmp_path / "fed", port=free_port())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "fed" / "server.crt", tmp_path / "fed" / "server.key")
    with listening(context) as port:
        toml = first.place.folder / "server.toml"
        toml.write_text(toml.read_text().replace("link_port = 8000", f"link_port = {port}"))
        with pytest.raises(UsageError, match="this folder's own server runs already"):
            first.check_ports()
        other = service(tmp_path / "other", port=free_port(), link_port=port)
        with pytest.raises(UsageError, match="by another program"):
            other.check_ports()


def test_ports_that_are_free_are_not_spoken_of(tmp_path: Path) -> None:
    service(tmp_path / "fed", port=free_port(), link_port=free_port()).check_ports()


def test_a_metrics_port_that_is_taken_is_named_by_its_key(tmp_path: Path) -> None:
    with listening() as port:
        found = service(tmp_path / "fed", metrics_port=port)
        with pytest.raises(UsageError, match=r"It is metrics_port in server\.toml"):
            found._serve_metrics()


def test_requests_that_flower_answered_are_not_repeated(tmp_path: Path) -> None:
    lines: list[str] = []
    found = Service(service(tmp_path / "fed").place, Journal("server", write=lines.append))
    begin = "2026-11-30T08:00:00.123Z INFO [uvicorn.access] 127.0.0.1:4 - "
    for line in (
        f'{begin}"POST /v1/control/start-run HTTP/1.1" 200',
        "INFO : started",
        f'{begin}"POST /v1/control/start-run HTTP/1.1" 401',
    ):
        found.repeat("superlink", line)
    assert lines == [
        "superlink: INFO : started",
        f'superlink: {begin}"POST /v1/control/start-run HTTP/1.1" 401',
    ]
