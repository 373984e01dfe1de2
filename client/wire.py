"""The worker's Unix socket: HTTP by uvicorn on one side, httpx on the other.

One request, POST /message, with the bytes of common/messages.py both ways. The socket is in a
folder of mode 0700 and has mode 0600. `ask` imports neither torch nor the record code.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from silotune.common.errors import PeerError
from silotune.common.messages import MAX_WIRE

Handle = Callable[[bytes], bytes]


def application(handle: Handle) -> Starlette:
    async def message(request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_WIRE:
                return Response(status_code=413)
        return Response(await run_in_threadpool(handle, bytes(body)))

    return Starlette(routes=[Route("/message", message, methods=["POST"])])


def serve(handle: Handle, path: Path, on_ready: Callable[[], None] = lambda: None) -> None:
    """Answer on the socket until SIGTERM or SIGINT; `on_ready` is called when it is open."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    # Bound here because uvicorn would open a socket it makes itself to every user (0666).
    before = os.umask(0o177)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen()
    finally:
        os.umask(before)
    on_ready()
    config = uvicorn.Config(application(handle), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


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
            "`silotune site start`."
        ) from None
