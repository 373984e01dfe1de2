"""Secure aggregation in a simulation: the sites of a recipe get keys, as real ones bring their own.

A recipe's contract names no keys: their private halves would have to be public with it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.common.contract.contract import Contract

SigningKeys = dict[str, bytes]  # site -> private key, 32 bytes


def with_secure_aggregation(
    contract: Contract, insecure_seed: int | None, bound: float | None = None
) -> tuple[Contract, SigningKeys]:
    """The contract with secure aggregation and a roster of new keys, and their private halves.

    bound: of an update's entries, where the plan's rates need another than the usual.
    """
    keys = {site.name: _key(site.name, insecure_seed) for site in contract.sites}
    public = {
        name: Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw().hex()
        for name, key in keys.items()
    }
    return with_keys(contract, public).with_masks(bound), keys


def with_keys(contract: Contract, public: Mapping[str, str]) -> Contract:
    """The contract with the sites' public keys in its roster."""
    found: Contract = contract.changed(
        sites=[
            site.model_dump(mode="json") | {"public_key": public[site.name]}
            for site in contract.sites
        ]
    )
    return found


def _key(name: str, insecure_seed: int | None) -> bytes:
    if insecure_seed is None:
        return secrets.token_bytes(32)
    return hashlib.sha256(f"insecure key\0{insecure_seed}\0{name}".encode()).digest()
