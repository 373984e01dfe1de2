"""Shamir's secret sharing (1979, doi:10.1145/359168.359176) over the field of 2^255 - 19 elements.

A secret is an element of the field, uniform, so that fewer shares than the threshold say nothing
about it. The share of a holder is the value at its place x >= 1 of a polynomial of degree
threshold - 1 with random coefficients, whose value at 0 is the secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**255 - 19
SIZE = 32  # bytes of an element, little-endian


def draw() -> int:
    """A uniform element, from the operating system's generator."""
    return secrets.randbelow(PRIME)


def split(secret: int, threshold: int, places: Sequence[int]) -> list[int]:
    """One share for each place; any `threshold` of them give the secret."""
    if not 1 <= threshold <= len(places) or len(set(places)) < len(places) or min(places) < 1:
        raise ValueError("a threshold needs as many different places, all from 1 on")
    coefficients = [draw() for _ in range(threshold - 1)]
    shares = []
    for x in places:
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * x % PRIME
        shares.append((value + secret) % PRIME)
    return shares


def weights(places: Sequence[int]) -> list[int]:
    """Lagrange's weights: the value at 0 is the sum of weight times share over these places."""
    found = []
    for x in places:
        over, under = 1, 1
        for other in places:
            if other != x:
                over = over * other % PRIME
                under = under * (other - x) % PRIME
        found.append(over * pow(under, -1, PRIME) % PRIME)
    return found


def join(shares: Mapping[int, int]) -> int:
    """The secret from the shares by place; meaningless from fewer than the threshold."""
    places = list(shares)
    return sum(w * shares[x] for w, x in zip(weights(places), places, strict=True)) % PRIME


def to_bytes(element: int) -> bytes:
    return element.to_bytes(SIZE, "little")


def from_bytes(data: bytes) -> int:
    """ValueError unless these are the 32 bytes of an element."""
    element = int.from_bytes(data, "little")
    if len(data) != SIZE or element >= PRIME:
        raise ValueError("not an element of the field")
    return element
