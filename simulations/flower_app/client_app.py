"""The ClientApp: passes each message to its site's worker and the worker's reply back.

It has no records and no model, as in a deployment. A simulated node's `partition-id` says which
site it is.
"""

from flwr.app import Context

from silotune.client.relay.client_app import relay_app
from silotune.client.relay.transport import ask
from silotune.simulations.flower_app.sockets import socket_of

SECONDS = 600.0  # the longest that a worker may compute


def ask_worker(context: Context, wire: bytes) -> bytes:
    return ask(socket_of(context), wire, SECONDS)


app = relay_app(ask_worker)
