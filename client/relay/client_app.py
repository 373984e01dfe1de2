"""The relay: a Flower ClientApp that passes bytes between the SuperLink and the worker.

It holds no records, no model and no torch. It does not read what it passes; whatever goes wrong
here leaves as an empty reply, never as an exception's text (Flower would send that to the server).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from silotune.client.relay.transport import ask
from silotune.common.protocol.messages import RECORD, WIRE

log = logging.getLogger(__name__)

ASK_TIMEOUT = 3600.0


def relay_app(worker_of: Callable[[Context, bytes], bytes]) -> ClientApp:
    """A ClientApp that answers every message with what the node's worker says."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            wire = message.content[RECORD][WIRE]
            reply = worker_of(context, wire) if isinstance(wire, bytes) else b""
        except Exception:
            log.exception("the message could not be relayed")
            reply = b""
        return Message(RecordDict({RECORD: ConfigRecord({WIRE: reply})}), reply_to=message)

    return app


def _over_socket(context: Context, wire: bytes) -> bytes:
    return ask(Path(str(context.node_config["socket"])), wire, ASK_TIMEOUT)


app = relay_app(_over_socket)
