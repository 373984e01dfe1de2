"""Ed25519 (RFC 8032) signatures, with keys and signatures in hexadecimal."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Sign = Callable[[bytes], bytes]  # a statement -> its signature, 64 bytes


def verifies(public: str, signature: str, statement: bytes) -> bool:
    """Whether `signature` (64 bytes) is that of `statement` by the key `public` (32 bytes)."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), statement)
    except (InvalidSignature, ValueError):
        return False
    return True
