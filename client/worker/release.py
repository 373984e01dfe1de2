"""The one way out of a site. What is not described here does not leave.

`pack` lets out a Description (a name, signed), a Refusal (a code and a random number) and an
Update. An Update needs a charge: the ledger's entry that paid for exactly this run, round and
attempt. Its arrays are the tensors the contract's phase trains, by name, shape and type, finite and
bounded; its metrics are the contract's, finite and bounded; its epsilon is a function of the public
plan. No reply has a field for text, a count, a loss that was not paid for, or a traceback.
Under a contract with secure aggregation the same update leaves masked and in no other way; the
replies of its other stages hold keys, shares and signatures, which no record has any part in.

Bounds are on what is already private, so that a refusal by them tells nothing more than the
(noised) values it refuses.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

from silotune.client.privacy.budget import ROUNDING
from silotune.client.privacy.ledger_entries import Charged
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.errors import CODES, ErrorCode, ProtocolError, SilotuneError
from silotune.common.protocol import messages, packing, tensors
from silotune.common.protocol.messages import (
    MASKED,
    Arrays,
    Blobs,
    Description,
    Endorsement,
    Keys,
    Masked,
    Message,
    Receipt,
    Refusal,
    Revealed,
    Shares,
    Update,
)
from silotune.common.protocol.tensors import Shapes
from silotune.common.secagg import fixed_point
from silotune.common.signing import Sign

log = logging.getLogger(__name__)

LARGEST_METRIC = 1e6


def description(contract: Contract, site: str, challenge: str, sign: Sign) -> bytes:
    signed = sign(Description.statement(contract.hash, site, challenge))
    header = Description(contract=contract.hash, site=site, signature=signed.hex())
    return _pack(Message(header), {})


def refusal(contract: Contract, site: str, error: Exception) -> bytes:
    """A code and an incident id; what happened stands in the site's own log under that id."""
    known = isinstance(error, SilotuneError) and error.code in CODES
    code = error.code if isinstance(error, SilotuneError) and known else ErrorCode.UNEXPECTED
    incident = secrets.token_hex(8)
    log.error("incident %s (%s): %s", incident, code, error, exc_info=None if known else error)
    header = Refusal(contract=contract.hash, site=site, code=code, incident=incident)
    return _pack(Message(header), {})


def step(
    contract: Contract, site: str, kind: type[Keys | Shares | Endorsement | Revealed], blobs: Blobs
) -> bytes:
    """A reply of a stage of secure aggregation: bytes by the names of sites."""
    if not set(blobs) <= set(contract.weights()) or contract.secure_aggregation is None:
        raise ProtocolError(
            "The reply is not one of secure aggregation.", code=ErrorCode.UPDATE_INVALID
        )
    return _pack(Message(kind(contract=contract.hash, site=site), blobs=blobs), {})


def update(
    contract: Contract,
    site: str,
    charge: Charged,
    change: Arrays,
    metrics: dict[Metric, float],
    shapes: Shapes,
    *,
    epsilon: float | None,
    receipt: Receipt,
    sign: Sign,
    agreement: str | None = None,
    mask: Callable[[Arrays, dict[Metric, float]], bytes] | None = None,
) -> bytes:
    """The reply that `charge` paid for. ProtocolError E502 if it is not exactly what it should be,
    E508 if training diverged.

    shapes: of all the model's adapter tensors. mask: turns the checked update into the masked one
    of `agreement`; the contract says whether there must be one.
    """
    p = contract.privacy
    if charge.contract != contract.hash or (p.mode == "dp") != (charge.noise_multiplier > 0):
        raise ProtocolError("The reply is not what was charged.", code=ErrorCode.UPDATE_INVALID)
    most = contract.target_of(site).epsilon
    if (epsilon is None) != (p.mode == "none") or (epsilon or 0.0) > most * ROUNDING:
        raise ProtocolError("The reply's ε is outside the contract.", code=ErrorCode.UPDATE_INVALID)
    if set(metrics) != set(contract.metrics):
        raise ProtocolError(
            "The reply's metrics are not the contract's.", code=ErrorCode.UPDATE_INVALID
        )
    if not all(np.isfinite(v) and abs(v) <= LARGEST_METRIC for v in metrics.values()):
        raise ProtocolError(
            "A metric of the reply is not finite or too large.", code=ErrorCode.UPDATE_INVALID
        )
    facts: dict[str, Any] = {
        "contract": contract.hash,
        "site": site,
        "run": charge.run,
        "round": charge.round,
        "attempt": charge.attempt,
        "request": charge.request,
        "epsilon": epsilon,
        "receipt": receipt,
    }
    names = tensors.trained_names(shapes, contract.round_plan(charge.round).sends)
    trained = {name: shapes[name] for name in names}
    if (mask is None) != (contract.secure_aggregation is None):
        raise ProtocolError(
            "The contract says otherwise about masks.", code=ErrorCode.UPDATE_INVALID
        )
    if mask is None:
        _check(change, trained)
        clear = Message(Update(**facts, metrics=metrics), change)
        return messages.pack(messages.signed(clear, sign))
    kept = packing.clamp_to_bound(contract, change)
    beyond = sum(int((kept[name] != change[name]).sum()) for name in change)
    if beyond:
        log.warning("%d entries of the update were beyond secure_aggregation.bound", beyond)
    _check(kept, trained)
    blob = mask(kept, metrics)
    if len(blob) != fixed_point.WIDTH * packing.size(contract, trained):
        raise ProtocolError(
            "The masked reply has another length than its update.", code=ErrorCode.UPDATE_INVALID
        )
    masked = Message(Masked(**facts, agreement=agreement or ""), blobs={MASKED: blob})
    return messages.pack(messages.signed(masked, sign))


def _pack(message: Message, shapes: Shapes) -> bytes:
    _check(message.arrays, shapes)
    return messages.pack(message)


def _check(arrays: Arrays, shapes: Shapes) -> None:
    tensors.check(arrays, shapes, "The reply")
    norm = float(np.sqrt(sum(np.sum(a.astype(np.float64) ** 2) for a in arrays.values())))
    if norm > tensors.LARGEST:
        raise ProtocolError(
            f"The reply's norm is beyond {tensors.LARGEST:g}.", code=ErrorCode.DIVERGED
        )
