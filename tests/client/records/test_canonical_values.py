"""One value has one form, however it is written; two values have two."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.client.records.canonical_values import canonical, value

# What nobody sees


ALIKE = [
    ("❤\ufe0f", "❤"),
    ("a\u034fb", "ab"),
    ("x\u3164", "x"),
    ("x\uffa0", "x"),
    ("a\u2800", "a"),
    ("a\U000e0101", "a"),
    ("ab\u180b", "ab"),
    ("｀", "`"),
    ("ʻ", "'"),
    ("İ", "i"),
    ("ı", "I"),
    ("ILICA", "ılıca"),
    ("ŉ", "ʼN"),
    ("⁻5", "-5"),
    ("a\u00adb", "ab"),
    ("a_x000D_\nb", "a\r\nb"),
    ("a_x000d_b", "a\rb"),
    ("a_x0002_b", "ab"),
    ("_x005F_x0041_", "_x0041_"),
    ("a_x005F_x000D_b", "a_x000D_b"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_what_looks_alike_is_one_value(one: str, other: str) -> None:
    assert value(one) == value(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("_x0041_", "A"),
        ("x000D", ""),
        ("_x00E9_", "é"),
        ("é", "e"),
        ("ñ", "n"),
        ("5-", "5"),
    ],
)
def test_what_can_be_told_apart_is_two_values(one: str, other: str) -> None:
    assert value(one) != value(other)


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)

unseen = st.text("\u034f\u3164\ufe0f\u200b\u2060\U000e0100\x02\u115f", min_size=1, max_size=3)


@given(plain_text, plain_text, unseen)
def test_invisible_characters_anywhere_change_nothing(left: str, right: str, more: str) -> None:
    assert canonical(left + more + right) == canonical(left + right)
