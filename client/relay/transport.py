"""The worker's Unix socket: HTTP by uvicorn on one side, httpx on the other.

One request, POST /message, with the bytes of common/protocol/messages.py both ways; anything else
is 404 or 405. Who may connect is the file system's to say: the socket has mode 0600 and is the
relay user's, but its folder is not, so no other socket can be put in its place. A supervisor or
systemd opens it and hands it to the worker, which runs as another user. `ask` imports neither torch
nor the record code.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from silotune.common.errors import PeerError, UsageError
from silotune.common.protocol.messages import MAX_WIRE

Handle = Callable[[bytes], bytes]
LONGEST_PATH = 107
READY = b"1"  # what a worker writes to its supervisor's pipe when it answers


AT_ONCE = 2  # requests whose bodies are held in memory
BODY_SECONDS = 60.0


def application(handle: Handle) -> Starlette:
    turns = asyncio.Semaphore(AT_ONCE)

    async def message(request: Request) -> Response:
        async with turns:
            body = bytearray()
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for part in request.stream():
                        body += part
                        if len(body) > MAX_WIRE:
                            return Response(status_code=413)
            except (ClientDisconnect, TimeoutError):
                return Response(status_code=408)
            return Response(await run_in_threadpool(handle, bytes(body)))

    return Starlette(routes=[Route("/message", message, methods=["POST"])])


def listen(path: Path, user: int | None = None) -> socket.socket:
    """Open the socket for `user` alone (by default, this process's).

    With another user the folder can be passed through (0711), but neither listed nor written.
    """
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise UsageError(
            f"The socket's path {path} is longer than the {LONGEST_PATH} bytes that Unix allows. "
            "Choose a shorter folder."
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700 if user is None else 0o711)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Bound here because uvicorn would open a socket it makes itself to every user (0666).
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    if user is not None:
        os.chown(path, user, -1, follow_symlinks=False)
    listener.listen()
    return listener


def serve(
    handle: Handle, listener: socket.socket, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Answer on the socket until SIGTERM or SIGINT; `on_ready` is called just before."""
    on_ready()
    server(handle).run(sockets=[listener])


def server(handle: Handle) -> uvicorn.Server:
    """What answers on a socket of `listen`, once it is run."""
    config = uvicorn.Config(application(handle), log_level="warning", access_log=False, ws="none")
    return uvicorn.Server(config)


def ask(path: Path, wire: bytes, timeout: float) -> bytes:
    """Send one message to the worker behind `path`; PeerError if it does not answer."""
    try:
        if not path.is_socket():
            raise httpx.ConnectError("there is no socket")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=timeout) as client:
            response = client.post("http://worker/message", content=wire)
            response.raise_for_status()
            return response.content
    except httpx.HTTPError as error:
        raise PeerError(
            f"The worker does not answer on {path} ({type(error).__name__}). Start it with "
            "`silotune site start CONTRACT --config SITE.TOML`."
        ) from None
