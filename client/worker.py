"""The worker: the process that holds a site's records and answers a closed set of requests.

`handle` takes and gives bytes (common/messages.py). It never raises: what goes wrong inside
leaves the site as a code and a random incident id, and is told in the site's own log only.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path

from silotune.client import accounting, dataset
from silotune.client.noise import NoiseSource
from silotune.client.train import train_round
from silotune.common import adapter, messages
from silotune.common.contract import Contract
from silotune.common.errors import ProtocolError, RefusalError, SilotuneError
from silotune.common.messages import Describe, Description, Message, Refusal, Train, Update
from silotune.common.model import Classifier, build

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteConfig:
    """What the owner of the records decides. Nothing a server sends can change it."""

    name: str
    data: Path
    model_folder: Path | None
    allow_without_dp: bool = False
    insecure_seed: int | None = None  # simulations and tests only


class Worker:
    """One site, one contract. The model, the encoded records and the spent budget stay in it."""

    def __init__(self, site: SiteConfig, contract: Contract) -> None:
        if site.name not in contract.weights():
            raise RefusalError(
                f"'{site.name}' is not in the contract's sites: {', '.join(contract.weights())}.",
                code="E201",
            )
        if contract.privacy.mode == "none" and not site.allow_without_dp:
            raise RefusalError(
                f"The contract '{contract.name}' trains without differential privacy and "
                f"{site.name} does not allow that (allow_without_dp = false).",
                code="E203",
            )
        self.site, self.contract = site, contract
        self.plan = accounting.plan(contract)
        private = contract.privacy.mode == "dp"
        # Fixed before the first request, so that the stop below holds for an adaptive server.
        self.order = accounting.best_order(self.plan, contract.privacy.delta) if private else 0.0
        self.history: list[accounting.Mechanism] = []
        self.source = NoiseSource(site=site.name, insecure_seed=site.insecure_seed)
        self.model: Classifier = build(contract, site.model_folder)
        self.data = dataset.load(site.data, contract, self.model)
        self.shapes = adapter.shapes_of(self.model.initial_arrays())
        self._answered: dict[tuple[str, int, int], tuple[bytes, bytes]] = {}
        self._lock = threading.Lock()

    def handle(self, wire: bytes) -> bytes:
        """Answer one request. The same bytes get the same bytes back, at no further cost."""
        try:
            request = messages.unpack(wire)
            if request.header.contract != self.contract.hash:
                raise RefusalError("The request is for another contract.", code="E201")
            if isinstance(request.header, Describe):
                return self._reply(
                    Message(Description(contract=self.contract.hash, site=self.site.name))
                )
            if isinstance(request.header, Train):
                with self._lock:
                    return self._train_once(request.header, request.arrays, wire)
            raise ProtocolError("The message is no request.")
        except Exception as error:  # whatever it is, it must not leave the site
            code = error.code if isinstance(error, SilotuneError) else "E500"
            incident = secrets.token_hex(8)
            log.error("incident %s (%s)", incident, code, exc_info=error)
            return messages.pack(
                Message(
                    Refusal(
                        contract=self.contract.hash,
                        site=self.site.name,
                        code=code,
                        incident=incident,
                    )
                )
            )

    def _train_once(self, request: Train, arrays: messages.Arrays, wire: bytes) -> bytes:
        key = (request.run, request.round, request.attempt)
        digest = hashlib.sha256(wire).digest()
        if key in self._answered:
            known, reply = self._answered[key]
            if known != digest:
                raise RefusalError(f"Round {request.round} was already asked with other bytes.")
            return reply
        try:
            phase = self.contract.phase_of(request.round)
        except ValueError as error:
            raise RefusalError(str(error)) from None
        needed = adapter.needed_names(self.shapes, phase.trains)
        adapter.check(arrays, {n: self.shapes[n] for n in needed}, "The server's adapter")
        mechanism = accounting.mechanism_of(self.contract, self.plan, request.round)
        # Charged before anything is computed: a failure from here on does not give it back.
        charged = [*self.history, mechanism]
        spent = self._within_budget(charged) if self.contract.privacy.mode == "dp" else None
        self.history = charged
        change = train_round(
            self.contract, phase, mechanism, self.model, self.data, arrays, self.source
        )
        reply = self._reply(
            Message(
                Update(
                    contract=self.contract.hash,
                    site=self.site.name,
                    run=request.run,
                    round=request.round,
                    attempt=request.attempt,
                    epsilon=spent,
                ),
                change,
            )
        )
        self._answered[key] = (digest, reply)
        return reply

    def _within_budget(self, charged: list[accounting.Mechanism]) -> float:
        """Epsilon of `charged`; RefusalError E210 when the filter says that it is too much."""
        p = self.contract.privacy
        bound = accounting.epsilon_at(self.order, charged, p.delta)
        if bound > p.epsilon * (1 + 1e-9):
            raise RefusalError(
                f"One more round would bring ε to {bound:.2f} of {p.epsilon:.2f} at "
                f"δ = {p.delta:g}.",
                code="E210",
            )
        return min(accounting.epsilon(charged, p.delta), p.epsilon)

    def _reply(self, message: Message) -> bytes:
        """The one way out: arrays leave only in an Update, with the contract's names and shapes."""
        header = message.header
        shapes: adapter.Shapes = {}
        if isinstance(header, Update):
            names = adapter.trained_names(
                self.shapes, self.contract.phase_of(header.round).trains
            )
            shapes = {name: self.shapes[name] for name in names}
        adapter.check(message.arrays, shapes, "The reply")
        return messages.pack(message)
