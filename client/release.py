"""The one way out of a site. What is not described here does not leave.

`pack` lets out a Description (a name), a Refusal (a code and a random number) and an Update. An
Update needs a charge: the ledger's entry that paid for exactly this run, round and attempt. Its
arrays are the tensors the contract's phase trains, by name, shape and type, finite and bounded; its
metrics are the contract's, finite and bounded; its epsilon is a function of the public
plan. No reply has a field for text, a count, a loss that was not paid for, or a traceback.

Bounds are on what is already private, so that a refusal by them tells nothing more than the
(noised) values it refuses.
"""

from __future__ import annotations

import logging
import secrets

import numpy as np

from silotune.client.entries import Charged
from silotune.common import adapter, messages
from silotune.common.adapter import Shapes
from silotune.common.contract import Contract
from silotune.common.errors import CODES, ProtocolError, SilotuneError
from silotune.common.messages import Arrays, Description, Message, Receipt, Refusal, Update
from silotune.common.plan import Metric

log = logging.getLogger(__name__)

LARGEST_METRIC = 1e6


def description(contract: Contract, site: str) -> bytes:
    return _pack(Message(Description(contract=contract.hash, site=site)), {})


def refusal(contract: Contract, site: str, error: Exception) -> bytes:
    """A code and an incident id; what happened stands in the site's own log under that id."""
    known = isinstance(error, SilotuneError) and error.code in CODES
    code = error.code if isinstance(error, SilotuneError) and known else "E500"
    incident = secrets.token_hex(8)
    log.error("incident %s (%s): %s", incident, code, error, exc_info=None if known else error)
    header = Refusal(contract=contract.hash, site=site, code=code, incident=incident)
    return _pack(Message(header), {})


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
) -> bytes:
    """The reply that `charge` paid for. ProtocolError E502 if it is not exactly what it should be.

    shapes: of all the model's adapter tensors.
    """
    p = contract.privacy
    if charge.contract != contract.hash or (p.mode == "dp") != (charge.noise_multiplier > 0):
        raise ProtocolError("The reply is not what was charged.", code="E502")
    most = contract.target_of(site).epsilon
    if (epsilon is None) != (p.mode == "none") or (epsilon or 0.0) > most:
        raise ProtocolError("The reply's ε is outside the contract.", code="E502")
    if set(metrics) != set(contract.metrics):
        raise ProtocolError("The reply's metrics are not the contract's.", code="E502")
    if not all(np.isfinite(v) and abs(v) <= LARGEST_METRIC for v in metrics.values()):
        raise ProtocolError("A metric of the reply is not finite or too large.", code="E502")
    header = Update(
        contract=contract.hash, site=site, run=charge.run, round=charge.round,
        attempt=charge.attempt, epsilon=epsilon, metrics=metrics, receipt=receipt,
    )
    trained = adapter.trained_names(shapes, contract.phase_of(charge.round).trains)
    return _pack(Message(header, change), {name: shapes[name] for name in trained})


def _pack(message: Message, shapes: Shapes) -> bytes:
    adapter.check(message.arrays, shapes, "The reply")
    norm = float(np.sqrt(sum(np.sum(a.astype(np.float64) ** 2) for a in message.arrays.values())))
    if norm > adapter.LARGEST:
        raise ProtocolError(f"The reply's norm is beyond {adapter.LARGEST:g}.", code="E502")
    return messages.pack(message)
