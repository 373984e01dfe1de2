"""Secure aggregation in a simulation: the sites of a recipe get keys, as real ones bring their own.

A recipe's contract names no keys: their private halves would have to be public with it.
"""

from __future__ import annotations

import hashlib
import secrets

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.common.contract.contract import Contract
from silotune.common.secagg.key_agreement import default_threshold

SigningKeys = dict[str, bytes]  # site -> private key, 32 bytes


def with_secure_aggregation(
    contract: Contract, insecure_seed: int | None, bound: float | None = None
) -> tuple[Contract, SigningKeys]:
    """The contract with secure aggregation and a roster of new keys, and their private halves.

    The threshold is the contract's own, or the usual one, or the contract's quorum where that is
    lower and still enough.
    bound: of an update's entries, where the plan's rates need another than the usual.
    """
    sites = [site.name for site in contract.sites]
    usual = default_threshold(len(sites))
    own = contract.secure_aggregation and contract.secure_aggregation.threshold
    threshold = own or min(usual, max(contract.quorum, len(sites) // 2 + 1))
    keys = {name: _key(name, insecure_seed) for name in sites}
    roster = [
        site.model_dump(mode="json")
        | {
            "public_key": Ed25519PrivateKey.from_private_bytes(keys[site.name])
            .public_key()
            .public_bytes_raw()
            .hex()
        }
        for site in contract.sites
    ]
    found = contract.changed(
        sites=roster,
        quorum=max(contract.quorum, threshold),
        secure_aggregation={"threshold": threshold} | ({"bound": bound} if bound else {}),
    )
    return found, keys


def _key(name: str, insecure_seed: int | None) -> bytes:
    if insecure_seed is None:
        return secrets.token_bytes(32)
    return hashlib.sha256(f"insecure key\0{insecure_seed}\0{name}".encode()).digest()
