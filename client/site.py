"""A site's folder: site.toml and what stands beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from silotune.client import policy as policies
from silotune.client.keys import Keys
from silotune.client.ledger import Ledger
from silotune.client.policy import Policy
from silotune.common.join import JoinRequest


@dataclass(frozen=True)
class Site:
    """keys/ and state/ are the worker's alone; relay/ holds the node key that the relay gets."""

    config: Path

    @property
    def folder(self) -> Path:
        return self.config.resolve().parent

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def relay(self) -> Path:
        return self.folder / "relay"

    def request(self, name: str) -> JoinRequest:
        """What the operator gets: the public halves of the keys that are here."""
        node = (self.relay / "node.pub").read_text(encoding="ascii").strip()
        return JoinRequest(site=name, public_key=Keys.load(self.keys).public, node_key=node)

    def open(self) -> tuple[Policy, Ledger, Keys]:
        """The signed policy and the verified ledger. Raises SilotuneError if either is not."""
        keys = Keys.load(self.keys)
        ledger = Ledger.open(self.state, keys)
        return policies.adopt(self.config, ledger, keys.owner), ledger, keys
