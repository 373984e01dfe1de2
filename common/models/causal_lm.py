"""A causal language model that learns to answer: loss on the answer's tokens alone.

Shapes: N records, n in a block, T tokens, K of an answer, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.data.records import Inputs
from silotune.common.models.adapted import Adapted
from silotune.common.models.backbone import Llama
from silotune.common.models.base import Encoded
from silotune.common.models.batching import BUCKET, Block, blocks_of
from silotune.common.tasks.token_classification import IGNORED
from silotune.common.tokenization.prompts import Prompts


class LanguageModel(Adapted):
    """The base's own embeddings give the logits; nothing but the adapter is trained."""

    def __init__(
        self, contract: Contract, folder: Path, performance: Performance | None = None
    ) -> None:
        super().__init__(contract, folder, performance)
        assert isinstance(self.backbone, Llama)  # as `adapted.adapt` makes sure
        # A tuple keeps it out of the parameters: it is the base's.
        self._unembedding = (self.backbone.unembedding(),)
        self.prompts = Prompts(contract, self.backbone.tokenizer)

    @torch.no_grad()
    def encode(self, inputs: Inputs) -> Encoded:
        if not len(inputs):
            raise ValueError("there are no rows to encode")
        rows, marks = [], []
        for pair in inputs:
            ids, asked = self.prompts.tokens(*map(str, pair))
            rows.append(ids)
            # At each place the next token, if it is the answer's. Before an answer to nothing there
            # is no place for its first.
            marks += [IGNORED] * (asked - 1) + ids[max(asked, 1) :] + [IGNORED]
        starts = self._starts(rows)
        kept = self._room(int(starts[-1]))
        for index, hidden, _, _ in self._lower(rows):
            self._keep(kept, hidden, index, starts)
        return Encoded(
            torch.arange(len(rows))[:, None],
            torch.zeros(len(rows), 0),
            kept,
            starts,
            torch.tensor(marks),
        )

    def forward(
        self, encoded: Encoded, index: Tensor, *, adapter: bool, dropout_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of the next token, [len(index), K, V], at the answers' places alone: a vocabulary
        has several layers' worth of products, and most tokens are the prompt's."""
        states = self.features(encoded, index, adapter=adapter)
        rows, places = torch.arange(len(index))[:, None], self._places(encoded, index)
        states = states[rows, places.clamp(min=0)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = nn.functional.linear(states, self._unembedding[0])
        return logits

    def features(self, encoded: Encoded, index: Tensor, *, adapter: bool) -> Tensor:
        """The states behind the last layer, [len(index), T, H]."""
        return self._upper(encoded, encoded.texts[index, 0], self._width(encoded, index))[0]

    def targets(self, encoded: Encoded, labels: Tensor, index: Tensor) -> Tensor:
        assert encoded.marks is not None
        marks = encoded.padded(
            encoded.marks, encoded.texts[index, 0], self._width(encoded, index), IGNORED
        )
        places = self._places(encoded, index)
        return marks.gather(1, places.clamp(min=0)).masked_fill(places < 0, IGNORED)

    def micro_batches(self, encoded: Encoded, index: Tensor, *, adapter: bool) -> Iterator[Block]:
        """Blocks of one bucket, and of one bucket of answers: K must not depend on who else is in
        a block, or roundings would."""
        buckets = -(-self._answers(encoded, index) // BUCKET)
        for bucket in sorted(set(buckets.tolist())):
            part = index[buckets == bucket]
            yield from blocks_of(part, encoded.lengths(part), self.performance.micro_batch)

    def _answers(self, encoded: Encoded, index: Tensor) -> Tensor:
        """[len(index)] tokens of each record's answer, with its end if it is there whole."""
        assert encoded.starts is not None
        assert encoded.marks is not None
        before = nn.functional.pad((encoded.marks != IGNORED).cumsum(0), (1, 0))
        return before[encoded.starts].diff()[encoded.texts[index, 0]]

    def _places(self, encoded: Encoded, index: Tensor) -> Tensor:
        """[len(index), K], the places before each text's last one, at which an answer is told; K is
        a multiple of BUCKET. Below 0 for a shorter text's."""
        most = -(-int(self._answers(encoded, index).max()) // BUCKET) * BUCKET
        return encoded.lengths(index)[:, None] - 1 - most + torch.arange(most)

    @torch.no_grad()
    def answer(self, prompt: str, most: int = 64) -> str:
        """Greedy decoding, token by token, through frozen and adapted layers alike."""
        ids, base = self.prompts.prompt(prompt, self.max_tokens), self.backbone
        start, mask = len(ids), torch.ones(1, 1, dtype=torch.bool, device=self.device)
        for _ in range(most):
            states = base.embed(torch.tensor([ids], device=self.device))
            for layers in (base.layers[: self.first_adapted], self.top):
                if layers is self.top and self.virtual is not None:
                    states = self.virtual.before(states)
                states = self._layers(states, base.around(mask.expand(1, states.shape[1])), layers)
            last = base.last(states)[0, -1]
            ids.append(int((self._unembedding[0] @ last).argmax()))
            if ids[-1] == base.tokenizer.eos_token_id:
                break
        found: str = base.tokenizer.decode(ids[start:], skip_special_tokens=True)
        return found.strip()
