"""Schemes of tags for the words of a sentence, and the one in which records and scores are: IOB2.

IOB2 begins each entity with B-x and goes on with I-x; every other word is O. Sites also have IOB1
(B-x only where an entity follows another of its kind; Ramshaw and Marcus 1995), BIOES and BMES
(E-x ends an entity, S-x is one of a single word), BILOU (L-x and U-x are these) and IOE2 (E-x ends
each entity, I-x are its other words). All of them name the same entities, so all are read, and
rewritten to IOB2 word by word. A function of one sentence's
tags: other records are not used.

Sequences that no scheme allows (I-x at the start of a sentence of IOB2) are read as conlleval reads
them: an entity begins at B-x, S-x, or where the kind changes or the word before ended one; it ends
before the next begins and after E-x and S-x (Tjong Kim Sang and Buchholz 2000).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

OUTSIDE = "O"  # a word that belongs to no entity
# What a prefix says of a word within its entity.
BEGIN, INSIDE, END, SINGLE = "B", "I", "E", "S"
PREFIXES = {
    "B": BEGIN,
    "I": INSIDE,
    "M": INSIDE,
    "E": END,
    "L": END,
    "S": SINGLE,
    "U": SINGLE,
}
IOB2 = "IOB2"


class Entity(NamedTuple):
    """Words start to end - 1 of a sentence, and what kind of entity they are."""

    kind: str
    start: int
    end: int


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities that tags of any scheme name, in their order.

    Raises:
        ValueError: a tag is neither O nor a prefix (B I M E L S U), '-' and a kind.
    """
    parts = [_split(tag) for tag in tags]
    found: list[Entity] = []
    start: int | None = None
    for at, ((before, kind_before), (prefix, kind)) in enumerate(
        pairwise([(OUTSIDE, ""), *parts, (OUTSIDE, "")])
    ):
        begins = (
            prefix in (BEGIN, SINGLE) or before in (OUTSIDE, END, SINGLE) or kind != kind_before
        )
        if start is not None and (prefix == OUTSIDE or begins):
            found.append(Entity(kind_before, start, at))
            start = None
        if prefix != OUTSIDE and start is None:
            start = at
    return found


def _split(tag: str) -> tuple[str, str]:
    """What the tag says of its word, and the kind of the entity."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    if not dash or not kind or prefix not in PREFIXES:
        raise ValueError(f"{tag!r} is not a tag")
    return PREFIXES[prefix], kind


def written(entities: Sequence[Entity], words: int, letters: str) -> list[str]:
    """Tags of a sentence with these entities, none of which overlap.

    letters: of BEGIN, INSIDE, END and SINGLE in a scheme, 'BIIB' for IOB2; with ' ' for BEGIN an
    entity begins with INSIDE's letter unless it follows one of its kind at once, as in IOB1.
    """
    begin, inside, end, single = list(letters)
    tags, before = [OUTSIDE] * words, Entity("", 0, 0)
    for entity in entities:
        kind, start, after = entity
        found = [begin, *[inside] * (after - start - 2), end] if after - start > 1 else [single]
        if begin == " ":
            touches = before.kind == kind and before.end == start and before.end > 0
            found = [BEGIN if touches else inside, *[inside] * (after - start - 1)]
        tags[start:after] = [f"{letter}-{kind}" for letter in found]
        before = entity
    return tags


SCHEMES = {
    IOB2: "BIIB",
    "IOB1": " II ",
    "BIOES": "BIES",
    "BILOU": "BILU",
    "BMES": "BMES",
    "IOE2": "IIEE",
}
# The message about tags that are read as if they were IOB2, by the scheme in which they are valid.
READ_OTHERWISE = {
    **{name: f"is in {name}: read as IOB2" for name in SCHEMES if name != IOB2},
    "": "has tags in an order that no scheme allows: read as IOB2, as conlleval does",
}


def to_iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2, a tag for each word. ValueError as `entities_of`."""
    return written(entities_of(tags), len(tags), SCHEMES[IOB2])


def scheme_of(tags: Sequence[str]) -> str:
    """The scheme in which these tags are valid, IOB2 before others; '' if in none. ValueError as
    `entities_of`."""
    found = entities_of(tags)
    return next(
        (
            name
            for name, letters in SCHEMES.items()
            if written(found, len(tags), letters) == list(tags)
        ),
        "",
    )


def counts(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> list[tuple[int, int, int]]:
    """Of each of N sentences how many entities it has, how many are predicted, and how many of
    these are right: what `scores` divides, by sentence."""
    from seqeval.scheme import IOB2 as STRICT
    from seqeval.scheme import Entities

    there, told = (Entities(list(map(list, tags)), STRICT).entities for tags in (truth, predicted))
    return [(len(a), len(b), len(set(a) & set(b))) for a, b in zip(there, told, strict=True)]


def scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall and F1 over the entities of N sentences, strict: found means with its kind
    and both ends. Both are judged as IOB2, so that an entity which a model does not begin with B-x
    is not found. 0 where there is nothing to divide by."""
    from seqeval import metrics
    from seqeval.scheme import IOB2 as STRICT

    how = {"mode": "strict", "scheme": STRICT, "zero_division": 0}
    truth, predicted = [list(t) for t in truth], [list(p) for p in predicted]
    return {
        "precision": float(metrics.precision_score(truth, predicted, **how)),
        "recall": float(metrics.recall_score(truth, predicted, **how)),
        "f1": float(metrics.f1_score(truth, predicted, **how)),
    }
