"""The lists of names that are shipped, and the form in which a name is looked up."""

from __future__ import annotations

from silotune.client.preparation.name_lists import Names, folded

NAMES = Names.load()


def test_names_are_compared_without_marks() -> None:
    pairs = {
        "Łukasz": "lukasz",
        "O'Brien": "obrien",
        "Şükrü": "sukru",
        "Sørensen": "sorensen",
        "Nguyễn": "nguyen",
        "Jose\u0301": "jose",
        "Đorđević": "dordevic",
        "Weiß": "weiss",
    }
    assert {name: folded(name) for name in pairs} == pairs


def test_the_lists_are_folded_and_disjoint() -> None:
    for one in (NAMES.given, NAMES.given_words, NAMES.family, NAMES.family_words, NAMES.other):
        assert {folded(name) for name in one} == one
    assert not NAMES.given & NAMES.given_words
    assert not NAMES.family & NAMES.family_words
