"""Any t shares give the secret, and t - 1 are consistent with every other secret alike."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.secagg import shamir

FUZZ = settings(deadline=None, max_examples=80, derandomize=True, database=None)
SECRETS = st.integers(0, shamir.PRIME - 1)
SMALL = 7  # a field that can be gone through


def is_prime(n: int) -> bool:
    """Fermat, to a few bases."""
    return all(pow(base, n - 1, n) == 1 for base in (2, 3, 5, 7, 11))


def test_the_field_is_that_of_curve25519_and_fits_its_bytes() -> None:
    assert is_prime(shamir.PRIME)
    assert shamir.PRIME.bit_length() == 255 < 8 * shamir.SIZE


@FUZZ
@given(SECRETS, st.integers(1, 9), st.integers(0, 4), st.randoms(use_true_random=False))
def test_any_shares_as_many_as_the_threshold_give_the_secret(
    secret: int, threshold: int, more: int, random: object
) -> None:
    places = list(range(1, threshold + more + 1))
    random.shuffle(places)  # type: ignore[attr-defined]
    shares = dict(zip(places, shamir.split(secret, threshold, places), strict=True))
    for chosen in itertools.islice(itertools.combinations(places, threshold), 20):
        assert shamir.join({x: shares[x] for x in chosen}) == secret
    assert shamir.join(shares) == secret  # more than enough do no harm


@FUZZ
@given(SECRETS, st.integers(2, 7))
def test_one_share_fewer_gives_another_number(secret: int, threshold: int) -> None:
    shares = dict(enumerate(shamir.split(secret, threshold, range(1, threshold + 1)), start=1))
    shares.popitem()
    assert shamir.join(shares) != secret


@FUZZ
@given(SECRETS, SECRETS, st.integers(2, 7))
def test_for_any_shares_below_the_threshold_and_any_secret_there_is_a_polynomial(
    secret: int, claimed: int, threshold: int
) -> None:
    shares = shamir.split(secret, threshold, range(1, threshold + 1))
    # Through t - 1 shares and the claimed value at 0 goes exactly one polynomial of the degree.
    points = {0: claimed, **dict(enumerate(shares[:-1], start=1))}
    missing = evaluate(points, threshold)
    forged = dict(enumerate([*shares[:-1], missing], start=1))
    assert shamir.join(forged) == claimed


def evaluate(points: dict[int, int], x: int, prime: int = shamir.PRIME) -> int:
    """Lagrange, in the textbook's form."""
    value = 0
    for at, y in points.items():
        term = y
        for other in points:
            if other != at:
                term = term * (x - other) * pow(at - other, -1, prime) % prime
        value += term
    return value % prime


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The field of SMALL elements; the list gives the coefficients that are drawn next."""
    drawn: list[int] = []
    monkeypatch.setattr(shamir, "PRIME", SMALL)
    monkeypatch.setattr(shamir, "draw", lambda: drawn.pop(0))
    return iter([drawn])


@pytest.mark.parametrize(("threshold", "seen"), [(2, (1,)), (3, (1, 2)), (3, (2, 5)), (3, (4,))])
def test_too_few_shares_are_spread_alike_for_every_secret(
    small: Iterator[list[int]], threshold: int, seen: tuple[int, ...]
) -> None:
    """Over all coefficients there are: not only possible, but equally likely."""
    drawn, places = next(small), list(range(1, SMALL))
    spreads = []
    for secret in range(SMALL):
        spread: Counter[tuple[int, ...]] = Counter()
        for coefficients in itertools.product(range(SMALL), repeat=threshold - 1):
            drawn[:] = coefficients
            shares = shamir.split(secret, threshold, places)
            spread[tuple(shares[x - 1] for x in seen)] += 1
        spreads.append(spread)
    assert all(spread == spreads[0] for spread in spreads)
    assert len(spreads[0]) == SMALL ** len(seen)


def test_as_many_as_the_threshold_are_spread_differently(small: Iterator[list[int]]) -> None:
    drawn, found = next(small), []
    for secret in (0, 1):
        spread = set()
        for coefficient in range(SMALL):
            drawn[:] = [coefficient]
            spread.add(tuple(shamir.split(secret, 2, [1, 2])))
        found.append(spread)
    assert not found[0] & found[1]


def test_each_sharing_draws_its_coefficients_anew() -> None:
    first, second = (shamir.split(5, 3, [1, 2, 3]) for _ in range(2))
    assert not set(first) & set(second)


def test_secrets_are_uniform_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda n: asked.append(n) or n - 1)
    assert shamir.draw() == shamir.PRIME - 1
    assert asked == [shamir.PRIME]
    monkeypatch.undo()
    assert len({shamir.draw() for _ in range(100)}) == 100


def test_a_threshold_of_one_gives_the_secret_to_each() -> None:
    assert shamir.split(7, 1, [1, 2, 3]) == [7, 7, 7]


@pytest.mark.parametrize(
    ("threshold", "places"),
    [
        (0, [1, 2]),
        (-1, [1, 2]),
        (3, [1, 2]),
        (1, []),
        (2, [1, 1]),
        (2, [0, 1]),
        (2, [-1, 1]),
    ],
)
def test_a_sharing_that_would_give_the_secret_away_or_lose_it_is_refused(
    threshold: int, places: list[int]
) -> None:
    with pytest.raises(ValueError, match="threshold"):
        shamir.split(5, threshold, places)


@FUZZ
@given(SECRETS)
def test_elements_travel_in_32_bytes(element: int) -> None:
    data = shamir.to_bytes(element)
    assert len(data) == shamir.SIZE
    assert shamir.from_bytes(data) == element
    assert data == bytes(element >> 8 * i & 255 for i in range(32))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(31),
        bytes(33),
        shamir.PRIME.to_bytes(32, "little"),
        b"\xff" * 32,
    ],
)
def test_other_bytes_are_no_element(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an element"):
        shamir.from_bytes(data)


@FUZZ
@given(st.sets(st.integers(1, 200), min_size=1, max_size=8))
def test_the_weights_of_a_constant_add_up_to_one(places: set[int]) -> None:
    assert sum(shamir.weights(sorted(places))) % shamir.PRIME == 1
