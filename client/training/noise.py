"""Randomness for privacy: a ChaCha20 stream, for the Gaussian noise and for the Poisson sample.

Torch's and numpy's generators are not made for secrets, and two clients with one seed draw the
same noise. Each stream here has its own 256-bit key from the operating system. Its output is
indistinguishable from uniform bits as long as ChaCha20 (RFC 8439) is a pseudo-random function.

One key serves 2^32 blocks of 64 bytes at most: RFC 8439 counts blocks in 32 bits, and
`cryptography` raises an error after the last. So a stream changes its key after BLOCKS_OF_A_KEY
blocks. The first key is drawn from the operating system; key i, from the second on, is HKDF-SHA256
(RFC 5869) of a second secret, drawn independently, with i as its context. The whole stream is
indistinguishable from uniform bits if HKDF is a pseudo-random function of its context and ChaCha20
one of its counter: replace the keys by independent uniform ones (HKDF's assumption, once), then the
keystream of each by uniform bits (ChaCha20's assumption, once a key). No key is used for two
purposes, and no two keystreams share a key.

A Gaussian number in double precision has gaps between its values that can tell neighbouring sums
apart (Mironov 2012, doi:10.1145/2382196.2382264). Each here is the sum of four independent ones
over two, so that an attacker must find four numbers of 53 bits for each value (Holohan and Braghin
2021, arXiv 2107.10138, the treatment of Opacus' secure mode), and client/training/dp_optimizer.py
rounds the noised sum to a grain that is 2^42 times as coarse. That is protection in practice, not a
proof: a discrete mechanism, which would give one, has no accountant with Poisson sampling that is
as tight.
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from scipy.special import ndtri

BLOCK = 64  # bytes of one ChaCha20 block
BLOCKS_OF_A_KEY = 1 << 30  # 64 GiB, a quarter of what one key can give


class NoiseSource:
    """A stream of uniform and Gaussian numbers from ChaCha20.

    insecure_seed: for tests and named simulations only. The secrets are then hashes of the seed and
    `site`, so that equally seeded sites still differ; anybody who knows the seed can remove the
    noise, and reports say so.
    """

    def __init__(self, *, site: str, insecure_seed: int | None = None) -> None:
        self.insecure = insecure_seed is not None

        def secret(purpose: str) -> bytes:
            if insecure_seed is None:
                return os.urandom(32)
            return hashlib.sha256(f"{purpose}\0{insecure_seed}\0{site}".encode()).digest()

        self._later_keys = secret("insecure later keys")
        self._keys_used = 0
        self._use(secret("insecure"))

    def _use(self, key: bytes) -> None:
        """Continue with the keystream of a key that no other keystream has."""
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._keys_used += 1
        self._bytes_left = BLOCK * BLOCKS_OF_A_KEY

    def _keystream(self, size: int) -> bytes:
        """The next `size` bytes; a part that one key cannot give comes from the next keys."""
        parts: list[bytes] = []
        while size:
            if not self._bytes_left:
                info = f"silotune noise key {self._keys_used + 1}".encode()
                self._use(HKDF(SHA256(), 32, salt=None, info=info).derive(self._later_keys))
            parts.append(self._stream.update(bytes(min(size, self._bytes_left))))
            size -= len(parts[-1])
            self._bytes_left -= len(parts[-1])
        return b"".join(parts)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """n numbers in (0, 1]: (k + 1/2) / 2^53 for a uniform 53-bit k; the last rounds to 1."""
        bits = np.frombuffer(self._keystream(8 * n), dtype="<u8") >> np.uint64(11)
        return (bits.astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Standard normal numbers: four by inversion, added and halved."""
        # The largest k + 1/2 rounds to 2^53 in float64; keep the quantile finite.
        u = np.minimum(self.uniform(4 * math.prod(shape)), 1.0 - 2.0**-53)
        return np.asarray(ndtri(u).reshape(4, *shape).sum(axis=0) / 2)

    def poisson_sample(self, n: int, rate: float) -> NDArray[np.int64]:
        """The indices of n records of which each is taken, by itself, with probability `rate`."""
        return np.flatnonzero(self.uniform(n) < rate)
