"""Fixed point and masks: exact sums in the ring, and refusal of all that would not be."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.errors import ProtocolError
from silotune.common.secagg import fixed_point

FUZZ = settings(deadline=None, max_examples=60, derandomize=True, database=None)
BORDER = fixed_point._CHUNK
LENGTHS = (0, 1, 2, 3, 4, 5, 7, 8, BORDER - 1, BORDER, BORDER + 1, 2 * BORDER + 3)
BAD = (
    np.nan,
    np.inf,
    -np.inf,
    np.float32(3.4e38),
    np.float32(-3.4e38),
    np.nextafter(np.float32(0.5), np.float32(1)),
    -np.nextafter(np.float32(0.5), np.float32(1)),
)


def key(n: int) -> bytes:
    return bytes([n]) * 32


def words(n: int, seed: int = 0) -> fixed_point.Words:
    return np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)


def refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(ProtocolError) as caught:
        call()
    assert caught.value.code == code


# --- packing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_the_low_24_bits_travel_in_three_bytes_each_little_endian(length: int) -> None:
    sent = words(length)
    packed = fixed_point._pack(sent)
    assert packed == b"".join(struct.pack("<I", int(w))[:3] for w in sent)
    assert len(packed) == 3 * length
    back = fixed_point._unpack(packed)
    assert np.array_equal(back & fixed_point._LOW, sent & fixed_point._LOW)
    assert len(back) == length


@FUZZ
@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=40))
def test_packing_loses_nothing_of_the_ring(drawn: list[int]) -> None:
    sent = np.array(drawn, "<u4")
    back = fixed_point._unpack(fixed_point._pack(sent))
    assert [int(w) % (1 << 24) for w in back] == [w % (1 << 24) for w in drawn]


@pytest.mark.parametrize("length", LENGTHS)
def test_an_encoded_update_has_three_bytes_an_element(length: int) -> None:
    values = np.zeros(length, np.float32)
    assert len(fixed_point.encode(values, 1.0, 1.0, [(key(1), False)])) == 3 * length


# --- quantising ------------------------------------------------------------------------------


def test_values_are_rounded_to_the_nearest_half_to_even() -> None:
    values = np.array([0, 0.4, 0.5, 0.6, 1.5, 2.5, -0.4, -0.5, -0.6, -1.5, 100], np.float32)
    got = fixed_point.quantise(values, 1.0, 100.0).view(np.int32)
    assert got.tolist() == [0, 0, 0, 1, 2, 2, 0, 0, -1, -2, 100]


def test_the_product_is_rounded_once_and_not_to_float32_before() -> None:
    values = np.array([1 / 3, -2 / 3], np.float32)
    factor = float(1 << 22) - 3
    got = fixed_point.quantise(values, factor, 1.0).view(np.int32)
    assert got.tolist() == [round(float(v) * factor) for v in values]


@pytest.mark.parametrize("value", [0.5, -0.5, 0.0, -0.0, np.float32(1e-45)])
def test_values_up_to_the_bound_are_taken(value: float) -> None:
    assert (
        abs(int(fixed_point.quantise(np.array([value], np.float32), 2.0, 0.5).view("<i4")[0])) <= 1
    )


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("length", "at"), [(1, 0), (3, 1), (2 * BORDER + 3, -1)])
def test_one_value_that_is_none_or_beyond_the_bound_is_refused(
    bad: np.float32, length: int, at: int
) -> None:
    values = np.zeros(length, np.float32)
    values[at] = bad
    refused("E502", lambda: fixed_point.quantise(values, 1.0, 0.5))
    refused("E502", lambda: fixed_point.encode(values, 1.0, 0.5, [(key(1), False)]))


def test_a_bound_that_is_no_number_lets_nothing_pass() -> None:
    refused("E502", lambda: fixed_point.quantise(np.zeros(1, np.float32), 1.0, float("nan")))


# --- sums ------------------------------------------------------------------------------------


@FUZZ
@given(
    st.lists(st.floats(1e-6, 1), min_size=1, max_size=fixed_point.MOST_SITES),
    st.floats(1e-6, 1e6),
    st.data(),
)
def test_a_sum_of_sites_at_the_bound_never_wraps(
    raw: list[float], bound: float, data: st.DataObject
) -> None:
    largest = np.float32(bound)
    if float(largest) > bound:  # float32 rounds either way
        largest = np.nextafter(largest, np.float32(0))
    weights = [w / sum(raw) for w in raw]
    signs = data.draw(st.lists(st.sampled_from((-1, 1)), min_size=len(raw), max_size=len(raw)))
    total, expected = fixed_point.Total(2), 0
    for weight, sign in zip(weights, signs, strict=True):
        factor = fixed_point.factor(bound, weight, len(raw))
        values = np.array([largest, sign * largest], np.float32)
        total.add(fixed_point.encode(values, factor, bound, []))
        expected += round(sign * float(largest) * factor)
    got = total.values(1.0)
    assert got[1] == expected
    assert got[0] <= fixed_point.LARGEST_SUM
    assert got[0] * 1.001 + len(raw) >= fixed_point.LARGEST_SUM - len(raw)  # no bit is given away


def test_the_largest_sums_are_taken_and_one_more_is_refused() -> None:
    total = fixed_point.Total(2)
    total.words[:] = np.array([fixed_point.LARGEST_SUM, -fixed_point.LARGEST_SUM], "<i4").view(
        "<u4"
    )
    assert total.values(2.0).tolist() == [fixed_point.LARGEST_SUM / 2, -fixed_point.LARGEST_SUM / 2]
    for over in (fixed_point.LARGEST_SUM + 1, -fixed_point.LARGEST_SUM - 1, 1 << 23):
        for at in (0, 1):
            total = fixed_point.Total(2)
            total.words[at] = over % (1 << 32)
            refused("E505", lambda held=total: held.values(1.0))


def test_what_a_word_has_above_the_ring_is_not_read() -> None:
    total = fixed_point.Total(3)
    total.words[:] = [5 + (7 << 24), (1 << 24) - 5, (1 << 32) - 6]
    assert total.values(1.0).tolist() == [5, -5, -6]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_mask_that_one_adds_and_another_takes_off_is_gone(length: int) -> None:
    values = np.linspace(-1, 1, length).astype(np.float32)
    total = fixed_point.Total(length)
    total.add(fixed_point.encode(values, 1000.0, 1.0, [(key(1), False), (key(2), False)]))
    total.add(fixed_point.encode(-values, 1000.0, 1.0, [(key(1), True), (key(3), True)]))
    total.add(fixed_point.encode(values, 1000.0, 1.0, []))
    total.mask([(key(2), True), (key(3), False)])
    assert total.values(1.0).tolist() == [round(float(v) * 1000) for v in values]


@pytest.mark.parametrize("minus", [True, False])
def test_a_sum_with_one_mask_left_on_it_is_refused(minus: bool) -> None:
    total = fixed_point.Total(100)
    total.add(fixed_point.encode(np.zeros(100, np.float32), 1.0, 1.0, [(key(1), minus)]))
    refused("E505", lambda: total.values(1.0))


def test_a_left_mask_is_beyond_every_honest_sum_in_half_of_the_entries() -> None:
    total = fixed_point.Total(100_000)
    total.mask([(key(1), False)])
    centred = (total.words << np.uint32(8)).view("<i4") >> 8
    assert 0.49 < np.mean(np.abs(centred) > fixed_point.LARGEST_SUM) < 0.51


@pytest.mark.parametrize("extra", [-30, -3, -1, 1, 3, 12])
def test_only_updates_of_one_length_are_added(extra: int) -> None:
    total = fixed_point.Total(10)
    total.add(fixed_point.encode(np.ones(10, np.float32), 5.0, 1.0, []))
    refused("E502", lambda: total.add(bytes(30 + extra)))
    assert total.values(1.0).tolist() == [5] * 10


def test_a_sum_of_nothing_is_empty() -> None:
    total = fixed_point.Total(0)
    total.add(b"")
    assert total.values(1.0).tolist() == []
    assert total.values(1.0).dtype == np.float32


def test_128_equal_sites_keep_16_bits_each() -> None:
    n = fixed_point.MOST_SITES
    assert 2 * fixed_point.factor(1.0, 1 / n, n) >= (1 << 16) - 2
    # The mean is right to half of a unit a site.
    values = np.random.default_rng(0).uniform(-1, 1, (n, 1000)).astype(np.float32)
    total = fixed_point.Total(1000)
    for each in values:
        total.add(fixed_point.encode(each, fixed_point.factor(1.0, 1 / n, n), 1.0, []))
    mean = total.values(fixed_point.factor(1.0, 1.0, n))
    assert np.abs(mean - values.astype(np.float64).mean(axis=0)).max() <= n / 2**23 + 1e-7


# --- masks -----------------------------------------------------------------------------------


def chacha20(secret: bytes, counter: int, nonce: bytes) -> bytes:
    """One block as RFC 8439 section 2.3 has it."""
    state = [
        0x61707865,
        0x3320646E,
        0x79622D32,
        0x6B206574,
        *struct.unpack("<8I", secret),
        counter,
        *struct.unpack("<3I", nonce),
    ]
    work = list(state)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for into, by, turned, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            work[into] = (work[into] + work[by]) & 0xFFFFFFFF
            x = work[turned] ^ work[into]
            work[turned] = (x << bits | x >> (32 - bits)) & 0xFFFFFFFF

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return struct.pack("<16I", *((w + s) & 0xFFFFFFFF for w, s in zip(work, state, strict=True)))


def test_the_reference_is_that_of_rfc_8439() -> None:
    block = chacha20(bytes(range(32)), 1, bytes.fromhex("000000090000004a00000000"))
    assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4")
    assert chacha20(bytes(32), 0, bytes(12)).hex().startswith("76b8e0ada0f13d90405d6ae55386bd28")


@pytest.mark.parametrize("minus", [True, False])
@pytest.mark.parametrize(
    ("secret", "length"),
    [
        (bytes(32), 100),
        (bytes(range(32)), 37),
        (key(9), BORDER + 40),
    ],
    ids=["zeros", "range", "across-chunks"],
)
def test_a_mask_is_the_chacha20_stream_from_its_beginning(
    secret: bytes, length: int, minus: bool
) -> None:
    stream = b"".join(chacha20(secret, n, bytes(12)) for n in range(-(-length // 16)))
    sign = -1 if minus else 1
    expected = [sign * w % (1 << 24) for (w,) in struct.iter_unpack("<I", stream)][:length]
    sent = fixed_point.encode(np.zeros(length, np.float32), 1.0, 1.0, [(secret, minus)])
    assert (fixed_point._unpack(sent) & fixed_point._LOW).tolist() == expected


def test_no_two_keys_give_one_mask_and_no_part_of_a_mask_comes_again() -> None:
    masks = []
    for n in range(3):
        total = fixed_point.Total(2 * BORDER)
        total.mask([(key(n), False)])
        masks += [total.words[:BORDER], total.words[BORDER:]]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert np.mean(one == other) < 0.001


def test_encoding_takes_less_than_twice_the_updates_memory() -> None:
    values = np.zeros(1_000_000, np.float32)
    masks = [(key(n), bool(n % 2)) for n in range(5)]
    fixed_point.encode(values[:10], 1.0, 1.0, masks)
    tracemalloc.start()
    try:
        fixed_point.encode(values, 1.0, 1.0, masks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * values.nbytes


@pytest.mark.parametrize("bound", [0.1, 0.3, 1e-6, 16.0, 1e6])
def test_values_that_were_clipped_to_the_bound_are_within_it(bound: float) -> None:
    """float32(0.1) is above 0.1; what was held to the bound must not be refused for that."""
    ends = np.clip(np.array([-9e9, 9e9], np.float32), -bound, bound).astype(np.float32)
    for sites in (3, 128):
        factor = fixed_point.factor(bound, 1.0, sites)
        assert (
            np.abs(fixed_point.quantise(ends, factor, bound).view(np.int32)).max()
            <= fixed_point.LARGEST_SUM
        )
    with pytest.raises(ProtocolError):
        fixed_point.quantise(np.nextafter(ends, np.float32(np.inf)), 1.0, bound)
