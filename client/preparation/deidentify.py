"""Personal details out of free text, before it becomes training data.

**This does not make a release private; differential privacy does.** It limits what stands in the
prepared file and what somebody who may see that file can read there. It finds what has a known
form, check digits, a title or a listed name (client/preparation/recognisers.py), and what a model
of the site's own finds, if there is one (client/preparation/entity_model.py). Its recall is not 1,
and what it misses stays
in the text: `make bench-deidentify` measures it on made-up texts, which are kinder than real ones.
Never weaken a privacy plan because a text was cleaned.

Not looked for: names of organisations and places by themselves, times of day without a date, ages,
professions, and descriptions that point to one person ("the mayor of the village").
Names that no list has are found by a title, a label or a sign beside them only.

What was found is

redact        replaced by its kind: <PERSON>
mask          replaced, letter by letter and digit by digit, by *: its length still shows
pseudonymise  replaced by a token that a key of the site makes of it: PERSON_kdimaejfoc. Equal
              values get equal tokens, at this site only, so records stay linkable, frequent
              values stay recognisable by how often they occur, and whoever has the key can try
              names until a token fits. Of 100,000 values two share a token with chance 0.5%.
block         reason to leave the whole record out

Nothing here writes a value, or where it stood, to a log, an error or a repr.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from silotune.client.preparation.name_lists import simplified_characters
from silotune.client.site.preparation_rules import KINDS, Deidentify, Kind
from silotune.common.errors import DataError, ErrorCode, UsageError

# Between findings of equal score and length the earlier of these names them.
_RANK = {kind: rank for rank, kind in enumerate(("resident_id", "iban", "card", "ssn", *KINDS))}
_TOKEN = re.compile(
    "|".join(rf"<{kind.upper()}>|\b{kind.upper()}_[a-p]{{10}}\b" for kind in KINDS), re.ASCII
)
_HYPHENS = dict.fromkeys(map(ord, "‐‑‒–—―−﹣"), "-")
_QUOTES = dict.fromkeys(map(ord, "‘’‛ʼ"), "'")


@dataclass(frozen=True)
class Cleaned:
    """A text without what was found. A blocked one is empty. counts: findings by kind."""

    text: str = field(repr=False)
    counts: dict[Kind, int]
    blocked: bool = False


@dataclass(frozen=True)
class CleanedColumn:
    """The texts of a column in their order, "" for the blocked ones; which those are, from 0; and
    the findings of all texts by kind, blocked ones included. Counts of records are private too:
    they are for the owner's report."""

    texts: list[str] = field(repr=False)
    counts: dict[Kind, int]
    blocked: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """Characters `start` to `end` of a text are a `kind`."""

    start: int
    end: int
    kind: Kind
    score: float
    blocks: bool = False


class Deidentifier:
    """Finds and replaces by one setting. `key`: of the site, for pseudonyms alone (Keys.derive);
    at least 16 bytes. DataError if Presidio is not installed."""

    def __init__(self, settings: Deidentify, key: bytes) -> None:
        if len(key) < 16:
            raise ValueError("a key for pseudonyms has at least 16 bytes")
        self.settings = settings
        self._key = key
        self._analyse = _engine(settings)

    def __repr__(self) -> str:
        return f"Deidentifier({self.settings!r})"

    def clean(self, text: str) -> Cleaned:
        """`text` without what is found in it. DataError, which names no value, if that fails."""
        findings = self.find(text)
        counts = dict(Counter(found.kind for found in findings))
        if any(found.blocks for found in findings):
            return Cleaned("", counts, True)
        parts, last = [], 0
        for found in findings:
            parts += [text[last : found.start], self._replaced(found, text)]
            last = found.end
        return Cleaned("".join([*parts, text[last:]]), counts)

    def clean_many(self, texts: Iterable[str]) -> CleanedColumn:
        """A column's texts, each cleaned by itself."""
        done: list[str] = []
        counts: Counter[Kind] = Counter()
        blocked: list[int] = []
        for row, text in enumerate(texts):
            cleaned = self.clean(text)
            counts.update(cleaned.counts)
            done.append(cleaned.text)
            if cleaned.blocked:
                blocked.append(row)
        return CleanedColumn(done, dict(counts), tuple(blocked))

    def find(self, text: str) -> list[Finding]:
        """What is found, from left to right, without overlaps."""
        plain, places = simplified(text)
        # What an earlier cleaning left is no detail: hidden, character for character.
        plain = _TOKEN.sub(lambda token: "\ue000" * len(token[0]), plain)
        try:
            results = self._analyse(plain)
        except Exception as error:
            # Its message may hold the text. Only its type goes on, not even as a cause.
            failed = type(error).__name__
        else:
            return merged(
                [
                    Finding(
                        places[r.start],
                        places[r.end - 1] + 1,
                        r.entity_type,
                        r.score,
                        self.settings.action_for(r.entity_type) == "block",
                    )
                    for r in results
                    if r.end > r.start
                ]
            )
        raise DataError(f"A text could not be searched for personal details ({failed}).")

    def _replaced(self, found: Finding, text: str) -> str:
        value = text[found.start : found.end]
        match self.settings.action_for(found.kind):
            case "mask":
                return "".join("*" if c.isalnum() else c for c in value)
            case "pseudonymise":
                return self._pseudonym(found.kind, value)
            case _:
                return f"<{found.kind.upper()}>"

    def _pseudonym(self, kind: Kind, value: str) -> str:
        """HMAC-SHA256 of kind and value, 40 bits of it as letters: a digit would look like one."""
        plain, _ = simplified(value)
        same = "".join(c for c in plain.casefold() if c.isalnum())  # +1 (212) … is 1-212-…
        digest = hmac.new(self._key, f"{kind}\0{same}".encode(), hashlib.sha256).hexdigest()
        letters = digest[:10].translate(str.maketrans("0123456789abcdef", "abcdefghijklmnop"))
        return f"{kind.upper()}_{letters}"


def simplified(text: str) -> tuple[str, list[int] | range]:
    """`text` as the recognisers expect it, and the place in `text` of each of its characters.

    Full-width and other digits and letters, hyphens and spaces become ASCII's; traditional Chinese
    characters that a pattern or a list uses become simplified; what has no width and could split a
    number is gone.
    """
    if text.isascii():
        return text, range(len(text))
    # Zero-width space, soft hyphen and the like: category Cf.
    places = [at for at, char in enumerate(text) if unicodedata.category(char) != "Cf"]
    return "".join(map(_simple, (text[at] for at in places))), places


def _simple(char: str) -> str:
    """The one ASCII or simplified Chinese character that stands for the same, or `char`."""
    if char.isascii():
        return char
    if "！" <= char <= "～" and (char.isalnum() or char in "＠．－＋：＃／＿"):
        return chr(ord(char) - 0xFEE0)
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Zs":
        return " "
    plain = _HYPHENS.get(ord(char)) or _QUOTES.get(ord(char))
    return plain or simplified_characters().get(char, char)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Overlapping findings as one over all their characters, so that none leaves a piece: of the
    kind with the highest score, then the longest. It blocks if one of them does."""
    done: list[list[Finding]] = []
    end = -1
    for found in sorted(findings, key=lambda f: (f.start, -f.end)):
        if done and found.start < end:
            done[-1].append(found)
        else:
            done.append([found])
        end = max(end, found.end)
    out = []
    for group in done:
        best = max(group, key=lambda f: (round(f.score, 6), f.end - f.start, -_RANK[f.kind]))
        out.append(
            Finding(
                group[0].start,
                max(f.end for f in group),
                best.kind,
                best.score,
                any(f.blocks for f in group),
            )
        )
    return out


def _engine(settings: Deidentify) -> Any:
    """Presidio's engine with our recognisers and the site's model, if it has one: a function from a
    text to its results.

    It reads nothing from a disk or the network after this.
    """
    if find_spec("presidio_analyzer") is None:
        raise UsageError(
            "[prepare.deidentify] needs Presidio, which is not installed: `pip install "
            "presidio-analyzer`, or install Silotune with its extra 'deidentify'.",
            code=ErrorCode.CONFIG_INVALID,
        )
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import NoOpNlpEngine

    from silotune.client.preparation.name_lists import Names
    from silotune.client.preparation.recognisers import LANGUAGE, recognisers

    # It logs the texts that it stumbles over.
    logging.getLogger("presidio-analyzer").setLevel(logging.CRITICAL + 1)
    logging.getLogger("decision_process").setLevel(logging.CRITICAL + 1)
    found = recognisers(settings.language, frozenset(settings.kinds), Names.load())
    if settings.model is not None:
        from silotune.client.preparation.entity_model import EntityModel

        found.append(EntityModel(settings.model, settings.kinds, settings.least_score))
    if not found:
        raise UsageError(
            f"[prepare.deidentify] kinds {', '.join(settings.kinds)} are not of language "
            f"'{settings.language}': nothing would be looked for.",
            code=ErrorCode.CONFIG_INVALID,
        )
    engine = AnalyzerEngine(
        registry=RecognizerRegistry(found, supported_languages=[LANGUAGE]),
        nlp_engine=NoOpNlpEngine([{"lang_code": LANGUAGE, "model_name": "none"}]),
        supported_languages=[LANGUAGE],
    )

    def analyse(text: str) -> Any:
        return engine.analyze(text, LANGUAGE, score_threshold=settings.least_score)

    return analyse
