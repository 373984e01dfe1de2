"""Secure aggregation in a simulation: the sites of a recipe get keys, as real ones bring their own.

A recipe's contract names no keys: their private halves would have to be public with it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.common.contract.contract import Contract
from silotune.common.secagg.key_agreement import default_threshold

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
    return with_masks(with_keys(contract, public), bound), keys


def with_keys(contract: Contract, public: Mapping[str, str]) -> Contract:
    """The contract with the sites' public keys in its roster."""
    found: Contract = contract.changed(
        sites=[
            site.model_dump(mode="json") | {"public_key": public[site.name]}
            for site in contract.sites
        ]
    )
    return found


def with_masks(contract: Contract, bound: float | None = None) -> Contract:
    """A contract whose roster has keys with secure aggregation.

    The threshold is the contract's own, or the usual one, or the contract's quorum where that is
    lower and still enough.
    """
    count = len(contract.sites)
    usual = default_threshold(count)
    own = contract.secure_aggregation and contract.secure_aggregation.threshold
    threshold = own or min(usual, max(contract.quorum, count // 2 + 1))
    found: Contract = contract.changed(
        quorum=max(contract.quorum, threshold),
        secure_aggregation={"threshold": threshold} | ({"bound": bound} if bound else {}),
    )
    return found


def _key(name: str, insecure_seed: int | None) -> bytes:
    if insecure_seed is None:
        return secrets.token_bytes(32)
    return hashlib.sha256(f"insecure key\0{insecure_seed}\0{name}".encode()).digest()
