"""The boundary: the only types that cross it, and their bytes.

Wire format: one safetensors file; its `__metadata__` holds one key, `silotune`, with the header as
canonical JSON. Reading it executes nothing (no pickle) and checks sizes before it allocates.

Requests (server -> site):  Describe, Train; with secure aggregation Agree, Share, Endorse, Reveal
Replies  (site -> server):  Description, Update, Refusal; with it Masked instead of Update, and
                            Keys, Shares, Endorsement, Revealed

A message may have `arrays` (float32: an adapter, an update) and `blobs` (bytes by a site's name:
keys, sealed shares, signatures, a masked update); which kind may have which is in `_BODIES`.

A reply carries no text of the site's making: a Refusal is an `ErrorCode` and a random
incident id. A count or a name of a record has no field to travel in, and a loss only as one of the
contract's releases.
"""

from __future__ import annotations

import hashlib
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

from silotune.common.config.types import Bound, Frozen, Name, Number, Sha256
from silotune.common.contract.privacy import Metric
from silotune.common.errors import ErrorCode, ProtocolError
from silotune.common.signing import Sign

Arrays = dict[str, NDArray[np.float32]]
Blobs = dict[str, bytes]
MASKED = "masked"  # the blob of a masked update
MAX_HEADER = 1 << 20
MAX_WIRE = 256 << 20
RECORD, WIRE = "silotune", "wire"  # where in a Flower message the bytes lie

UNSIGNED = "0" * 128

RunId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Round = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
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
    signature: Signature

    @staticmethod
    def statement(site: str, sequence: int, head: str) -> bytes:
        """What is signed: one line, so no two receipts have the same bytes."""
        return f"silotune receipt 1\n{site}\n{sequence}\n{head}".encode()


class Describe(_Header):
    """Is this site there, and does it hold this contract? challenge: 32 bytes for it to sign."""

    kind: Literal["describe"] = "describe"
    challenge: Sha256


class Train(_Header):
    """Train one round from the adapter in `arrays`; the contract says how.

    clip_norm: with adaptive clipping, what the server has come to; else the contract's holds.
    agreement: with secure aggregation, the transcript by which to mask; then the blobs are the
    other members' shares for this site.
    """

    kind: Literal["train"] = "train"
    run: RunId
    round: Round
    attempt: Round = 1
    clip_norm: Bound | None = None
    receipt: Receipt | None = None
    agreement: Sha256 | None = None


class _Step(_Header):
    """A stage of an agreement on keys that serves the run from `round` on."""

    run: RunId
    round: Round
    attempt: Round


class Agree(_Step):
    """Make keys for the rounds from `round` on."""

    kind: Literal["agree"] = "agree"


class Share(_Step):
    """Here are all members' keys; seal your shares for them."""

    kind: Literal["share"] = "share"


class _Unmask(_Header):
    agreement: Sha256
    round: Round
    survivors: tuple[Name, ...]


class Endorse(_Unmask):
    """Sign that these members, and no others, survived the round."""

    kind: Literal["endorse"] = "endorse"


class Reveal(_Unmask):
    """Give your shares for these survivors; blobs: their endorsements, unless none is missing."""

    kind: Literal["reveal"] = "reveal"


class Description(_Header):
    """signature: Ed25519 over `statement`, so that no other node can speak in the site's name."""

    kind: Literal["description"] = "description"
    site: Name
    signature: Signature

    @staticmethod
    def statement(contract: str, site: str, challenge: str) -> bytes:
        return f"silotune description 1\n{contract}\n{site}\n{challenge}".encode()


class _Trained(_Header):
    """What comes with an update, masked or not.

    `request` is the `digest` of what was asked: it answers nothing else of the same name.
    `epsilon` is what this run has spent of the contract's budget at this site so far: a function
    of the public plan and the round alone. None when the contract trains without privacy.
    `signature` is Ed25519 over `update_statement`: nobody on the way can change or make one.
    """

    site: Name
    run: RunId
    round: Round
    attempt: Round
    request: Sha256
    epsilon: Spent | None
    receipt: Receipt
    signature: Signature = UNSIGNED


class Update(_Trained):
    """The private change of the trained tensors, in `arrays`.

    `metrics` are the contract's (Contract.metrics), bounded, noised and part of that epsilon.
    """

    kind: Literal["update"] = "update"
    metrics: dict[Metric, Number]


class Masked(_Trained):
    """The same change and metrics, masked for this agreement, in the blob MASKED."""

    kind: Literal["masked"] = "masked"
    agreement: Sha256


class _Said(_Header):
    site: Name


class Keys(_Said):
    """A site's signed public keys, in the blob of its name."""

    kind: Literal["keys"] = "keys"


class Shares(_Said):
    """Sealed shares: a blob for each other member."""

    kind: Literal["shares"] = "shares"


class Endorsement(_Said):
    """A signature of the survivors, in the blob of the site's name."""

    kind: Literal["endorsement"] = "endorsement"


class Revealed(_Said):
    """A share for each member."""

    kind: Literal["revealed"] = "revealed"


class Refusal(_Header):
    kind: Literal["refusal"] = "refusal"
    site: Name
    code: ErrorCode
    incident: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


Header = (
    Describe
    | Train
    | Agree
    | Share
    | Endorse
    | Reveal
    | Description
    | Update
    | Masked
    | Keys
    | Shares
    | Endorsement
    | Revealed
    | Refusal
)
_HEADER: TypeAdapter[Any] = TypeAdapter(Annotated[Header, Field(discriminator="kind")])
_BODIES: dict[str, tuple[str, ...]] = {  # kind -> what it may carry
    "train": ("F32", "U8"),
    "update": ("F32",),
    "masked": ("U8",),
    "share": ("U8",),
    "reveal": ("U8",),
    "keys": ("U8",),
    "shares": ("U8",),
    "endorsement": ("U8",),
    "revealed": ("U8",),
}
_BLOB = ":"  # before a blob's name on the wire, so that it is never an array's


@dataclass(frozen=True)
class Message:
    header: Header
    arrays: Arrays = field(default_factory=dict)
    blobs: Blobs = field(default_factory=dict)


def pack(message: Message) -> bytes:
    """The wire bytes; the same message always gives the same bytes."""
    tensors: dict[str, NDArray[Any]] = {
        n: np.asarray(a, dtype="<f4", order="C") for n, a in message.arrays.items()
    }
    tensors |= {_BLOB + n: np.frombuffer(b, dtype=np.uint8) for n, b in message.blobs.items()}
    return save_tensors(tensors, metadata={"silotune": _json(message.header).decode()})


def _json(header: Header) -> bytes:
    return json.dumps(
        header.model_dump(mode="json"), sort_keys=True, separators=(",", ":")
    ).encode()


def digest(request: Train, arrays: Arrays) -> str:
    """SHA-256 of what a round asks of every site alike: all but a site's own receipt and shares."""
    hashed = hashlib.sha256(_json(request.model_copy(update={"receipt": None})))
    hash_arrays(hashed, arrays)
    return hashed.hexdigest()


def hash_arrays(hashed: hashlib._Hash, arrays: Arrays) -> None:
    """Put names, shapes and values of the arrays into a hash, in one order."""
    for name in sorted(arrays):
        array = np.asarray(arrays[name], dtype="<f4", order="C")
        hashed.update(json.dumps([name, array.shape]).encode())
        hashed.update(array.data)


def update_statement(message: Message) -> bytes:
    """What is signed of an Update or Masked: all of it but the signature."""
    bare = message.header.model_copy(update={"signature": UNSIGNED})
    wire = pack(Message(bare, message.arrays, message.blobs))
    return b"silotune update 1\n" + hashlib.sha256(wire).digest()


def signed(message: Message, sign: Sign) -> Message:
    """The same Update or Masked with its signature."""
    signature = sign(update_statement(message)).hex()
    header = message.header.model_copy(update={"signature": signature})
    return Message(header, message.arrays, message.blobs)


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
        bodies = _BODIES.get(header.kind, ())
        for name, facts in outer.items():
            kind = "U8" if name.startswith(_BLOB) else "F32"
            if name != "__metadata__" and (facts["dtype"] != kind or kind not in bodies):
                raise ProtocolError(
                    f"A {header.kind} has a tensor that it may not have, or of another type.",
                    code=ErrorCode.UPDATE_INVALID,
                )
        tensors = load_tensors(wire)
    except (
        ValidationError,
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ):
        # What the sender wrote is not repeated: it may be anything.
        raise ProtocolError("A message is not in Silotune's format.") from None
    blobs = {n: a.tobytes() for n, a in tensors.items() if n.startswith(_BLOB)}
    message = Message(
        header,
        {n: a for n, a in tensors.items() if n not in blobs},
        {n.removeprefix(_BLOB): b for n, b in blobs.items()},
    )
    if pack(message) != wire:
        # One message has one form: no second key, padding or order in which something could hide.
        raise ProtocolError("A message is not in its canonical form.")
    return message
