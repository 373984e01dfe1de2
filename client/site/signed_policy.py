"""The signature of a site's owner under a policy, and its adoption by the ledger."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import Field

from silotune.client.privacy import keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Adopted, UnitLimit
from silotune.client.site.commands import on_site
from silotune.client.site.policy import Policy, parse
from silotune.common.cli.main import command
from silotune.common.config import types
from silotune.common.config.types import (
    Frozen,
    Sha256,
)
from silotune.common.errors import RefusalError
from silotune.common.formats import strict_json
from silotune.common.runtime.atomic_files import write_durably
from silotune.common.signing import verifies


class Signature(Frozen):
    """site.toml.sig: the owner's signature of the policy's bytes, with a number that only rises."""

    policy: Sha256
    serial: Annotated[int, Field(ge=1, strict=True)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @staticmethod
    def statement(policy: str, serial: int) -> bytes:
        return f"silotune policy 1\n{policy}\n{serial}".encode()


def signature_file(path: Path) -> Path:
    return path.with_name(path.name + ".sig")


def sign(path: Path, owner_key: Path, after: int) -> Signature:
    """Sign a policy as the one that follows on serial number `after`; writes the .sig beside it."""
    text = types.read_text(path, "Policy")
    parse(text, path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    signed = keys.sign(owner_key, Signature.statement(digest, after + 1))
    found = Signature(policy=digest, serial=after + 1, signature=signed.hex())
    write_durably(signature_file(path), found.model_dump_json().encode())
    return found


def adopt(path: Path, ledger: PrivacyLedger, owner: bytes) -> Policy:
    """The policy, if its owner signed these bytes and no later ones; notes a new one in the ledger.

    RefusalError E213 otherwise.
    """
    text = types.read_text(path, "Policy")
    remedy = f"Look at it, then let the owner sign it: {command(*on_site(path, 'sign'))}"
    try:
        found = Signature.model_validate(strict_json.loads(signature_file(path).read_bytes()))
    except (OSError, ValueError, RecursionError):
        raise RefusalError(f"{path} is not signed. {remedy}", code="E213") from None
    digest = hashlib.sha256(text.encode()).hexdigest()
    if found.policy != digest:
        raise RefusalError(f"{path} has changed since its owner signed it. {remedy}", code="E213")
    statement = Signature.statement(digest, found.serial)
    if not verifies(owner.hex(), found.signature, statement):
        raise RefusalError(
            f"{path} carries a signature that is not the owner's. {remedy}", code="E213"
        )
    policy = parse(text, path)
    if policy.name != ledger.site:
        raise RefusalError(
            f"{path} is for '{policy.name}', but the ledger is that of '{ledger.site}'.",
            code="E213",
        )
    with ledger.writing():
        last = ledger.policy
        if last is None or found.serial > last.serial:
            first, *others = [
                UnitLimit(unit=unit, epsilon=limit.epsilon, delta=limit.delta)
                for unit, limit in policy.limits.items()
            ]
            ledger.keep_policy(text)
            ledger.append(
                Adopted, serial=found.serial, policy=digest, others=tuple(others), **vars(first)
            )
        elif (last.policy, last.serial) != (digest, found.serial):
            raise RefusalError(
                f"{path} is an older policy (number {found.serial}); the ledger has "
                f"adopted number {last.serial}. {remedy}",
                code="E213",
            )
    return policy


def adopted(ledger: PrivacyLedger) -> Policy:
    """The policy that the ledger adopted last, read from the ledger's own copy: an edit of
    site.toml that the owner has not signed has no effect.

    Raises:
        RefusalError: E213 if that copy is not on disk.
    """
    text = ledger.policy_text()
    if text is None:
        raise RefusalError(
            "The text of the policy adopted last is not in state/ any more. Start the worker "
            "again.",
            code="E213",
        )
    folder = Path() if ledger.folder is None else ledger.folder.parent  # client/site/folder.py
    return parse(text, folder / "site.toml")
