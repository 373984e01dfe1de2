"""The lists of names that are shipped, and the form in which a name is looked up in them."""

from __future__ import annotations

import tomllib
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_TO_ASCII = str.maketrans(
    {
        "ł": "l",
        "ø": "o",
        "đ": "d",
        "ð": "d",
        "ı": "i",
        "æ": "ae",
        "œ": "oe",
        "ß": "ss",
        "þ": "th",
        "'": None,
    }
)


def folded(word: str) -> str:
    """A name as the lists have it: small ASCII letters, without marks and apostrophes."""
    if word.isascii():
        return word.lower().replace("'", "")
    letters = unicodedata.normalize("NFKD", word.casefold().translate(_TO_ASCII))
    return "".join(c for c in letters if not unicodedata.combining(c))


@dataclass(frozen=True)
class Names:
    """The lists of names.toml and names_faker.toml; English ones folded. `*words_of` are ordinary
    words, too; `rare_*` those of them that are seldom names, and count with a capital letter only.
    """

    given: frozenset[str]
    given_words: frozenset[str]
    family: frozenset[str]
    family_words: frozenset[str]
    other: frozenset[str]
    rare_given: frozenset[str]
    rare_family: frozenset[str]
    en_places: frozenset[str]
    eponyms: frozenset[str]
    zh_family: frozenset[str]
    zh_rare: frozenset[str]
    zh_compound: frozenset[str]
    zh_given: frozenset[str]
    zh_transcription: frozenset[str]
    zh_other: frozenset[str]
    places: tuple[str, ...]

    @classmethod
    def load(cls) -> Names:
        lists, more = _lists("names.toml"), _lists("names_faker.toml")["en"]
        en, zh = lists["en"], lists["zh"]
        return cls(
            given=words_of(en["given"] + more["given"]),
            given_words=words_of(en["given_words"]),
            family=words_of(en["family"] + more["family"]),
            family_words=words_of(en["family_words"]),
            other=words_of(en["other"]),
            rare_given=words_of(more["given_words"]),
            rare_family=words_of(more["family_words"]),
            en_places=words_of(en["places"]),
            eponyms=words_of(en["eponyms"]),
            zh_rare=frozenset("".join(zh["rare"].split())),
            zh_family=frozenset("".join(zh["family"].split())),
            zh_compound=frozenset(zh["compound"].split()),
            zh_given=frozenset("".join(zh["given"].split())),
            zh_transcription=frozenset("".join(zh["transcription"].split())),
            zh_other=frozenset(zh["other"].split()),
            places=tuple(zh["places"].split()),
        )


@cache
def simplified_characters() -> dict[str, str]:
    """Traditional Chinese character → the simplified one that the lists and patterns have."""
    zh = _lists("names.toml")["zh"]
    pairs = ("".join(zh[key].split()) for key in ("traditional", "simplified"))
    return dict(zip(*pairs, strict=True))


def _lists(file: str) -> dict[str, dict[str, str]]:
    text = files("silotune.client.preparation").joinpath(file).read_text(encoding="utf-8")
    return tomllib.loads(text)


def words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())
