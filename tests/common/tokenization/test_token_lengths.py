"""What the model does not read is counted as the model's own tokenizer cuts it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from silotune.common.contract.contract import Contract, parse
from silotune.common.data.records import Records
from silotune.common.tokenization.token_lengths import Lengths, measure, tokenizer_of
from tests.common.data.test_text_decoding import TOKENS

FUZZ = settings(deadline=None, max_examples=100, derandomize=True, database=None)
LIMIT = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Of the words a to j one token each, of 'aa', 'bb' … two; one at each end of a text."""
    letters = "abcdefghij"
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}
    for letter in letters:
        vocabulary |= {letter: len(vocabulary), f"##{letter}": len(vocabulary) + 1}
    found = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return found


@pytest.fixture(scope="module")
def contract() -> Contract:
    return parse(TOKENS, "tokens.toml")  # 8 tokens


@st.composite
def sentence(draw: st.DrawFn) -> tuple[str, list[int]]:
    words = draw(st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), max_size=12))
    return " ".join(words), draw(
        st.lists(st.sampled_from([0, 1, 2, 3, 4]), min_size=len(words), max_size=len(words))
    )


@FUZZ
@given(st.lists(sentence(), min_size=1, max_size=6))
def test_an_entity_is_lost_where_the_truncated_text_has_not_all_its_words(
    tokenizer: Tokenizer, contract: Contract, rows: list[tuple[str, list[int]]]
) -> None:
    """Against the tokenizer's own truncation, which is the model's."""
    from silotune.common.formats.tag_schemes import entities_of

    texts, labels = [text for text, _ in rows], [tags for _, tags in rows]
    found = measure([Records(texts, labels)], contract, tokenizer)
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(LIMIT)
    lost = losing = cut = 0
    for text, tags in rows:
        words = text.split()
        read = {w for w in cutting.encode(words, is_pretokenized=True).word_ids if w is not None}
        entities = entities_of([contract.task.tags[tag] for tag in tags])  # type: ignore[union-attr]
        own = sum(not set(range(e.start, e.end)) <= read for e in entities)
        lost, losing = lost + own, losing + bool(own)
        cut += len(tokenizer.encode(words, is_pretokenized=True).ids) > LIMIT
    assert (found.lost, found.losing, found.cut, found.texts) == (lost, losing, cut, len(rows))


def test_without_a_tokenizer_words_are_counted(contract: Contract) -> None:
    rows = Records(["a " * 9, "a " * 8], [[0] * 8 + [1], [1] + [0] * 7])
    found = measure([rows], contract, None)
    assert (found.cut, found.lost, found.losing, found.entities) == (1, 1, 1, 2)
    assert found.sentence == (
        "1 of 2 texts have more words than the model's 8 tokens: what is beyond is not read, with "
        "1 of 2 entities, in 1 text. Raise model.max_tokens in the contract, or split these texts"
    )


def test_a_model_without_texts_cuts_none(table_contract: Contract) -> None:
    assert measure([], table_contract, None) == Lengths()


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path) is None
    assert tokenizer_of(None) is None
