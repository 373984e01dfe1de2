"""A frozen base model as its parts: embeddings, layers, and what comes after the last.

BERT-type models read both ways, Llama-type ones from left to right; both are made from the bytes
that the contract's hash covers (common/model_files/model_folder.py), in this process's own memory.
Shapes: n rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from silotune.common.errors import DataError, ErrorCode
from silotune.common.model_files import model_folder
from silotune.common.models.attention import register_attention

OUTPUT = "lm_head.weight"  # of a causal model's file
Around = tuple[Tensor, ...]  # what each layer needs beside the hidden states


class Backbone:
    """causal: whether a token sees only those before it. prefix: of the layers' public names.
    settings: with which transformers makes the model. output: [V, H], what gives the next token's
    logits, where it is not the embeddings."""

    causal: bool
    prefix: str
    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, base: Any, tokenizer: Any, output: Tensor | None) -> None:
        self.base, self.tokenizer, self.output = base, tokenizer, output
        self.size = int(base.config.hidden_size)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def layers(self) -> nn.ModuleList:
        raise NotImplementedError

    @property
    def unused_places(self) -> int:
        """How many of the configuration's positions no token can have."""
        return 0

    def made_up(self, lengths: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
        """Token numbers [n, width] of random words, always the same, and their mask."""
        special = {*self.tokenizer.all_special_ids, self.tokenizer.pad_token_id}
        words = [i for i in range(self.base.config.vocab_size) if i not in special]
        drawn = np.random.default_rng(0).choice(words, (len(lengths), width))
        mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
        return torch.from_numpy(drawn).masked_fill(~mask, self.tokenizer.pad_token_id), mask

    def embed(self, ids: Tensor) -> Tensor:
        """Token numbers [n, T] -> [n, T, H]."""
        raise NotImplementedError

    def around(self, mask: Tensor) -> Around:
        """For mask [n, T], True for tokens; what is padded stands on the right."""
        raise NotImplementedError

    def through(self, layer: nn.Module, hidden: Tensor, around: Around) -> Tensor:
        raise NotImplementedError

    def last(self, hidden: Tensor) -> Tensor:
        """What follows the last layer, [n, T, H]."""
        return hidden


class Bert(Backbone):
    causal, prefix = False, "encoder.layer"
    settings: ClassVar[Mapping[str, Any]] = {"add_pooling_layer": False}

    @property
    def layers(self) -> nn.ModuleList:
        found: nn.ModuleList = self.base.encoder.layer
        return found

    @property
    def unused_places(self) -> int:
        """RoBERTa's kin number positions from behind the number of the padding token."""
        embeddings = self.base.embeddings
        first = getattr(embeddings, "padding_idx", None)
        return 0 if first is None else int(first) + 1

    def embed(self, ids: Tensor) -> Tensor:
        """What is behind the first separator is a pair's second text: of the second segment, where
        the model knows two."""
        ends = (ids == self.tokenizer.sep_token_id).long()
        known = "token_type_ids" in self.tokenizer.model_input_names
        most = self.base.config.type_vocab_size - 1 if known else 0
        segments = (ends.cumsum(1) - ends).clamp(max=most)
        found: Tensor = self.base.embeddings(input_ids=ids, token_type_ids=segments)
        return found

    def around(self, mask: Tensor) -> Around:
        """What attention adds to its scores: [n, 1, 1, T], 0 where one may look."""
        bias = torch.zeros(mask.shape, device=mask.device)
        return (bias.masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None, :],)

    def through(self, layer: nn.Module, hidden: Tensor, around: Around) -> Tensor:
        found: Tensor = layer(hidden, *around)
        return found


class Llama(Backbone):
    causal, prefix = True, "layers"

    @property
    def layers(self) -> nn.ModuleList:
        found: nn.ModuleList = self.base.layers
        return found

    def embed(self, ids: Tensor) -> Tensor:
        found: Tensor = self.base.embed_tokens(ids)
        return found

    def around(self, mask: Tensor) -> Around:
        """The rotations of T places. Padding stands behind what counts, which never looks there."""
        places = torch.arange(mask.shape[1], device=mask.device)[None]
        like = torch.zeros(1, device=mask.device)
        cos, sin = self.base.rotary_emb(like, position_ids=places)
        return cos, sin

    def through(self, layer: nn.Module, hidden: Tensor, around: Around) -> Tensor:
        found: Tensor = layer(hidden, position_embeddings=around)
        return found

    def last(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.base.norm(hidden)
        return found

    def unembedding(self) -> Tensor:
        """[V, H]: a hidden state's products with its rows are the next token's logits. DataError
        E310 if the model's files have none."""
        if self.base.config.tie_word_embeddings:
            tied: Tensor = self.base.embed_tokens.weight
            return tied
        if self.output is None:
            raise DataError(
                f"The model's weights lack '{OUTPUT}': it cannot write answers.",
                code=ErrorCode.MODEL_UNSUITABLE,
            )
        return self.output


KINDS: dict[str, type[Backbone]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), Bert),
    **dict.fromkeys(("llama", "mistral", "qwen2"), Llama),
}


@lru_cache(maxsize=4)
def read(folder: Path, sha256: str, device: torch.device) -> Backbone:
    """The base model and tokenizer, read once per process and shared by everything in it.

    Raises:
        DataError: E305 if the folder is not the contract's model or holds what could change it,
            E310 if the model is of no known kind, lacks weights, or does not load.
    """
    contents = model_folder.read(folder, sha256)
    state = _weights(folder, contents)
    with _understood(folder):
        kind, config, tokenizer = _configured(folder, contents)
        base, report = _model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=state,
            attn_implementation=register_attention(),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **kind.settings,
        )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would draw them at random, with no more than a warning
        raise DataError(
            f"The weights in {folder} lack {len(missing)} tensors of this model, the first is "
            f"'{missing[0]}'. Fetch the folder again.",
            code=ErrorCode.MODEL_UNSUITABLE,
        )
    output = None if config.tie_word_embeddings else state.get(OUTPUT)
    base.requires_grad_(False).eval().to(device)
    return kind(base, tokenizer, None if output is None else output.to(device))


def shell(folder: Path) -> Backbone:
    """The model and its tokenizer without weights, to see what a contract finds in it. DataError
    as `read`, but for the weights."""
    contents = model_folder.settings(folder)
    with _understood(folder):
        kind, config, tokenizer = _configured(folder, contents)
        with torch.device("meta"):
            base = _model_class(config)(config, **kind.settings)
    return kind(base, tokenizer, None)


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """DataError E310 for what transformers raises on files that it does not understand."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    except (
        ValueError,
        OSError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"transformers cannot load the model in {folder}: {reason}",
            code=ErrorCode.MODEL_UNSUITABLE,
        ) from None


def _model_class(config: Any) -> Any:
    return MODEL_MAPPING[type(config)]


def _weights(folder: Path, contents: dict[str, bytes]) -> dict[str, Tensor]:
    """The tensors of all weight files, in float32 and memory of their own. The files' bytes are
    taken out of `contents`, so that each is freed before the next one is read."""
    state: dict[str, Tensor] = {}
    for name in [n for n in contents if n.endswith(model_folder.WEIGHTS_SUFFIX)]:
        try:
            found = load(contents.pop(name))
        except SafetensorError as error:
            raise DataError(
                f"Model file {folder / name} is damaged: {error}.", code=ErrorCode.MODEL_UNSUITABLE
            ) from None
        if twice := found.keys() & state.keys():
            raise DataError(
                f"Two weight files in {folder} hold '{min(twice)}': there is more than one model "
                "in it.",
                code=ErrorCode.MODEL_UNSUITABLE,
            )
        while found:
            key, tensor = found.popitem()
            floating = tensor.is_floating_point()
            state[key] = tensor.to(torch.float32, copy=True) if floating else tensor
    return state


def _configured(folder: Path, contents: Mapping[str, bytes]) -> tuple[type[Backbone], Any, Any]:
    """The kind of model, its configuration and its tokenizer, read from a folder of this process's
    own that holds these contents. DataError E310 for a kind that is not known."""
    with TemporaryDirectory(prefix="silotune-model-") as own:
        for name, content in contents.items():
            (Path(own) / name).write_bytes(content)
        config = AutoConfig.from_pretrained(own, local_files_only=True, trust_remote_code=False)
        if config.model_type not in KINDS:
            raise DataError(
                f"The model in {folder} is of type '{config.model_type}'; adapters and private "
                f"gradients are known to be right for {', '.join(KINDS)}.",
                code=ErrorCode.MODEL_UNSUITABLE,
            )
        tokenizer = AutoTokenizer.from_pretrained(
            own, local_files_only=True, trust_remote_code=False
        )
    return KINDS[config.model_type], config, tokenizer
