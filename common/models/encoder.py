"""A base model with a head: pooled texts, publicly whitened, or each word by itself.

Shapes: N records, U texts, n in a block, T tokens, H hidden size, F features (H here), L outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import PairInput, TableInput
from silotune.common.contract.model import EncoderModel, Standardise
from silotune.common.data import featurize
from silotune.common.data.records import Inputs
from silotune.common.models.adapted import Adapted
from silotune.common.models.aligned_linear import pad_for_alignment
from silotune.common.models.base import Encoded
from silotune.common.tasks.token_classification import IGNORED

NO_WORD = -1


class Encoder(Adapted):
    """Features are a text's mean token, standardised by public texts; a pair read apart has the
    product of its two texts' features, entry by entry; for a task of tokens each token has its own.
    """

    mean: Tensor
    whitener: Tensor

    def __init__(
        self, contract: Contract, folder: Path, performance: Performance | None = None
    ) -> None:
        super().__init__(contract, folder, performance)
        assert isinstance(contract.model, EncoderModel)
        self.spec = contract.model
        self.table = contract.input if isinstance(contract.input, TableInput) else None
        self.pair = contract.input.by if isinstance(contract.input, PairInput) else None
        size = self.backbone.size
        self.register_buffer("mean", torch.zeros(size, device=self.device))
        self.register_buffer("whitener", torch.eye(size, device=self.device))
        if self.spec.standardise:
            mean, whitener = self._public_statistics(self.spec.standardise)
            self.mean.copy_(mean)
            self.whitener.copy_(whitener)

    @torch.no_grad()
    def encode(self, inputs: Inputs) -> Encoded:
        if not len(inputs):
            raise ValueError("there are no rows to encode")
        found: dict[Any, int] = {}
        records = [
            [found.setdefault(text, len(found)) for text in self._texts(row)] for row in inputs
        ]
        rows, marks = self._tokens(list(found))
        starts, of_tokens = self._starts(rows), self.objective.of_tokens
        features = torch.zeros(int(starts[-1]) if of_tokens else len(rows), self.backbone.size)
        kept = self._room(int(starts[-1])) if self.adapter else None
        upper = self.backbone.layers[self.first_adapted :]
        for index, hidden, around, mask in self._lower(rows):
            states = self.backbone.last(self._layers(hidden, around, upper))
            if of_tokens:
                self._keep(features, self._standard(states), index, starts)
            else:
                features[index] = self._pooled(states, mask)[: len(index)].cpu()
            if kept is not None:
                self._keep(kept, hidden, index, starts)
        return Encoded(torch.tensor(records), features, kept, starts, marks)

    def features(self, encoded: Encoded, index: Tensor, *, adapter: bool) -> Tensor:
        texts = encoded.texts[index]
        if self.objective.of_tokens:
            width = self._width(encoded, index)
            if not adapter:
                return encoded.padded(encoded.features, texts[:, 0], width)
            return self._standard(self._upper(encoded, texts[:, 0], width)[0])
        if adapter:
            width = self._width(encoded, index)
            sides = [self._pooled(*self._upper(encoded, t, width)) for t in texts.unbind(1)]
        else:
            sides = [encoded.features[t] for t in texts.unbind(1)]
        return sides[0] if len(sides) == 1 else sides[0] * sides[1]

    def initial_arrays(self) -> dict[str, np.ndarray]:
        """Zeros; of a pair read apart the head begins as the dot product of the two sides."""
        arrays = super().initial_arrays()
        if self.pair == "bi" and len(arrays["head.weight"]) == 1:
            arrays["head.weight"] += np.float32(1 / np.sqrt(self.backbone.size))
        return arrays

    def targets(self, encoded: Encoded, labels: Tensor, index: Tensor) -> Tensor:
        if not self.objective.of_tokens:
            return labels[index]
        assert encoded.marks is not None
        words = encoded.padded(
            encoded.marks, encoded.texts[index, 0], self._width(encoded, index), NO_WORD
        )
        own = labels[index].gather(1, words.clamp(min=0))
        return own.masked_fill(words == NO_WORD, IGNORED)

    def _texts(self, row: Any) -> list[Any]:
        """What is encoded of a record: its text, its pair of texts, or both by themselves."""
        if isinstance(row, str):
            return [row]
        if self.table is not None:
            return [featurize.to_text(self.table, row)]
        first, second = row
        return [first, second] if self.pair == "bi" else [(first, second)]

    def _tokens(self, texts: list[Any]) -> tuple[list[list[int]], Tensor | None]:
        """Token numbers of each text, and for a task of tokens [sum of T] the word that each token
        is the first of, else NO_WORD. A text of which the tokenizer makes nothing has one token
        that fills: there is no reading nothing."""
        tokenizer, marks = self.backbone.tokenizer, None
        more: dict[str, Any] = {"truncation": True, "max_length": self.max_tokens}
        if self.objective.of_tokens:
            found = tokenizer(self._words(texts), is_split_into_words=True, **more)
            firsts = [_firsts(found.word_ids(i)) or [NO_WORD] for i in range(len(texts))]
            marks = torch.tensor([first for own in firsts for first in own])
        elif self.pair == "cross" and not isinstance(texts[0], str):
            first, second = zip(*texts, strict=True)
            found = tokenizer(list(first), list(second), **more)
        else:
            found = tokenizer(texts, **more)
        return [row or [tokenizer.pad_token_id] for row in found["input_ids"]], marks

    def _words(self, texts: list[str]) -> list[list[str]]:
        """The words of each text. One of which the tokenizer makes nothing, an invisible character,
        is an unknown one: else the tags of those behind it would move up."""
        tokenizer, words = self.backbone.tokenizer, [text.split() for text in texts]
        distinct = list({word: None for own in words for word in own})
        if not distinct:
            return words
        pieces = tokenizer(distinct, add_special_tokens=False)["input_ids"]
        empty = {word for word, own in zip(distinct, pieces, strict=True) if not own}
        unknown = tokenizer.unk_token or "?"
        return [[unknown if word in empty else word for word in own] for own in words]

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The mean of the tokens' states [n, T, H], standardised: [n, H]; mask [n, T]."""
        weights = mask.to(hidden.dtype)[:, :, None]
        return self._standard((hidden * weights).sum(1) / weights.sum(1).clamp(min=1))

    def _standard(self, states: Tensor) -> Tensor:
        """[n, ..., H], as the head takes them."""
        if self.spec.normalise:
            states = nn.functional.normalize(states, dim=-1)
        return nn.functional.linear(*pad_for_alignment(states - self.mean, self.whitener.T))

    def _public_statistics(self, spec: Standardise) -> tuple[Tensor, Tensor]:
        """Mean [F] and whitener W [F, F] = S^(-1/2) of public text, S shrunk to its mean variance.

        S = (1 - s) cov + s tr(cov)/F I (Ledoit and Wolf's target). W is scaled so that the public
        texts' feature vectors have the root mean square norm `spec.norm`.
        """
        inputs: Any = (
            featurize.synthetic(self.table, spec.records, spec.seed)
            if self.table
            else spec.sentences
        )
        adapter, self.adapter = self.adapter, None  # only features are needed here
        try:
            encoded = self.encode(inputs)
            x = encoded.features.double()
            if not self.objective.of_tokens:  # each text as often as it stands there
                x = x[encoded.texts[:, 0]]
        finally:
            self.adapter = adapter
        mean, size = x.mean(0), x.shape[1]
        centred = x - mean
        if spec.whiten:
            cov = centred.T @ centred / max(len(x) - 1, 1)
            target = cov.trace() / size
            values, vectors = torch.linalg.eigh(
                (1 - spec.shrinkage) * cov + spec.shrinkage * target * torch.eye(size)
            )
            whitener = vectors @ torch.diag(values.clamp(min=1e-12).rsqrt()) @ vectors.T
        else:
            whitener = torch.eye(size, dtype=torch.float64)
        rms = (centred @ whitener).square().sum(1).mean().sqrt().clamp(min=1e-12)
        return mean.float(), (whitener * (spec.norm / rms)).float()


def _firsts(words: Sequence[int | None]) -> list[int]:
    """The word each token is the first of, NO_WORD for its later pieces and special tokens."""
    return [
        NO_WORD if word is None or word == before else word
        for before, word in zip([None, *words], words, strict=False)
    ]
