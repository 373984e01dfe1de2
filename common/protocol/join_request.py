"""What a site sends to the operator to be added to a federation: public parts only.

The operator compares the request's fingerprint with what the site's administrator reads out, over
the telephone or in person: whoever carries the file could have put other keys into it.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from silotune.common.config import types
from silotune.common.config.types import Frozen, Name, Sha256
from silotune.common.errors import UsageError

NodeKey = Annotated[str, Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]{100,300}$")]


class JoinRequest(Frozen):
    """public_key: Ed25519, for the contract's roster. node_key: of the site's Flower SuperNode."""

    format: Literal[1] = 1
    site: Name
    public_key: Sha256
    node_key: NodeKey

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical form, its first 16 bytes in hexadecimal pairs."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return pairs(hashlib.sha256(canonical.encode()).digest()[:16])

    def says(self, fingerprint: str) -> bool:
        """Whether this is what somebody read out, however they wrote it down."""
        return same(self.fingerprint, fingerprint)


def pairs(data: bytes) -> str:
    return data.hex(":").upper()


def same(fingerprint: str, given: str) -> bool:
    """Whether `given` is this fingerprint, with or without colons, spaces and capitals. UsageError
    if it is none at all: a slip of the pen says nothing about who sent what."""
    own, other = fingerprint.replace(":", ""), re.sub("[: ]", "", given).upper()
    if not re.fullmatch(f"[0-9A-F]{{{len(own)}}}", other):
        raise UsageError(
            f"'{given}' is no fingerprint: this one has {len(own) // 2} pairs of "
            "hexadecimal digits."
        )
    return own == other


def load(path: Path) -> JoinRequest:
    """Read a request; ContractError lists what is wrong with it."""
    return types.parse(types.read_text(path, "Join request"), f"{path.stem}.json", JoinRequest)
