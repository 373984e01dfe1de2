"""A site's keys. Made at the site, 0600 in a folder of 0700; none of them ever leaves it.

secret.key   32 random bytes; HKDF makes the ledger's MAC key and the fingerprints' key of it
site.key     Ed25519: signs the receipts a server keeps of the ledger
owner.key    Ed25519: signs the policy; belongs on the owner's stick once site.toml is signed
owner.pub    what the worker checks the policy's signature with
head         number, digest and MAC of the ledger's last entry: a ledger behind it was rolled back
"""

from __future__ import annotations

import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from silotune.common.errors import ErrorCode, UsageError
from silotune.common.runtime.atomic_files import write_durably


@dataclass(frozen=True)
class Keys:
    """What the worker holds. `folder` is None for keys that live in memory (simulations)."""

    secret: bytes
    signing: Ed25519PrivateKey
    owner: bytes
    folder: Path | None = None

    @classmethod
    def in_memory(cls, signing: bytes | None = None) -> Keys:
        """Keys that end with the process. signing: 32 bytes, of a simulated site's roster entry."""
        key = signing or secrets.token_bytes(32)
        return cls(secrets.token_bytes(32), Ed25519PrivateKey.from_private_bytes(key), b"")

    @classmethod
    def create(cls, folder: Path) -> Keys:
        """Make the site's keys; UsageError if the folder already has any."""
        make_private_folder(folder)
        if any((folder / name).exists() for name in ("secret.key", "site.key", "owner.key")):
            raise UsageError(
                f"{folder} already holds keys. With other keys the ledger beside them could not "
                "be read: choose another folder, or keep these.",
                code=ErrorCode.KEY_UNUSABLE,
            )
        owner = Ed25519PrivateKey.generate()
        for name, data in (
            ("secret.key", secrets.token_bytes(32)),
            ("site.key", Ed25519PrivateKey.generate().private_bytes_raw()),
            ("owner.key", owner.private_bytes_raw()),
            ("owner.pub", owner.public_key().public_bytes_raw()),
        ):
            write_durably(folder / name, data)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Keys:
        """Read the site's keys; UsageError E214 if one is missing, damaged or open to others."""
        if folder.is_dir() and folder.stat().st_uid != os.geteuid():
            # Files that another user, root too, writes here would be closed to the site's own.
            owner_id = folder.stat().st_uid
            raise UsageError(
                f"{folder} belongs to the user {owner_id}, who alone may use it: "
                f"setpriv --reuid={owner_id} --regid={owner_id} --clear-groups silotune …",
                code=ErrorCode.KEY_UNUSABLE,
            )
        secret, signing, owner = (
            _read_key(folder / name) for name in ("secret.key", "site.key", "owner.pub")
        )
        return cls(secret, Ed25519PrivateKey.from_private_bytes(signing), owner, folder)

    @property
    def public(self) -> str:
        """The site's public signing key, hexadecimal: it stands in the contract's roster."""
        return self.signing.public_key().public_bytes_raw().hex()

    def derive(self, purpose: str) -> bytes:
        """A key of 32 bytes for one purpose (RFC 5869)."""
        info = f"silotune {purpose} 1".encode()
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self.secret)

    def read_head(self) -> tuple[int, str]:
        """(number, digest) of the last entry this site knows of; UsageError if it is not there."""
        assert self.folder is not None
        path = self.folder / "head"
        try:
            number, head, mac = path.read_text(encoding="ascii").split()
            if int(number) < 1 or len(bytes.fromhex(head)) != 32:
                raise ValueError("no entry has that")
            if not hmac.compare_digest(mac, self._head_mac(number, head)):
                raise ValueError("it is not this site's")
            return int(number), head
        except (OSError, ValueError):
            raise UsageError(
                f"{path} is missing or damaged: without it nobody can tell whether the ledger was "
                "rolled back. Restore it from the site's backup, together with the ledger.",
                code=ErrorCode.LEDGER_DAMAGED,
            ) from None

    def write_head(self, number: int, head: str) -> None:
        if self.folder is not None:
            content = f"{number} {head} {self._head_mac(str(number), head)}\n"
            write_durably(self.folder / "head", content.encode())

    def _head_mac(self, number: str, head: str) -> str:
        """Hexadecimal; without the site's secret nobody can write a head that is believed."""
        return hmac.digest(self.derive("head mac"), f"{number} {head}".encode(), "sha256").hex()


def _read_key(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"Key {path} cannot be read: {error.strerror}. Restore it from the site's backup.",
            code=ErrorCode.KEY_UNUSABLE,
        ) from None
    if mode & 0o077:
        raise UsageError(
            f"Key {path} is open to other users (mode {mode & 0o777:o}). Close it with "
            f"chmod 600 {path}, and make new keys if somebody may have read it.",
            code=ErrorCode.KEY_UNUSABLE,
        )
    if len(data) != 32:
        raise UsageError(f"Key {path} has {len(data)} bytes, not 32.", code=ErrorCode.KEY_UNUSABLE)
    return data


def sign(key_file: Path, statement: bytes) -> bytes:
    """An Ed25519 signature by the key in a file."""
    return Ed25519PrivateKey.from_private_bytes(_read_key(key_file)).sign(statement)


def make_private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
