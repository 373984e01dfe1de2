"""What a language model reads of a record: prompt and answer as tokens, in its own chat template.

Of a prompt that is too long the beginning of the user's text is left out, and nothing of the system
message or the template. Of an answer that is too long the end is left out, and the end token with
it: nothing is to be learnt about where such an answer ends.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from silotune.common.contract.contract import Contract
from silotune.common.contract.model import LanguageModel
from silotune.common.contract.task import Language
from silotune.common.errors import DataError

ANSWER_SHARE = 2  # an answer takes at most this part of the room, so that some prompt is left


class Prompts:
    """DataError E310 if the tokenizer or its chat template cannot be used for the contract."""

    def __init__(self, contract: Contract, tokenizer: Any) -> None:
        assert isinstance(contract.task, Language)
        assert isinstance(contract.model, LanguageModel)
        self.tokenizer, self.max_tokens = tokenizer, contract.model.max_tokens
        self.system = contract.task.system
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"The tokenizer of '{contract.model.name}' names no eos_token, by which an answer "
                "ends.",
                code="E310",
            )
        if not tokenizer.is_fast:
            raise DataError(
                f"The tokenizer of '{contract.model.name}' does not say where in a text its tokens "
                "stand; one with a tokenizer.json does.",
                code="E310",
            )
        self._system_role = self._has_system_role()
        frame, room = len(self.prompt("")), self.max_tokens - self.max_tokens // ANSWER_SHARE
        if frame >= room:
            raise DataError(
                f"task.system and the chat template of the model take {frame} tokens, and of "
                f"model.max_tokens = {self.max_tokens} a prompt has {room} beside a long answer. "
                "Raise model.max_tokens, or shorten task.system.",
                code="E310",
            )

    def prompt(self, text: str, most: int | None = None) -> list[int]:
        """The tokens of what the user says, in the model's chat template if it has one.

        Args:
            text: what the user says.
            most: how many tokens there may be at most.
        """
        found = self._framed(text)
        if most is None or len(found) <= most:
            return found
        pieces = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, left_out = [start for start, _ in pieces["offset_mapping"]], 0
        while len(found) > most and left_out < len(starts):
            left_out += len(found) - most  # what is left may have a token more than it had before
            found = self._framed(text[starts[left_out] :] if left_out < len(starts) else "")
        return found

    def tokens(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """The tokens of both and how many are the prompt's."""
        answered = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        answered = [*answered, self.tokenizer.eos_token_id][: self.max_tokens // ANSWER_SHARE]
        asked = self.prompt(prompt, self.max_tokens - len(answered))
        return [*asked, *answered], len(asked)

    def _framed(self, text: str) -> list[int]:
        """The tokens of a prompt with `text` in it. Where the template has no role for a system
        message, it stands before the text."""
        if self.system and not self._system_role:
            text = f"{self.system}\n\n{text}"
        if not self.tokenizer.chat_template:
            plain: list[int] = self.tokenizer(f"{text}\n")["input_ids"]
            return plain
        rendered = self._rendered(text, self.system if self._system_role else None)
        found: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return found

    def _rendered(self, text: str, system: str | None) -> str:
        """A prompt by the model's chat template. DataError E310 if the template refuses it."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        try:
            found: str = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise DataError(
                f"The model's chat template cannot be used: {error}", code="E310"
            ) from None
        return found

    def _has_system_role(self) -> bool:
        """Whether the chat template takes a system message: some refuse it, some leave it out."""
        if not self.system or not self.tokenizer.chat_template:
            return False
        try:
            return self.system.strip() in self._rendered("a question", self.system)
        except DataError:
            return False
