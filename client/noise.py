"""Randomness for privacy: a ChaCha20 stream, for the Gaussian noise and for the Poisson sample.

Torch's and numpy's generators are not made for secrets, and two clients with one seed draw the
same noise. Each stream here has its own 256-bit key from the operating system. Its output is
indistinguishable from uniform bits as long as ChaCha20 (RFC 8439) is a pseudo-random function.

A Gaussian number in double precision has gaps between its values that can tell neighbouring sums
apart (Mironov 2012, doi:10.1145/2382196.2382264). Each here is the sum of four independent ones
over two, so that an attacker must find four numbers of 53 bits for each value (Holohan and Braghin
2021, arXiv 2107.10138, the treatment of Opacus' secure mode), and client/dp.py rounds the noised
sum to a grain that is 2^42 times as coarse. That is protection in practice, not a proof: a discrete
mechanism, which would give one, has no accountant with Poisson sampling that is as tight.
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from scipy.special import ndtri


class NoiseSource:
    """A stream of uniform and Gaussian numbers from ChaCha20.

    insecure_seed: for tests and named simulations only. The key is then a hash of the seed and
    `site`, so that equally seeded sites still differ; anybody who knows the seed can remove the
    noise, and reports say so.
    """

    def __init__(self, *, site: str, insecure_seed: int | None = None) -> None:
        self.insecure = insecure_seed is not None
        if insecure_seed is None:
            key = os.urandom(32)
        else:
            key = hashlib.sha256(f"insecure\0{insecure_seed}\0{site}".encode()).digest()
        # One key, one stream, never rewound: a 64-bit counter does not run out.
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def uniform(self, n: int) -> NDArray[np.float64]:
        """n numbers in (0, 1]: (k + 1/2) / 2^53 for a uniform 53-bit k; the last rounds to 1."""
        bits = np.frombuffer(self._stream.update(bytes(8 * n)), dtype="<u8") >> np.uint64(11)
        return (bits.astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Standard normal numbers: four by inversion, added and halved."""
        # The largest k + 1/2 rounds to 2^53 in float64; keep the quantile finite.
        u = np.minimum(self.uniform(4 * math.prod(shape)), 1.0 - 2.0**-53)
        return np.asarray(ndtri(u).reshape(4, *shape).sum(axis=0) / 2)

    def poisson_sample(self, n: int, rate: float) -> NDArray[np.int64]:
        """The indices of n records of which each is taken, by itself, with probability `rate`."""
        return np.flatnonzero(self.uniform(n) < rate)
