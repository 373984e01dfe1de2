"""Adapters as named float32 arrays, and the check every set of arrays passes at each side.

Names: `head.weight` [L, F], `head.bias` [L]; for each adapted Linear `m` of the encoder
`m.lora_A` [r, in] and `m.lora_B` [out, r], or `m.core` [r, r] with `m.ends.down` [r, in] and
`m.ends.up` [out, r]; with FedEx-LoRA also `m.residual` [out, in]. L labels, F features, r rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from silotune.common.errors import DataError, ErrorCode, ProtocolError, UsageError
from silotune.common.protocol.messages import Arrays, hash_arrays

# Before the name of a tensor: all sites' mean gradient in it, in the round before (scaffold).
CONTROL = "control."
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: a.shape for name, a in arrays.items()}


def digest(arrays: Arrays) -> str:
    """SHA-256 of the adapter that a round begins with: its tensors, without the mean gradients that
    may come with them."""
    hashed = hashlib.sha256()
    hash_arrays(hashed, {n: a for n, a in arrays.items() if not n.startswith(CONTROL)})
    return hashed.hexdigest()


def trained_names(arrays: Mapping[str, object], groups: Collection[str]) -> list[str]:
    """Which tensors belong to these groups (common/contract/schedule.py), in sorted order."""
    return sorted(name for name in arrays if _part(name) in groups)


def _part(name: str) -> str:
    """What a tensor is of."""
    if name.startswith(CONTROL):
        return "control"
    if name.startswith("head."):
        return "head"
    if name.endswith((".ends.down", ".ends.up", ".residual")):
        return "frozen"
    return "A" if name.endswith(".lora_A") else "adapter"


def reshaped(shapes: Shapes, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes with LoRA of another rank."""
    return {
        name: (rank, shape[1])
        if name.endswith(".lora_A")
        else (shape[0], rank)
        if name.endswith(".lora_B")
        else shape
        for name, shape in shapes.items()
    }


def pad_or_truncate_rank(arrays: Arrays, shapes: Shapes) -> Arrays:
    """The arrays cut to `shapes`, or filled up with zeros: the first rows of A, columns of B. What
    is not in `shapes` stays as it is, for `check` to find."""
    found = {}
    for name, array in arrays.items():
        shape = shapes.get(name.removeprefix(CONTROL), array.shape)
        if array.shape == tuple(shape):
            found[name] = array
            continue
        most = tuple(slice(min(pair)) for pair in zip(array.shape, shape, strict=True))
        found[name] = np.zeros(shape, dtype=np.float32)
        found[name][most] = array[most]
    return found


def needed_names(arrays: Mapping[str, object], *, adapts: bool) -> list[str]:
    """Which tensors a site needs for a round: the head alone while the adapter is still zero."""
    return sorted(n for n in arrays if adapts or n.startswith("head."))


LARGEST = 1e6  # of any entry; weights that train are below 100


def check(arrays: Arrays, shapes: Shapes, what: str) -> None:
    """ProtocolError E502 unless `arrays` are exactly these names and shapes, float32; E508 if an
    entry is beyond LARGEST or not finite. (That stops overflow, not poisoning by plausible values.)
    """
    if set(arrays) != set(shapes):
        missing, extra = set(shapes) - set(arrays), set(arrays) - set(shapes)
        raise ProtocolError(
            f"{what} has {len(missing)} tensors missing and {len(extra)} unknown.",
            code=ErrorCode.UPDATE_INVALID,
        )
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != tuple(shape):
            raise ProtocolError(
                f"{what}: '{name}' has shape {array.shape}, the contract says {tuple(shape)}.",
                code=ErrorCode.UPDATE_INVALID,
            )
        if array.dtype != np.float32:
            raise ProtocolError(
                f"{what}: '{name}' is {array.dtype}, not float32.", code=ErrorCode.UPDATE_INVALID
            )
        if not np.isfinite(array).all():
            raise ProtocolError(
                f"{what}: '{name}' has values that are not finite.", code=ErrorCode.DIVERGED
            )
        if array.size and np.abs(array).max() > LARGEST:
            raise ProtocolError(
                f"{what}: '{name}' has values beyond {LARGEST:g}.", code=ErrorCode.DIVERGED
            )


def load(file: Path) -> Arrays:
    """The adapter in a file; UsageError if there is none, DataError E305 if it is damaged."""
    if not file.is_file():
        raise UsageError(f"{file} does not exist: a run has it when it is done.")
    try:
        arrays: Arrays = load_file(file)
    except SafetensorError:
        raise DataError(
            f"{file} is damaged: copy it again.", code=ErrorCode.HASH_MISMATCH
        ) from None
    return arrays


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """[rows, columns] with orthonormal rows (rows <= columns): the frozen A, drawn publicly."""
    q, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    return np.ascontiguousarray(q.T, dtype=np.float32)
