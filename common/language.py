"""A causal language model that learns to answer: loss on the answer's tokens alone.

Shapes: N records, n in a block, T tokens, K of an answer, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from silotune.common.adapted import Adapted
from silotune.common.backbone import Llama
from silotune.common.contract import Contract
from silotune.common.errors import DataError
from silotune.common.network import BUCKET, Block, Encoded, blocks_of
from silotune.common.performance import Performance
from silotune.common.records import Inputs
from silotune.common.task import Language
from silotune.common.tasks.tokens import IGNORED

ANSWER_SHARE = 2  # an answer takes at most this part of the room, so that some prompt is left


class LanguageModel(Adapted):
    """The base's own embeddings give the logits; nothing but the adapter is trained."""

    def __init__(
        self, contract: Contract, folder: Path, performance: Performance | None = None
    ) -> None:
        super().__init__(contract, folder, performance)
        if not isinstance(self.backbone, Llama):
            raise DataError(
                f"The model in {folder} reads both ways; a task of language needs one that writes "
                "from left to right (llama, mistral, qwen2).", code="E310",
            )
        assert isinstance(contract.task, Language)
        self.system = contract.task.system
        # A tuple keeps it out of the parameters: it is the base's.
        self._unembedding = (self.backbone.unembedding(),)
        self._check_tokenizer(folder)
        self._system_role = self._has_system_role()
        frame, room = len(self.prompt("")), self.max_tokens - self.max_tokens // ANSWER_SHARE
        if frame >= room:
            raise DataError(
                f"task.system and the chat template of the model take {frame} tokens, and of "
                f"model.max_tokens = {self.max_tokens} a prompt has {room} beside a long answer. "
                "Raise model.max_tokens, or shorten task.system.", code="E310",
            )

    def _check_tokenizer(self, folder: Path) -> None:
        """DataError E310 if the tokenizer has no end token, or does not say where tokens stand."""
        tokenizer = self.backbone.tokenizer
        if tokenizer.eos_token_id is None or not tokenizer.is_fast:
            what = "names no eos_token, by which an answer ends" if tokenizer.is_fast else (
                "does not say where in a text its tokens stand; one with a tokenizer.json does"
            )
            raise DataError(f"The tokenizer in {folder} {what}.", code="E310")

    @torch.no_grad()
    def encode(self, inputs: Inputs) -> Encoded:
        if not len(inputs):
            raise ValueError("there are no rows to encode")
        rows, marks = [], []
        for pair in inputs:
            ids, asked = self.tokens(*map(str, pair))
            rows.append(ids)
            # At each place the next token, if it is the answer's. Before an answer to nothing there
            # is no place for its first.
            marks += [IGNORED] * (asked - 1) + ids[max(asked, 1) :] + [IGNORED]
        starts = self._starts(rows)
        kept = self._room(int(starts[-1]))
        for index, hidden, _, _ in self._lower(rows):
            self._keep(kept, hidden, index, starts)
        return Encoded(
            torch.arange(len(rows))[:, None], torch.zeros(len(rows), 0), kept, starts,
            torch.tensor(marks),
        )

    def prompt(self, text: str, most: int | None = None) -> list[int]:
        """The tokens of what the user says, in the model's chat template if it has one.

        Args:
            text: what the user says.
            most: how many tokens there may be; of a longer prompt the beginning of `text` is left
                out, and nothing of the system message or the template.
        """
        tokenizer, found = self.backbone.tokenizer, self._framed(text)
        if most is None or len(found) <= most:
            return found
        pieces = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, left_out = [start for start, _ in pieces["offset_mapping"]], 0
        while len(found) > most and left_out < len(starts):
            left_out += len(found) - most  # what is left may have a token more than it had before
            found = self._framed(text[starts[left_out] :] if left_out < len(starts) else "")
        return found

    def _framed(self, text: str) -> list[int]:
        """The tokens of a prompt with `text` in it. Where the template has no role for a system
        message, it stands before the text."""
        tokenizer = self.backbone.tokenizer
        if self.system and not self._system_role:
            text = f"{self.system}\n\n{text}"
        if not tokenizer.chat_template:
            plain: list[int] = tokenizer(f"{text}\n")["input_ids"]
            return plain
        rendered = self._rendered(text, self.system if self._system_role else None)
        found: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return found

    def _rendered(self, text: str, system: str | None) -> str:
        """A prompt by the model's chat template. DataError E310 if the template refuses it."""
        said = [{"role": "system", "content": system}] if system else []
        said.append({"role": "user", "content": text})
        try:
            found: str = self.backbone.tokenizer.apply_chat_template(
                said, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise DataError(
                f"The model's chat template cannot be used: {error}", code="E310"
            ) from None
        return found

    def _has_system_role(self) -> bool:
        """Whether the chat template takes a system message: some refuse it, some leave it out."""
        if not self.system or not self.backbone.tokenizer.chat_template:
            return False
        try:
            return self.system.strip() in self._rendered("a question", self.system)
        except DataError:
            return False

    def tokens(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """The tokens of both and how many are the prompt's. Of a prompt that is too long the
        beginning of the user's text is left out. Of an answer that is too long the end is, and the
        end token with it: nothing is to be learnt about where such an answer ends."""
        tokenizer, room = self.backbone.tokenizer, self.max_tokens // ANSWER_SHARE
        answered = tokenizer(answer, add_special_tokens=False)["input_ids"]
        answered = [*answered, tokenizer.eos_token_id][:room]
        asked = self.prompt(prompt, self.max_tokens - len(answered))
        return [*asked, *answered], len(asked)

    def forward(
        self, encoded: Encoded, index: Tensor, *, adapter: bool, kept: Tensor | None = None
    ) -> Tensor:
        """Logits of the next token, [len(index), K, V], at the answers' places alone: a vocabulary
        has several layers' worth of products, and most tokens are the prompt's."""
        states, _ = self._upper(encoded, encoded.texts[index, 0], self._width(encoded, index))
        rows, places = torch.arange(len(index))[:, None], self._places(encoded, index)
        states = states[rows, places.clamp(min=0)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = nn.functional.linear(states, self._unembedding[0])
        return logits

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
        ids, base = self.prompt(prompt, self.max_tokens), self.backbone
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
