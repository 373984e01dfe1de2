"""A site's folder: site.toml and what stands beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site import policy_file, signed_policy
from silotune.client.site.policy import Policy
from silotune.common.protocol.join_request import JoinRequest


@dataclass(frozen=True)
class SiteFolder:
    """keys/ and state/ are the worker's alone; relay/ holds the node key that the relay gets."""

    config: Path

    @classmethod
    def at(cls, config: Path) -> Self:
        """The site whose policy is `config`. UsageError E102 if there is none."""
        policy_file.require(config)
        return cls(config)

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

    def from_policy(self, file: Path) -> Path:
        """A file's path as site.toml has it: from the site's folder on, if it lies there."""
        file = file.parent.resolve() / file.name
        return file.relative_to(self.folder) if file.is_relative_to(self.folder) else file

    def request(self, name: str) -> JoinRequest:
        """What the operator gets: the public halves of the keys that are here."""
        node = (self.relay / "node.pub").read_text(encoding="ascii").strip()
        return JoinRequest(site=name, public_key=Keys.load(self.keys).public, node_key=node)

    def open(self) -> tuple[Policy, PrivacyLedger, Keys]:
        """The signed policy and the verified ledger. Raises SilotuneError if either is not."""
        keys = Keys.load(self.keys)
        ledger = PrivacyLedger.open(self.state, keys)
        return signed_policy.adopt(self.config, ledger, keys.owner), ledger, keys
