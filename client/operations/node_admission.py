"""Whether a server knows this site's node key, asked as Flower's SuperNode asks.

The request is Flower's ActivateNode, signed by the node key, with a heartbeat interval of 0, which
no SuperLink accepts. Flower 1.41 checks the signature first, then that the key is registered, then
the interval, and changes nothing before that (flwr/superlink/servicer/fleet/fleet_handlers.py). So
the two refusals distinguish a key that was admitted from one that was not, and asking neither
connects this site nor disturbs a relay that is connected with the same key.
"""

from __future__ import annotations

from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from silotune.client.operations.server_probe import within
from silotune.client.site.policy import Server
from silotune.common.errors import DataError, ErrorCode, PeerError

KNOWN = ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL  # the only thing wrong was the interval
UNKNOWN = ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED  # with this interval: no such key


def check(server: Server, node_key: Path) -> str:
    """Prove that the server knows the node key; a sentence that says so.

    Args:
        server: its address and the operator's CA.
        node_key: the private key that the relay gets (OpenSSH).
    Raises:
        PeerError: E405 if the server does not know the key; E401 if it cannot be asked, or answers
            as no server of this Flower does.
        DataError: if the key or the CA cannot be read.
    """
    try:
        key = load_ssh_private_key(node_key.read_bytes(), None)
        authority = server.ca.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{node_key} or {server.ca} cannot be read ({type(error).__name__})."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError(f"{node_key} is no key of the kind that Flower takes (ECDSA).")
    found = within(lambda: _asked(server.address, authority, key))
    if found == KNOWN:
        return f"admitted by {server.address}"
    if found == UNKNOWN:
        raise PeerError(
            f"{server.address} does not know this site's node key: the site is not admitted. The "
            "operator adds its request (silotune server add) and starts the server again.",
            code=ErrorCode.NODE_UNKNOWN,
        )
    raise PeerError(f"{server.address} could not be asked about this site's node key ({found}).")


def _asked(address: str, authority: bytes, key: ec.EllipticCurvePrivateKey) -> int | str:
    """Flower's code for the request, or what came instead."""
    public = public_key_to_bytes(key.public_key())
    signing = NodeAuthHttpInterceptor(key, key.public_key())
    client = FleetHttpClient.from_server_address(address, False, authority, [signing])
    try:
        client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=0.0))
    except httpx.HTTPStatusError as error:
        flower = FlowerError.from_json(error.response.text)
        return flower.code if flower is not None else f"status {error.response.status_code}"
    except (httpx.HTTPError, ValueError) as error:
        return type(error).__name__
    finally:
        client.close()
    return "it was accepted"
