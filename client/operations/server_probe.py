"""The way to the server, proved by going it: name, port, certificate, clock.

Nothing is sent but a TLS handshake and GET /health. Causes are distinguished, because a wrong
name, a firewall, an expired certificate and another authority need different people to fix them.
"""

from __future__ import annotations

import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from silotune.client.site.policy import Server
from silotune.common.errors import DataError, PeerError
from silotune.common.protocol.join_request import pairs

T = TypeVar("T")
SECONDS = 10.0
# Flower refuses a node whose signed time lies further ahead of the server's, or behind.
MOST_AHEAD, MOST_BEHIND = 5.0, 305.0
DAYS = 30  # before a certificate expires it is said


def shake(server: Server) -> str:
    """What was found, in a line; PeerError with what is wrong, DataError for the CA."""
    host, _, port = server.address.rpartition(":")
    began = time.perf_counter()
    try:
        context = ssl.create_default_context(cafile=str(server.ca))
        authority = x509.load_pem_x509_certificate(server.ca.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{server.ca} (server.ca) holds no certificate that can be read "
            f"({type(error).__name__})."
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        status, body, date = within(lambda: _greet(server.address, context))
    except (httpx.InvalidURL, UnicodeError):
        raise PeerError(f"{server.address} is no address (server.address).") from None
    except Exception as error:
        raise PeerError(_cause(error, host.strip("[]"), port, authority)) from None
    took = time.perf_counter() - began
    if (status, body) != (200, b"ok\n"):
        raise PeerError(f"{server.address} answers, but not as a Silotune server does.")
    ahead = time.time() - _date(date)
    if not -MOST_BEHIND < ahead < MOST_AHEAD + 1:  # the date has whole seconds
        which = "ahead of" if ahead > 0 else "behind"
        raise PeerError(
            f"this machine's clock is {_span(abs(ahead))} {which} the server's; Flower "
            f"allows {MOST_AHEAD:.0f} s ahead and 5 min behind. Set it (NTP)."
        )
    left = (authority.not_valid_after_utc.timestamp() - time.time()) / 86400
    soon = f", the CA expires in {left:.0f} days" if left < DAYS else ""
    clock = f", clock {_span(abs(ahead))} off" if abs(ahead) > 60 else ""
    return f"TLS 1.3 with {server.address}, {1000 * took:.0f} ms{clock}{soon}"


def within(step: Callable[[], T]) -> T:
    """What a step over the network gives, or raises; TimeoutError if it takes too long. A timeout
    of httpx is one for each read: whoever sends a byte now and then would keep us here."""
    answer: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()

    def take() -> None:
        try:
            found = step()
        except Exception as error:
            failure = error

            def again() -> T:
                raise failure

            answer.put(again)
        else:
            answer.put(lambda: found)

    threading.Thread(target=take, daemon=True).start()
    try:
        return answer.get(timeout=2 * SECONDS)()
    except queue.Empty:
        raise TimeoutError from None


def _greet(address: str, context: ssl.SSLContext) -> tuple[int, bytes, str]:
    """The answer to GET /health: status, the body's first bytes as they come, date."""
    headers = {"Accept-Encoding": "identity"}
    with (
        httpx.Client(verify=context, timeout=SECONDS, trust_env=False, headers=headers) as client,
        client.stream("GET", f"https://{address}/health") as reply,
    ):
        body = next(reply.iter_raw(64), b"")
        return reply.status_code, body, reply.headers.get("date", "")


def _cause(error: Exception, host: str, port: str, authority: x509.Certificate) -> str:
    """Why the connection failed, as one sentence."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for found in chain:
        if isinstance(found, socket.gaierror):
            return f"{host} does not resolve. Is the name right (server.address)?"
        if isinstance(found, ssl.SSLCertVerificationError):
            return _distrust(found, host, authority)
        if isinstance(found, ssl.SSLError):
            return f"{host}:{port} does not speak TLS 1.3 ({found.reason})."
        if isinstance(found, ConnectionRefusedError):
            return f"{host} refuses port {port}: nothing listens there."
        if isinstance(found, httpx.TimeoutException | TimeoutError):
            return f"{host}:{port} did not answer in {SECONDS:.0f} s: a firewall?"
    return f"{host}:{port} cannot be reached ({type(error).__name__})."


def _distrust(error: ssl.SSLCertVerificationError, host: str, authority: x509.Certificate) -> str:
    why = re.sub(r"[^A-Za-z0-9 .,':-]", "", error.verify_message or "")
    if "expired" in why or "not yet valid" in why:
        return (
            f"the server's certificate is not valid at this machine's time ({why}). Is the "
            "clock right? Then the operator makes a new certificate."
        )
    if "mismatch" in why or "not valid for" in why:
        return f"the server's certificate is for another name than {host}: check server.address."
    own = pairs(authority.fingerprint(SHA256()))
    return (
        f"the server's certificate is not signed by the CA you enrolled with "
        f"({own[:5]}…{own[-5:]}). Do not continue; phone the operator."
    )


def _date(text: str) -> float:
    try:
        return parsedate_to_datetime(text).timestamp()
    except ValueError:
        return time.time()


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
