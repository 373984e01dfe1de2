"""Tags of any scheme name the same entities, by an independent decoder; scores know one scheme."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, IOE2, Entities

from silotune.common.contract.task import Tokens
from silotune.common.formats import tag_schemes
from silotune.common.formats.tag_schemes import (
    Entity,
    entities_of,
    scheme_of,
    to_iob2,
    written,
)
from silotune.common.tasks import metrics

FUZZ = settings(deadline=None, max_examples=200, derandomize=True, database=None)
# What seqeval calls the schemes. It has none for BMES, whose letters are those of BIOES but for M.
ORACLES = {"IOB2": IOB2, "IOB1": IOB1, "BIOES": IOBES, "BILOU": BILOU, "IOE2": IOE2}
TASK = Tokens(label_column="tags", entities=("Disease", "Drug"))
KINDS = ("Disease", "Drug", "cell-type")


@st.composite
def sentences(draw: Any) -> tuple[list[Entity], int]:
    """Entities that do not overlap, and how many words there are."""
    entities, at = [], 0
    for gap, length, kind in draw(
        st.lists(
            st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from(KINDS)), max_size=5
        )
    ):
        entities.append(Entity(kind, at + gap, at + gap + length))
        at += gap + length
    return entities, at + draw(st.integers(0, 2))


def by_seqeval(tags: list[str], scheme: str) -> list[tuple[Any, ...]]:
    """What an independent decoder of the scheme finds, strictly."""
    return [entity.to_tuple()[1:] for entity in Entities([tags], ORACLES[scheme]).entities[0]]


@FUZZ
@given(sentences(), st.sampled_from(list(tag_schemes.SCHEMES)))
@example(([Entity("Disease", 5, 6), Entity("Drug", 8, 9)], 10), "IOB1")  # tags-without-b.csv
def test_every_scheme_names_the_same_entities(drawn: tuple[list[Entity], int], scheme: str) -> None:
    entities, words = drawn
    tags = written(entities, words, tag_schemes.SCHEMES[scheme])
    assert len(tags) == words
    assert entities_of(tags) == entities
    assert to_iob2(tags) == written(entities, words, tag_schemes.SCHEMES["IOB2"])
    if scheme in ORACLES:
        assert by_seqeval(tags, scheme) == [(e.kind, e.start, e.end) for e in entities]
    assert by_seqeval(to_iob2(tags), "IOB2") == [(e.kind, e.start, e.end) for e in entities]


@FUZZ
@given(sentences(), st.sampled_from(list(tag_schemes.SCHEMES)))
def test_a_scheme_is_recognised_by_its_tags(drawn: tuple[list[Entity], int], scheme: str) -> None:
    entities, words = drawn
    tags = written(entities, words, tag_schemes.SCHEMES[scheme])
    found = scheme_of(tags)
    assert written(entities, words, tag_schemes.SCHEMES[found]) == tags
    if found != scheme:  # the tags are valid in both
        assert list(tag_schemes.SCHEMES).index(found) < list(tag_schemes.SCHEMES).index(scheme)


@FUZZ
@given(st.lists(st.tuples(st.sampled_from("OBIESLUM"), st.sampled_from(KINDS)), max_size=8))
@example([("O", ""), ("I", "Drug"), ("I", "Disease"), ("E", "Disease"), ("E", "Disease")])
def test_any_sequence_becomes_iob2_as_conlleval_reads_it(parts: list[tuple[str, str]]) -> None:
    """A word in an entity stays in one of its kind; B and S begin an entity, E and S end one."""
    tags = ["O" if prefix == "O" else f"{prefix}-{kind}" for prefix, kind in parts]
    found = to_iob2(tags)
    assert scheme_of(found) == "IOB2"
    assert [tag.partition("-")[2] for tag in found] == [tag.partition("-")[2] for tag in tags]
    for (before, _), (after, _), new in zip(
        [("O", ""), *parts], [*parts, ("O", "")], [*found, "O"], strict=True
    ):
        if after in "BSU" or (before in "ESLU" and after != "O"):
            assert new.startswith("B-")
    for old, new in pairwise(found):
        assert not new.startswith("I-") or new[2:] == old[2:]


@pytest.mark.parametrize(
    ("cell", "scheme"),
    [
        ("O B-Drug I-Drug O", "IOB2"),
        ("I-Drug I-Drug O", "IOB1"),
        ("I-Drug B-Drug", "IOB1"),
        ("B-Drug E-Drug", "BIOES"),
        ("S-Drug O", "BIOES"),
        ("U-Drug", "BILOU"),
        ("B-Drug M-Drug E-Drug", "BMES"),
        ("I-Drug E-Drug", "IOE2"),
        ("I-Drug B-Disease", ""),
        ("B-Drug E-Drug I-Drug", ""),
        ("", "IOB2"),
    ],
)
def test_what_is_said_of_a_cell(cell: str, scheme: str) -> None:
    assert scheme_of(cell.split()) == scheme
    said = TASK.read_otherwise(cell)
    assert bool(said) == (scheme != "IOB2")
    assert scheme in said or not said


@pytest.mark.parametrize("tag", ["Drug", "X-Drug", "B-", "B", "b-Drug", "", "-Drug", "BDrug"])
def test_what_is_no_tag(tag: str) -> None:
    with pytest.raises(ValueError, match="is not a tag"):
        entities_of([tag])
    assert TASK.read_otherwise(f"O {tag}x?") == "" or tag == ""


@FUZZ
@given(sentences(), st.sampled_from(list(tag_schemes.SCHEMES)))
def test_a_perfect_model_scores_one_whatever_scheme_the_records_are_in(
    drawn: tuple[list[Entity], int], scheme: str
) -> None:
    """Records in IOB1 gave a perfect model an F1 of 0: the metric knew IOB2 alone."""
    entities, words = drawn
    entities = [e._replace(kind="Drug" if e.kind == "cell-type" else e.kind) for e in entities]
    cell = " ".join(written(entities, words, tag_schemes.SCHEMES[scheme]))
    target = TASK.target(cell)
    found = metrics.score(TASK, [np.eye(TASK.outputs)[target]], [target])
    assert found["f1"] == found["recall"] == (1.0 if entities else 0.0)


def test_an_entity_that_a_model_does_not_begin_is_not_found() -> None:
    truth = [["O", "B-Drug", "I-Drug"]]
    assert tag_schemes.scores(truth, [["O", "I-Drug", "I-Drug"]])["f1"] == 0
    assert tag_schemes.scores(truth, truth) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
