"""How long texts are in a model's tokens, and what lies behind the place where the model stops.

What it gives are counts of records: for their owner's screen and report alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import PairInput, TableInput
from silotune.common.contract.task import Tokens
from silotune.common.data import featurize
from silotune.common.data.records import Records
from silotune.common.formats import tag_schemes

BLOCK = 4096  # records whose texts are tokenised at once


@dataclass(frozen=True)
class Lengths:
    """tokens: [T], how many texts have t tokens; of none if the model reads no text. limit: how
    many the model reads. entities: of a task of tokens, how many the records have; lost: how many
    of them have a word that is not read; losing: in how many records. exact: by the model's own
    tokenizer; else by words, of each of which a tokenizer makes at least one token."""

    tokens: Sequence[int] = ()
    limit: int = 0
    entities: int = 0
    lost: int = 0
    losing: int = 0
    exact: bool = True

    @property
    def texts(self) -> int:
        return sum(self.tokens)

    @property
    def cut(self) -> int:
        """Texts that are longer than the model reads."""
        return sum(self.tokens[self.limit + 1 :])

    @property
    def all_lost(self) -> bool:
        """Whether there are entities and none of them is read."""
        return 0 < self.entities == self.lost

    @property
    def sentence(self) -> str:
        """What is lost, with the counts."""
        what = "are longer than" if self.exact else "have more words than"
        text = f"{self.cut:,} of {self.texts:,} texts {what} the model's {self.limit} tokens"
        if self.cut:
            text += ": what is beyond is not read"
        if self.lost:
            text += (
                f", with {self.lost:,} of {self.entities:,} entities, in {self.losing:,} "
                f"text{'s' * (self.losing != 1)}. Raise model.max_tokens in the contract, or "
                "split these texts"
            )
        return text


def tokenizer_of(folder: Path | None) -> Tokenizer | None:
    """The tokenizer of a model's folder, without its settings for truncation and padding."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def measure(blocks: Iterable[Records], contract: Contract, tokenizer: Tokenizer | None) -> Lengths:
    """The lengths of all records in `blocks`. Without a tokenizer, words count as tokens. Of a
    language model's chat template nothing is counted."""
    limit = getattr(contract.model, "max_tokens", 0)
    if not limit:
        return Lengths()
    found = _Count(contract, limit, tokenizer)
    for records in blocks:
        for start in range(0, len(records), BLOCK):
            part = slice(start, start + BLOCK)
            found.add(records.inputs[part], records.labels[part])
    lengths = found.lengths
    return Lengths(
        [lengths[n] for n in range(max(lengths) + 1)] if lengths else (),
        limit,
        found.entities,
        found.lost,
        found.losing,
        exact=tokenizer is not None,
    )


class _Count:
    def __init__(self, contract: Contract, limit: int, tokenizer: Tokenizer | None) -> None:
        self.contract, self.limit, self.tokenizer = contract, limit, tokenizer
        self.lengths = Counter[int]()
        self.entities = self.lost = self.losing = 0

    def add(self, inputs: Sequence[Any], labels: Sequence[Any]) -> None:
        task = self.contract.task
        if not isinstance(task, Tokens):
            texts = Counter(text for row in inputs for text in _texts(self.contract, row))
            for n, length in zip(texts.values(), self._lengths(list(texts)), strict=True):
                self.lengths[length] += n
            return
        words = [text.split() for text in inputs]
        for (length, read), tags in zip(self._words_read(words), labels, strict=True):
            self.lengths[length] += 1
            entities = tag_schemes.entities_of([task.tags[tag] for tag in tags])
            behind = sum(entity.end > read for entity in entities)
            self.entities += len(entities)
            self.lost += behind
            self.losing += behind > 0

    def _lengths(self, texts: list[Any]) -> list[int]:
        if self.tokenizer is not None:
            return [len(coded.ids) for coded in self.tokenizer.encode_batch(texts)]
        return [len((text if isinstance(text, str) else " ".join(text)).split()) for text in texts]

    def _words_read(self, texts: list[list[str]]) -> list[tuple[int, int]]:
        """Of each text its tokens, and how many of its words the model reads the first token of."""
        if self.tokenizer is None:
            return [(len(words), min(len(words), self.limit)) for words in texts]
        room = self.limit - self.tokenizer.num_special_tokens_to_add(False)
        found = []
        for words, coded in zip(
            texts, self.tokenizer.encode_batch(texts, is_pretokenized=True), strict=True
        ):
            if len(coded.ids) <= self.limit:
                found.append((len(coded.ids), len(words)))
                continue
            own = [word for word in coded.word_ids if word is not None]
            found.append((len(coded.ids), own[room - 1] + 1))
        return found


def _texts(contract: Contract, row: Any) -> Sequence[Any]:
    """What the model reads of a record, as common/models/encoder.py has it."""
    if isinstance(contract.input, TableInput):
        return [featurize.to_text(contract.input, row)]
    if isinstance(contract.input, PairInput):
        return row if contract.input.by == "bi" else [row]
    return [row]
