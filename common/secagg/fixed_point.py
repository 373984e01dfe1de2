"""Fixed point in the ring Z_2^24, and the masks that are added there.

A site's entry x becomes round(x f), |x| <= bound, with f = w (2^22 - n) / bound for its weight w,
of weights that add up to 1 over the n sites. So the sum over any of them lies within +-2^22 and
never wraps, an entry has 2^23 w levels (17 bits at 50 equal sites), and one site's rounding moves
the sum by at most half of a unit. The half of the ring that no sum of honest updates can reach is
there to be checked: of a sum with a mask left on it each entry falls there half of the time.

An element travels in three bytes, little-endian. Words are uint32, of which the low 24 bits count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from silotune.common.errors import ErrorCode, ProtocolError

Words = NDArray[np.uint32]
Mask = tuple[bytes, bool]  # a key of 32 bytes, used once; whether the mask is taken off

BITS = 24
WIDTH = 3  # bytes an element
LARGEST_SUM = 1 << (BITS - 2)
MOST_SITES = 128  # leaves 16 bits to each of so many equal sites
_LOW = np.uint32((1 << BITS) - 1)
_CHUNK = 1 << 15  # words: what is worked on stays in the processor's cache
_ZEROS = bytes(4 * _CHUNK)


def factor(bound: float, weight: float, sites: int) -> float:
    """Units of the ring per unit of value, for a site with this part of all weights."""
    return weight * (LARGEST_SUM - sites) / bound


def quantise(values: NDArray[np.float32], factor: float, bound: float) -> Words:
    """round(values * factor) as words. ProtocolError E502 if one is beyond `bound` or no number."""
    largest = float(np.abs(values).max(initial=0.0))
    # Not >, as a NaN compares false; the bound as float32, which clipped values are.
    if not largest <= float(np.float32(bound)):
        raise ProtocolError(
            "The update has values that are not finite, or beyond secure_aggregation.bound = "
            f"{bound:g}.",
            code=ErrorCode.UPDATE_INVALID,
        )
    scaled = np.multiply(values, factor, dtype=np.float64)
    return np.rint(scaled, out=scaled).astype("<i4").view("<u4")


def encode(
    values: NDArray[np.float32], factor: float, bound: float, masks: Sequence[Mask]
) -> bytes:
    """`values` [d] quantised, masked and packed [3 d bytes]; takes twice that and a few chunks."""
    packed = bytearray(WIDTH * len(values))
    streams = _streams(masks)
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        words = quantise(part, factor, bound)
        _add(words, streams)
        packed[WIDTH * start : WIDTH * (start + len(part))] = _pack(words)
    return bytes(packed)


class Total:
    """The sum of packed vectors of `size` elements, in the ring."""

    def __init__(self, size: int) -> None:
        self.words: Words = np.zeros(size, dtype="<u4")

    def add(self, packed: bytes) -> None:
        """ProtocolError E502 if it is not as long as the others."""
        if len(packed) != WIDTH * len(self.words):
            raise ProtocolError(
                f"A masked update has {len(packed)} bytes, not {WIDTH * len(self.words)}.",
                code=ErrorCode.UPDATE_INVALID,
            )
        for start, part in self._parts():
            their = _unpack(packed[WIDTH * start : WIDTH * (start + len(part))])
            np.add(part, their, out=part)

    def mask(self, masks: Sequence[Mask]) -> None:
        streams = _streams(masks)
        for _, part in self._parts():
            _add(part, streams)

    def values(self, factor: float) -> NDArray[np.float32]:
        """The sum [size] divided by `factor`. ProtocolError E505 if no honest sum is that large."""
        found = np.empty(len(self.words), dtype="<f4")
        for start, part in self._parts():
            centred = (part << np.uint32(32 - BITS)).view("<i4") >> np.int32(32 - BITS)
            if max(int(centred.max()), -int(centred.min())) > LARGEST_SUM:
                raise ProtocolError(
                    "The sum is beyond what the contract's bound allows: a mask is left on it, or "
                    "a site did not keep to the bound.",
                    code=ErrorCode.MASKED_SUM_INVALID,
                )
            found[start : start + len(part)] = np.divide(centred, factor, dtype=np.float64)
        return found

    def _parts(self) -> Iterator[tuple[int, Words]]:
        for start in range(0, len(self.words), _CHUNK):
            yield start, self.words[start : start + _CHUNK]


def _streams(masks: Sequence[Mask]) -> list[tuple[CipherContext, bool]]:
    """ChaCha20 (RFC 8439) from its beginning; a key makes one mask only, so the nonce is zero.

    A key gives 2^32 blocks of 64 bytes, so a mask of up to 2^36 elements; an update of that size
    would take 256 GiB of memory.
    """
    return [
        (Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor(), minus) for key, minus in masks
    ]


def _add(words: Words, streams: Sequence[tuple[CipherContext, bool]]) -> None:
    """Add the next len(words) words of each stream, or take them off."""
    size = 4 * len(words)
    zeros, buffer = memoryview(_ZEROS)[:size], bytearray(size)
    mask = np.frombuffer(buffer, dtype="<u4")
    for stream, minus in streams:
        stream.update_into(zeros, buffer)
        (np.subtract if minus else np.add)(words, mask, out=words)


def _pack(words: Words) -> bytes:
    """The low 24 bits of each word: four words become three."""
    a, b, c, d = (_padded(words, 4) & _LOW).reshape(-1, 4).T
    packed = np.empty((len(a), 3), dtype="<u4")
    packed[:, 0] = a | b << np.uint32(24)
    packed[:, 1] = b >> np.uint32(8) | c << np.uint32(16)
    packed[:, 2] = c >> np.uint32(16) | d << np.uint32(8)
    return packed.tobytes()[: WIDTH * len(words)]


def _unpack(packed: bytes) -> Words:
    """The elements as words; above its 24 bits each holds a byte of the next, to be ignored."""
    shape = (len(packed) // WIDTH,)
    return np.ndarray(shape, dtype="<u4", buffer=packed + b"\0", strides=(WIDTH,))


def _padded(words: Words, multiple: int) -> Words:
    short = -len(words) % multiple
    return np.concatenate([words, np.zeros(short, dtype="<u4")]) if short else words
