"""What the plain baseline is given of each row: numbers that no neural network makes.

Shapes: n rows, F features. Training rows say which features there are; test rows get the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.common.contract.inputs import NumberColumn, TableInput
from silotune.common.data import featurize, records

# Of languages that put no space between words.
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff]")
AFFIXES = (1, 2, 3)  # characters of a word's prefixes and suffixes
REACH = 2  # words to each side of one


def of_texts(train: Sequence[str], test: Sequence[str]) -> tuple[Any, Any]:
    """TF-IDF [n, F] of words; of one and two characters where most are of a language without
    spaces."""
    vectorizer = _fitted(train)
    return vectorizer.transform(train), vectorizer.transform(test)


def of_pairs(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> tuple[Any, Any]:
    """Of two texts [n, 3 F + 1]: the TF-IDF of each, their product entry by entry, and its sum,
    which is their cosine."""
    from scipy import sparse

    vectorizer = _fitted([text for pair in train for text in pair])

    def matrix(pairs: Sequence[tuple[str, str]]) -> Any:
        first, second = (vectorizer.transform([p[side] for p in pairs]) for side in (0, 1))
        product = first.multiply(second)
        return sparse.hstack([first, second, product, product.sum(axis=1)], format="csr")

    return matrix(train), matrix(test)


def of_table(file: Path, spec: TableInput) -> NDArray[np.float64]:
    """[n, F]: each number as it stands, NaN where it is missing; a column for each value of a
    category."""
    table = records.table(file)
    found = []
    for column in spec.columns:
        at = table.header.index(column.name)
        cells = [row[at] for _, row in table.rows]
        if isinstance(column, NumberColumn):
            numbers = [featurize.number_in(column, cell) for cell in cells]
            found.append(np.array(numbers)[:, None])
            continue
        choices = [featurize.choice_of(column, cell) for cell in cells]
        places = np.array([-1 if choice is None else choice for choice in choices])
        found.append(places[:, None] == np.arange(len(column.choices)))
    return np.hstack(found).astype(np.float64)


def of_words(text: str) -> Iterator[dict[str, float]]:
    """Features of each word by their names: the word, its beginnings, endings and shape (Xx0), and
    the words around it."""
    words = text.split()
    lower = [word.lower() for word in words]
    for at, word in enumerate(words):
        named = {f"shape {_shape(word)}", "initial" if at == 0 else "inner"}
        for size in AFFIXES:
            named |= {f"begins {lower[at][:size]}", f"ends {lower[at][-size:]}"}
        for away in range(-REACH, REACH + 1):
            if 0 <= at + away < len(words):
                named.add(f"{away} {lower[at + away]}")
        yield dict.fromkeys(named, 1.0)


def _shape(word: str) -> str:
    """Capitals as X, small letters as x, digits as 0, each once where several follow."""
    kinds = (
        "0" if c.isdigit() else "X" if c.isupper() else "x" if c.isalpha() else c for c in word
    )
    return re.sub(r"(.)\1+", r"\1", "".join(kinds))


def _fitted(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    letters = sum(map(len, texts))
    unspaced = sum(len(UNSPACED.findall(text)) for text in texts)
    if 2 * unspaced > letters:
        return TfidfVectorizer(analyzer="char", ngram_range=(1, 2)).fit(texts)
    return TfidfVectorizer().fit(texts)
