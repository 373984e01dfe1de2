"""An index for retrieval: of a ranking that reads its two texts apart, the second ones as vectors.

A pair's score is sum_f w_f q_f i_f + b (common/models/encoder.py), so an item is one vector,
whoever asks.
The search is exact: a product with all of them.

Shapes: N items, Q queries, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import PairInput
from silotune.common.errors import DataError, ErrorCode, UsageError
from silotune.common.models.base import Network
from silotune.common.protocol.messages import Arrays
from silotune.common.runtime.atomic_files import write_durably
from silotune.common.tasks.calibration import Calibration


class Found(NamedTuple):
    """item: its place among the index's, from 0. score: the logit of being relevant."""

    item: int
    score: float


def check_contract(contract: Contract) -> PairInput:
    """UsageError unless it is a ranking whose texts are read apart."""
    if not isinstance(contract.input, PairInput) or contract.input.by != "bi":
        raise UsageError(
            f"'{contract.name}' is no ranking with input.by = \"bi\": only where the two texts are "
            "read apart can one of them be indexed."
        )
    return contract.input


class Index:
    """Vectors [N, F] of the items' texts under one adapter; `arrays` must be that adapter's."""

    def __init__(self, contract: Contract, model: Network, arrays: Arrays) -> None:
        self.spec, self.contract = check_contract(contract), contract
        self.model, self.arrays = model, arrays
        self.vectors: NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)

    def read(self, items: Sequence[str], file: Path | None = None) -> bool:
        """Index these texts. With `file` they are taken from there if it was made from the same
        texts, adapter and contract, else made and written there; True if they were taken.
        UsageError if what is there is no index: it is left as it is."""
        if not items:
            raise DataError("There is no item to index.", code=ErrorCode.TOO_FEW_ROWS)
        made_from = self._fingerprint(items)
        if file is not None and (kept := _load(file, made_from, len(items))) is not None:
            self.vectors = kept
            return True
        self.vectors = self._features(items)
        if file is not None:
            write_durably(file, save({"items": self.vectors}, metadata={"made_from": made_from}))
        return False

    def search(
        self, queries: Sequence[str], k: int, calibration: Calibration | None = None
    ) -> list[list[Found]]:
        """The k best items of each query, best first, of equal ones the first; fewer if there are
        fewer. calibration: what scores are calibrated by; it changes no order."""
        weight, bias = self.arrays["head.weight"][0], float(self.arrays["head.bias"][0])
        scores = (self._features(queries) * weight) @ self.vectors.T + bias
        if calibration is not None:
            scores = np.asarray(calibration.apply(scores))
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            [Found(int(item), float(row[item])) for item in order]
            for row, order in zip(scores, best, strict=True)
        ]

    @torch.no_grad()
    def _features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[n, F]"""
        model, adapter = self.model, self.contract.adapter is not None
        with model.lock:
            model.load(self.arrays)
            encoded = model.encode(texts)
            every = torch.arange(len(texts))
            assert isinstance(model.head, nn.Linear)
            out = torch.zeros(len(texts), model.head.in_features)
            for index, n in model.micro_batches(encoded, every, adapter=adapter):
                found = model.features(encoded, index, adapter=adapter)
                out[index[:n]] = found[:n].float().cpu()
        vectors: NDArray[np.float32] = out.numpy()
        return vectors

    def _fingerprint(self, items: Sequence[str]) -> str:
        digest = hashlib.sha256(self.contract.hash.encode())
        for name in sorted(self.arrays):
            digest.update(name.encode() + self.arrays[name].tobytes())
        for text in items:
            own = text.encode()
            digest.update(len(own).to_bytes(8) + own)
        return digest.hexdigest()


def _load(file: Path, made_from: str, n: int) -> NDArray[np.float32] | None:
    """The vectors, or None if there are none or they were made from something else."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="numpy") as found:
            made = (found.metadata() or {})["made_from"]
            vectors: NDArray[np.float32] = found.get_tensor("items")
    except (OSError, SafetensorError, KeyError):
        raise UsageError(f"{file} is no index of items. Name another file.") from None
    return vectors if made == made_from and len(vectors) == n else None
