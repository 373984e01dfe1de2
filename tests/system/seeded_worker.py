"""A worker with seeded noise, which no command line can start: what it sends must repeat in a test.

With --stop-at it answers no request of that kind: it says so by making a file, and waits to be
killed.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.relay.transport import listen, serve
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import load
from silotune.common.protocol import messages

SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("site")
    for name in ("contract", "data", "model", "socket", "key", "marker"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--stop-at")
    words = parser.parse_args()
    torch.set_num_threads(1)
    contract = load(words.contract)
    keys = None
    if words.key:
        keys = Keys(bytes(32), Ed25519PrivateKey.from_private_bytes(words.key.read_bytes()), b"")
    worker = Worker(
        permissive_policy(contract, words.site, words.data, words.model),
        contract,
        PrivacyLedger.in_memory(words.site, keys),
        insecure_seed=SEED,
    )

    def handle(wire: bytes) -> bytes:
        if messages.unpack(wire).header.kind == words.stop_at:
            words.marker.touch()
            while True:
                signal.pause()
        return worker.handle(wire)

    serve(handle, listen(words.socket))


if __name__ == "__main__":
    main()
