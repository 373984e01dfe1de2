"""What a site's update must be to count: the checks between a reply and the round's sum."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.errors import ErrorCode, ProtocolError
from silotune.common.protocol import messages, tensors
from silotune.common.protocol.messages import Arrays, Masked, Message, Receipt, Update
from silotune.common.protocol.tensors import Shapes
from silotune.common.signing import verifies
from silotune.server.storage.run_store import RunStore


class UpdateValidator:
    """Of one run. Everything a reply claims is held against the contract; nothing is taken from it
    but the update, the metrics that the contract releases, ε for the report, and a receipt."""

    def __init__(self, contract: Contract, registry: RunStore, run_id: str) -> None:
        self.contract, self.registry, self.run_id = contract, registry, run_id

    def check(
        self,
        message: Message,
        site: str,
        server_round: int,
        attempt: int,
        request: str,
        shapes: Shapes,
    ) -> Update | Masked:
        """The header of the update that `site` was asked for, if that is what `message` is.

        request: the digest of what was asked. shapes: of the tensors that the round trains.
        ProtocolError with the code of what is wrong otherwise; nothing was kept then.
        """
        update = message.header
        kind = Masked if self.contract.secure_aggregation else Update
        if not isinstance(update, kind):
            raise ProtocolError("The reply is no update.", code=ErrorCode.MESSAGE_MISMATCH)
        assert isinstance(update, Update | Masked)
        if site not in self.contract.weights():
            raise ProtocolError("The site is not in the roster.", code=ErrorCode.MESSAGE_MISMATCH)
        expected = (site, self.run_id, server_round, attempt, request)
        answered = (update.site, update.run, update.round, update.attempt, update.request)
        if answered != expected:
            raise ProtocolError(
                "The update is for another site, round or request.", code=ErrorCode.MESSAGE_MISMATCH
            )
        public = self.public_key(site)
        if public is not None and not verifies(
            public, update.signature, messages.update_statement(message)
        ):
            raise ProtocolError(
                "The update is not signed by the site's roster key.",
                code=ErrorCode.MESSAGE_MISMATCH,
            )
        if isinstance(update, Update):
            tensors.check(message.arrays, shapes, "The update")
            self._check_norm(message.arrays)
            self._check_metrics(update.metrics)
        self._check_epsilon(site, update.epsilon)
        self._take_receipt(site, update.receipt)
        return update

    def _check_norm(self, arrays: Arrays) -> None:
        """The L2 norm over all tensors, where the contract bounds it. Of a masked update only the
        site itself can hold the entries to a bound (secure_aggregation.bound)."""
        most = self.contract.aggregation.max_update_norm
        norm = math.sqrt(
            sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays.values())
        )
        if most is not None and norm > most:
            raise ProtocolError(
                f"The update's norm is beyond {most:g}.", code=ErrorCode.UPDATE_INVALID
            )

    def _check_epsilon(self, site: str, epsilon: float | None) -> None:
        """A site reports what it spent: within the contract's budget, or nothing without DP."""
        most = self.contract.target_of(site).epsilon
        fits = (
            epsilon is None
            if self.contract.privacy.mode == "none"
            else (epsilon is not None and epsilon <= most * (1 + 1e-9))
        )
        if not fits:
            raise ProtocolError(
                "The update reports an ε that the contract does not allow.",
                code=ErrorCode.UPDATE_INVALID,
            )

    def _check_metrics(self, metrics: Mapping[Metric, float]) -> None:
        if set(metrics) != set(self.contract.metrics):
            raise ProtocolError(
                "The update's metrics are not those the contract releases.",
                code=ErrorCode.UPDATE_INVALID,
            )

    def _take_receipt(self, site: str, receipt: Receipt) -> None:
        """Keep a site's newest receipt, if the roster has the key to check it by.

        A lower number than the last is no proof of anything here: two workers of one site may
        answer out of turn. The site itself knows when it gets the newest one back.
        ProtocolError if the signature is not by the roster's key.
        """
        public = self.public_key(site)
        if public is None:
            return
        statement = Receipt.statement(site, receipt.sequence, receipt.head)
        if not verifies(public, receipt.signature, statement):
            raise ProtocolError(
                "The receipt is not signed by the site's roster key.",
                code=ErrorCode.MESSAGE_MISMATCH,
            )
        last = self.registry.receipt(public)
        if last is None or receipt.sequence > last.sequence:
            self.registry.keep_receipt(public, receipt)

    def last_receipt(self, site: str) -> Receipt | None:
        public = self.public_key(site)
        return None if public is None else self.registry.receipt(public)

    def public_key(self, site: str) -> str | None:
        return next((s.public_key for s in self.contract.sites if s.name == site), None)
