"""A site's folder: site.toml and what stands beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import Ledger
from silotune.client.site import signed_policy
from silotune.client.site.policy import Policy
from silotune.common.cli.main import command
from silotune.common.errors import UsageError
from silotune.common.protocol.join_request import JoinRequest


@dataclass(frozen=True)
class SiteFolder:
    """keys/ and state/ are the worker's alone; relay/ holds the node key that the relay gets."""

    config: Path

    @classmethod
    def at(cls, config: Path) -> Self:
        """The site whose policy is `config`. UsageError E102 if there is none."""
        try:
            config.stat()
        except (FileNotFoundError, NotADirectoryError):
            remedy = command("site", "init", "--name", "NAME", "--folder", config.parent)
            raise UsageError(
                f"There is no site at {config}. Name its site.toml with --config, or make a site: "
                f"{remedy}",
                code="E102",
            ) from None
        except OSError as error:
            raise UsageError(
                f"Policy {config} cannot be read: {error.strerror}. Run this as the site's user.",
                code="E102",
            ) from None
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

    def open(self) -> tuple[Policy, Ledger, Keys]:
        """The signed policy and the verified ledger. Raises SilotuneError if either is not."""
        keys = Keys.load(self.keys)
        ledger = Ledger.open(self.state, keys)
        return signed_policy.adopt(self.config, ledger, keys.owner), ledger, keys
