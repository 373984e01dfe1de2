"""The boundary: the only types that cross it, and their bytes.

Wire format: one safetensors file; its `__metadata__` holds one key, `silotune`, with the header as
canonical JSON. Reading it executes nothing (no pickle) and checks sizes before it allocates.

Requests (server -> site):  Describe, Train
Replies  (site -> server):  Description, Update, Refusal

A reply carries no text of the site's making: a Refusal is a code of `errors.CODES` and a random
incident id. A count or a name of a record has no field to travel in, and a loss only as one of the
contract's releases.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from silotune.common.errors import CODES, ProtocolError
from silotune.common.fields import Bound, Frozen, Name, Number, Sha256
from silotune.common.plan import Metric

Arrays = dict[str, NDArray[np.float32]]
MAX_HEADER = 1 << 20
MAX_WIRE = 256 << 20
RECORD, WIRE = "silotune", "wire"  # where in a Flower message the bytes lie

RunId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Round = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
Spent = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Header(Frozen):
    contract: Sha256


class Receipt(Frozen):
    """Where a site's ledger stood: the number of its last entry and its digest, which covers the
    entry, its MAC and through the chain all before it; signed.

    The site gives one with each update, the server hands back the last it has: a site whose ledger
    was rolled back sees it. `signature` is Ed25519 over `statement`.
    """

    sequence: Annotated[int, Field(ge=1, strict=True)]
    head: Sha256
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @staticmethod
    def statement(site: str, sequence: int, head: str) -> bytes:
        """What is signed: one line, so no two receipts have the same bytes."""
        return f"silotune receipt 1\n{site}\n{sequence}\n{head}".encode()


class Describe(_Header):
    """Is this site there, and does it hold this contract?"""

    kind: Literal["describe"] = "describe"


class Train(_Header):
    """Train one round from the adapter in `arrays`; the contract says how.

    clip_norm: with adaptive clipping, what the server has come to; else the contract's holds.
    """

    kind: Literal["train"] = "train"
    run: RunId
    round: Round
    attempt: Round = 1
    clip_norm: Bound | None = None
    receipt: Receipt | None = None


class Description(_Header):
    kind: Literal["description"] = "description"
    site: Name


class Update(_Header):
    """The private change of the trained tensors, in `arrays`.

    `epsilon` is what this run has spent of the contract's budget at this site so far: a function
    of the public plan and the round alone. None when the contract trains without privacy.
    `metrics` are the contract's (Contract.metrics), bounded, noised and part of that epsilon.
    """

    kind: Literal["update"] = "update"
    site: Name
    run: RunId
    round: Round
    attempt: Round
    epsilon: Spent | None
    metrics: dict[Metric, Number]
    receipt: Receipt


class Refusal(_Header):
    kind: Literal["refusal"] = "refusal"
    site: Name
    code: Annotated[str, Field(pattern=r"^E\d{3}$")]
    incident: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


Header = Annotated[Describe | Train | Description | Update | Refusal, Field(discriminator="kind")]
_HEADER: TypeAdapter[Any] = TypeAdapter(Header)


@dataclass(frozen=True)
class Message:
    header: Describe | Train | Description | Update | Refusal
    arrays: Arrays = field(default_factory=dict)


def pack(message: Message) -> bytes:
    """The wire bytes; the same message always gives the same bytes."""
    header = json.dumps(
        message.header.model_dump(mode="json"), sort_keys=True, separators=(",", ":")
    )
    arrays = {n: np.asarray(a, dtype="<f4", order="C") for n, a in message.arrays.items()}
    return save_tensors(arrays, metadata={"silotune": header})


def unpack(wire: bytes) -> Message:
    """Parse wire bytes; ProtocolError for anything that is not exactly one Silotune message."""
    if not 8 < len(wire) <= MAX_WIRE:
        raise ProtocolError(f"A message of {len(wire)} bytes is outside 9 to {MAX_WIRE}.")
    (size,) = struct.unpack("<Q", wire[:8])
    if size > min(MAX_HEADER, len(wire) - 8):
        raise ProtocolError("A message has a damaged header length.")
    try:
        outer = json.loads(wire[8 : 8 + size])
        inner = outer["__metadata__"]["silotune"]
        header = _HEADER.validate_json(inner, strict=True)
        if any(v["dtype"] != "F32" for k, v in outer.items() if k != "__metadata__"):
            raise ProtocolError("A message has an array that is not float32.", code="E502")
        arrays = load_tensors(wire)
    except (ValidationError, SafetensorError, ValueError, KeyError, TypeError, AttributeError,
            RecursionError):
        # What the sender wrote is not repeated: it may be anything.
        raise ProtocolError("A message is not in Silotune's format.") from None
    if isinstance(header, Refusal) and header.code not in CODES:
        raise ProtocolError("A refusal has an unknown code.")
    if arrays and not isinstance(header, Train | Update):
        raise ProtocolError(f"A {header.kind} has no arrays.")
    message = Message(header, arrays)
    if pack(message) != wire:
        # One message has one form: no second key, padding or order in which something could hide.
        raise ProtocolError("A message is not in its canonical form.")
    return message
