"""The operator's side of a run, without a network: what to ask, what to accept, what to commit.

server/flower/strategy.py carries these bytes over Flower; a single-site baseline calls the worker
directly. Both go through the same checks.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from silotune.common.contract.adapter import Lora
from silotune.common.contract.aggregation import BY_ONE
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.contract.task import signed_score
from silotune.common.errors import ErrorCode, ProtocolError, RunError
from silotune.common.protocol import messages, tensors
from silotune.common.protocol.messages import (
    MASKED,
    Arrays,
    Describe,
    Description,
    Masked,
    Message,
    Refusal,
    Train,
    Update,
)
from silotune.common.signing import verifies
from silotune.server.aggregation import lora, robust
from silotune.server.aggregation import mean as aggregate
from silotune.server.aggregation.server_state import ServerState
from silotune.server.rounds import exchange
from silotune.server.rounds.public_gate import Evaluate, PublicGateCheck
from silotune.server.rounds.secagg import (
    LostSumError,
    MaskedRound,
    ServerMasking,
)
from silotune.server.rounds.update_validation import UpdateValidator
from silotune.server.storage.run_store import RunStore

T = TypeVar("T")
ATTEMPTS = 3


@dataclass(frozen=True)
class RoundRecord:
    """What a committed round was: sites that count, those that failed and why, cost and metrics."""

    round: int
    sites: tuple[str, ...]
    failed: Mapping[str, str]
    epsilon: Mapping[str, float | None]
    bytes_up: int
    bytes_down: int
    seconds: float
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    # site -> metrics; of masked updates only the mean is known, under ""
    released: Mapping[str, Mapping[Metric, float]] = field(default_factory=dict)
    clip_norm: float | None = None  # with adaptive clipping
    residual: float | None = None  # of averaging LoRA's factors apart, where updates can be seen
    declined: str | None = None  # why the sum was not taken (server/rounds/public_gate.py)


class FederatedRun:
    """One run: `describe`, `identify`; then `stages` each round.

    evaluate: adapter, whether it adapts layers -> metrics on the operator's public rows.
    evaluate_every: rounds between evaluations (the last is always one). masking: makes the server's
    side of secure aggregation, where the contract has it.
    """

    def __init__(
        self,
        contract: Contract,
        registry: RunStore,
        run_id: str,
        initial: Arrays,
        *,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
        on_round: Callable[[RoundRecord], None] | None = None,
        masking: Callable[[Contract, str, exchange.RoundTraffic], ServerMasking] = ServerMasking,
    ) -> None:
        self.contract, self.registry, self.run_id = contract, registry, run_id
        self.server_state = ServerState(contract, initial)
        self._evaluate, self._every, self._on_round = evaluate, evaluate_every, on_round
        self._acceptance = PublicGateCheck(contract, evaluate, initial)
        self._open: dict[str, Arrays] = {}
        self._epsilon: dict[str, float | None] = {}
        self._metrics: dict[str, Mapping[Metric, float]] = {}
        self._challenge = secrets.token_hex(32)
        self._digests: dict[int, str] = {}
        self.gate = UpdateValidator(contract, registry, run_id)
        self._began = time.perf_counter()
        self.exchange = exchange.RoundTraffic(contract, self._has_failed)
        self.masking = (
            masking(contract, run_id, self.exchange) if contract.secure_aggregation else None
        )
        self._masked: MaskedRound | None = None
        self._needed: set[str] = set()  # whose masked updates must all be in the round's sum
        self._gave_up = False  # the round before
        self._scores: list[float] = []  # of the last phase, higher is better
        registry.event("run", run=run_id, contract=contract.hash, rounds=contract.rounds)

    @property
    def done(self) -> bool:
        return self.server_state.done

    @property
    def server_round(self) -> int:
        """The open round, or the next one."""
        return self.server_state.server_round

    @property
    def adapter(self) -> Arrays:
        return self.server_state.adapter

    def describe(self) -> bytes:
        header = Describe(contract=self.contract.hash, challenge=self._challenge)
        return messages.pack(Message(header))

    def identify(self, wire: exchange.Reply) -> str:
        """The site that sent a Description; ProtocolError if it is not one of this contract, or not
        signed by the site's key in the roster (where it has one)."""
        header = exchange.read(self.contract, wire).header
        if not isinstance(header, Description):
            raise ProtocolError("The reply is no description.", code=ErrorCode.MESSAGE_MISMATCH)
        public = self.gate.public_key(header.site)
        statement = Description.statement(header.contract, header.site, self._challenge)
        if public is not None and not verifies(public, header.signature, statement):
            raise ProtocolError(
                "The description is not signed by that site's key.", code=ErrorCode.MESSAGE_MISMATCH
            )
        return header.site

    @staticmethod
    def refused(wire: exchange.Reply) -> tuple[str, ErrorCode] | None:
        """The site that a reply says it comes from, and the code by which it refuses; None if it is
        no refusal. Nothing proves the name: it is for people to read."""
        try:
            header = messages.unpack(wire if isinstance(wire, bytes) else b"").header
        except ProtocolError:
            return None
        return (header.site, header.code) if isinstance(header, Refusal) else None

    def stages(self, sites: Collection[str]) -> exchange.RoundProtocol[RoundRecord]:
        """One round with these sites, to be driven by who can reach them (RoundProtocol).

        A masked round that can never be opened, because sites were charged and their updates or
        secrets are lost, is given up: its charges stand, and the run goes on with the next round.
        """
        self.begin()
        if self.masking is None:
            yield from self._train(sites)
            return self.finish()
        note = self.registry.survivors(tensors.digest(self.server_state.request_tensors()))
        self._needed = note or set()
        self._check_needed(sites)
        yield from self._train(sites)
        if not self._enough(self._open) and self._enough(
            uncharged := self._uncharged(sites, self.masking)
        ):
            # Under new keys, without those whose charge for this round was under the old ones.
            for site in list(self._open):
                self.fail(site, ErrorCode.REPLY_LOST)
            self._open.clear()
            yield from self._train(uncharged)
        if not self._enough(self._open):
            if self._is_lost(self.masking):
                return self._give_up(f"updates were charged and lost ({self.exchange.reasons()})")
            raise self._too_few()
        assert self._masked is not None
        begun_with = tensors.digest(self.server_state.request_tensors())
        self.registry.keep_survivors(self.server_round, begun_with, self._open)
        try:
            mean = yield from self._masked.open()
        except LostSumError as error:
            return self._give_up(str(error).removesuffix("."))
        except RunError as error:
            raise self._stopped(str(error), error.code) from None
        return self.finish(mean)

    def _check_needed(self, sites: Collection[str]) -> None:
        """RunError unless all that must be in the round's sum are among these."""
        if missing := self._needed - set(sites):
            raise self._stopped(
                f"{', '.join(sorted(missing))} must take part, for sites may have given shares for "
                "a sum with them from this adapter, and then give none for another set (E220). "
                "Resume the run when all are connected; with --skip-round it goes on without them "
                "if no site has given a share yet.",
                ErrorCode.NO_ANSWER,
            )

    def _too_few(self) -> RunError:
        diverged = sorted(s for s, c in self.exchange.failed.items() if c == ErrorCode.DIVERGED)
        if diverged and self._enough({*self._open, *diverged}):
            return self._diverged(
                f"the updates of {', '.join(diverged)} have values that are not finite or beyond "
                f"{tensors.LARGEST:g}."
            )
        why = (
            f"{len(self._open)} of {len(self.contract.sites)} sites counted "
            f"({self.exchange.reasons()}), the quorum is {self.contract.quorum}."
        )
        if missing := self._needed - set(self._open):
            why += (
                f" {', '.join(sorted(missing))} must be among them: sites may have given shares "
                "for a sum with them from this adapter, and then give none for another set (E220)."
            )
        failed = sorted(self.exchange.failed.items())
        spent = [site for site, code in failed if code == ErrorCode.BUDGET_EXCEEDED]
        if spent and self.server_round > 1:
            why += (
                f" {', '.join(spent)} will refuse this round again (E210): with --skip-round the "
                "resumed run goes on without it."
            )
        return self._stopped(why, ErrorCode.NO_ANSWER)

    def _diverged(self, what: str) -> RunError:
        return self._stopped(
            f"training diverged: {what} Lower head_lr and adapter_lr in the contract's [[phases]].",
            ErrorCode.DIVERGED,
        )

    def _enough(self, sites: Collection[str]) -> bool:
        """Whether a sum of these sites counts."""
        return len(sites) >= self.contract.quorum and self._needed <= set(sites)

    def _uncharged(self, sites: Collection[str], masking: ServerMasking) -> list[str]:
        """The sites that were not charged under this agreement and can take part under another one:
        they have no secrets of it, are new, or refuse a sum of its members."""
        failed = self.exchange.failed
        return [
            site
            for site in sites
            if failed.get(site) != ErrorCode.REPLY_LOST
            and (
                site in masking.lost
                or site not in masking.members
                or failed.get(site) == ErrorCode.SITE_SET_REFUSED
            )
        ]

    def _is_lost(self, masking: ServerMasking) -> bool:
        """Whether no later try of this round can bring enough updates together: under these keys
        sites that have lost their secrets or were charged are missing for good, under other keys
        all that were charged."""
        charged = {
            site for site, code in self.exchange.failed.items() if code == ErrorCode.REPLY_LOST
        }
        same_keys = set(masking.members) - masking.lost
        other_keys = set(self.contract.weights()) - set(self._open) - charged
        return not self._enough(same_keys) and not self._enough(other_keys)

    def _give_up(self, why: str) -> RoundRecord:
        """Go on without the open round. RunError if the round before it was given up, too: whoever
        loses every round would have the run spend all its ε on nothing."""
        if self._gave_up:
            raise self._stopped(
                f"this round and the one before it are lost: {why}. Find out why sites fail after "
                "they were charged; resumed, the run goes on without this round.",
                ErrorCode.NO_ANSWER,
            )
        self._gave_up = True
        return self._leave_out(why)

    def _train(self, sites: Collection[str]) -> exchange.RoundProtocol[None]:
        """Agree on keys where that is needed, and have the sites train."""
        asked = list(sites)
        if self.masking is not None:
            agreeing = self.masking.agree(sites, self.server_round, self._needed)
            if (yield from self._or_stop(agreeing)):
                self.registry.keep_agreement(self.masking.agreed())
                self.registry.event("agreed", round=self.server_round, sites=self.masking.members)
            self._digests = {}  # of the agreement before
            self._check_needed(self.masking.members)
            asked = [
                site
                for site in sites
                if site in self.masking.members and (not self._needed or site in self._needed)
            ]
            assert self.masking.agreement is not None
            self._masked = MaskedRound(
                self.contract,
                self.masking.agreement,
                self.server_round,
                self.server_state.sent_shapes,
                self.digest(),
                self.exchange,
            )
            yield from self._ask(asked, 1)
            silent = [s for s in asked if self.exchange.failed.get(s) in exchange.NO_REPLY_CODES]
            if silent and not self._enough(self._open):
                # The same bytes again cost nothing; a site says so if it was charged and lost them.
                yield from self._ask(silent, 1)
            return
        for attempt in range(1, ATTEMPTS + 1):
            yield from self._ask(asked, attempt)
            asked = self._lost()
            if not asked:
                break

    def _ask(self, sites: Collection[str], attempt: int) -> exchange.RoundProtocol[None]:
        """Have these sites train, and take what they reply."""
        wires = {site: self.request(site, attempt) for site in sites}
        came = yield wires
        for site, wire in wires.items():
            self.accept(site, len(wire), came.get(site, exchange.SILENT), attempt)

    def _lost(self) -> list[str]:
        """Sites that lost a charged reply in a crash and are needed for the quorum: another attempt
        is a new charge, which they pay or refuse. Only without masks."""
        missing = self.contract.quorum - len(self._open)
        lost = sorted(
            site for site, code in self.exchange.failed.items() if code == ErrorCode.REPLY_LOST
        )
        return lost[:missing] if 0 < missing <= len(lost) else []

    def _or_stop(self, stages: exchange.RoundProtocol[T]) -> exchange.RoundProtocol[T]:
        try:
            return (yield from stages)
        except RunError as error:
            raise self._stopped(str(error), error.code) from None

    def begin(self) -> None:
        """Open the round: its clock starts, no site has answered."""
        self._open, self._epsilon, self._metrics, self._masked = {}, {}, {}, None
        self._digests, self._needed = {}, set()
        self.exchange.begin()
        self._began = time.perf_counter()

    def request(self, site: str, attempt: int = 1) -> bytes:
        """The bytes a site gets this round: the same for all, but for its own last receipt and the
        shares that are sealed for it."""
        header, arrays = self._asked()
        own = header.model_copy(
            update={"receipt": self.gate.last_receipt(site), "attempt": attempt}
        )
        sealed = self.masking.sealed(site) if self.masking else {}
        return messages.pack(Message(own, arrays, sealed))

    def _asked(self) -> tuple[Train, Arrays]:
        """What this round asks of every site alike."""
        header = Train(
            contract=self.contract.hash,
            run=self.run_id,
            round=self.server_round,
            clip_norm=self.server_state.clip_norm if self.contract.privacy.adaptive else None,
            agreement=self.masking.transcript if self.masking else None,
        )
        return header, self.server_state.request_tensors()

    def digest(self, attempt: int = 1) -> str:
        """Of what this round asks of every site alike, in that attempt."""
        if attempt not in self._digests:
            header, arrays = self._asked()
            asked = header.model_copy(update={"attempt": attempt})
            self._digests[attempt] = messages.digest(asked, arrays)
        return self._digests[attempt]

    def accept(self, site: str, sent: int, reply: exchange.Reply, attempt: int = 1) -> None:
        """Take one site's reply, or note why it does not count. Never raises for a bad reply.

        sent: bytes that went down to the site. attempt: which one it was asked for.
        """
        self.exchange.count(sent, reply)
        try:
            message = exchange.read(self.contract, reply)
            update = self.gate.check(
                message,
                site,
                self.server_round,
                attempt,
                self.digest(attempt),
                self.server_state.sent_shapes,
            )
            if site in self._open:
                raise ProtocolError("The site answered twice.", code=ErrorCode.MESSAGE_MISMATCH)
            if isinstance(update, Masked):
                self._take_masked(site, update, message.blobs)
        except ProtocolError as error:
            self.fail(site, error.code)
        else:
            self._open[site] = message.arrays
            self._epsilon[site] = update.epsilon
            if isinstance(update, Update):
                self._metrics[site] = update.metrics
            self.exchange.failed.pop(site, None)

    def fail(self, site: str, code: ErrorCode) -> None:
        """Note that a site does not count this round, with the code of the reason."""
        self.exchange.fail(site, code)

    def _has_failed(self, site: str, code: ErrorCode) -> None:
        self.registry.event("rejected", round=self.server_round, site=site, code=code)
        if self.masking is not None:
            self.masking.has_failed(site, code)

    def _stopped(self, why: str, code: ErrorCode) -> RunError:
        self.registry.event(
            "stopped", round=self.server_round, code=code, why=why, failed=self.exchange.failed
        )
        return RunError(
            f"Run stopped at round {self.server_round}: {why} No adapter released; ε counted for "
            "what was computed.",
            code=code,
        )

    def finish(self, mean: tuple[Arrays, Mapping[Metric, float]] | None = None) -> RoundRecord:
        """Aggregate, step, commit. RunError below the quorum: nothing is committed then.

        mean: of masked updates and their metrics.
        """
        if len(self._open) < self.contract.quorum:
            raise self._too_few()
        residual = None
        if mean is None:
            weights = self.contract.weights()
            change = self._combined(weights)
            settings = self.contract.aggregation
            if (
                self.server_state.phase.adapts
                and settings.method not in BY_ONE
                and not settings.robust
            ):
                residual = lora.residual(self.adapter, self._open, weights)
            figures: Mapping[Metric, float] = aggregate.mean_figures(
                self._metrics, weights, self.contract.metric_ranges
            )
        else:
            change, figures = mean
            self._metrics = {"": figures}
        clip_norm = self.server_state.clip_norm if self.contract.privacy.adaptive else None
        try:
            declined = self.server_state.step(
                change, figures, self._acceptance.rejection_reason, present=self._present()
            )
        except ProtocolError as error:
            raise self._diverged(str(error)) from None
        metrics: Mapping[str, float | None] = {}
        if self._evaluate and (self.server_state.final or self.server_round % self._every == 0):
            adapter_active = self.server_state.phase.adapts
            metrics = self._evaluate(self.released(), adapter_active)
            if self._stalled(metrics):
                self.server_state.end()
                metrics = self._evaluate(self.released(), adapter_active)
        facts = RoundRecord(
            self.server_round,
            tuple(sorted(self._open)),
            {s: c for s, c in self.exchange.failed.items() if s not in self._open},
            dict(self._epsilon),
            self.exchange.bytes_up,
            self.exchange.bytes_down,
            time.perf_counter() - self._began,
            metrics,
            dict(self._metrics),
            clip_norm,
            residual,
            declined,
        )
        self._gave_up = False
        if declined is not None:
            self.registry.event("declined", round=self.server_round, why=declined)
        self._commit(facts)
        return facts

    def _present(self) -> float:
        """The share of all weights whose sites count; exactly 1 where all do."""
        weights = self.contract.weights()
        return sum(weights[s] for s in weights if s in self._open) / sum(weights.values())

    def _combined(self, weights: Mapping[str, float]) -> Arrays:
        """The change that the contract's method makes of the sites' updates."""
        settings = self.contract.aggregation
        if settings.robust:
            return robust.combined(self._open, settings.robust)
        mean = aggregate.weighted_mean(self._open, weights)
        if settings.method == "flexlora":
            return lora.flex_change(self.adapter, self._open, weights, mean)
        if settings.method == "fedex":
            spec = self.contract.adapter
            assert isinstance(spec, Lora)
            return lora.exact_change(self.adapter, self._open, weights, mean, spec.scale)
        return mean

    def _stalled(self, metrics: Mapping[str, float | None]) -> bool:
        """Whether the contract's metric on public rows has not been better for long enough."""
        stop = self.contract.aggregation.early_stop
        if stop is None or not self.server_state.in_last_phase:
            return False
        value = metrics.get(stop.metric)
        if value is not None:
            scored = signed_score(stop.metric, value)
            if scored > max(self._scores, default=-math.inf):
                self.server_state.keep_best()
            self._scores.append(scored)
        before, latest = self._scores[: -stop.patience], self._scores[-stop.patience :]
        return bool(before) and max(latest) <= max(before)

    def _commit(self, facts: RoundRecord) -> None:
        self.registry.commit(
            self.server_round,
            self.adapter,
            self.server_state.state(),
            vars(facts) | self.server_state.standing() | {"scores": self._scores},
        )
        scored = {"metrics": facts.metrics} if facts.metrics else {}
        self.registry.event("committed", round=self.server_round, sites=facts.sites, **scored)
        self._go_on()
        if self._on_round:
            self._on_round(facts)

    def _go_on(self) -> None:
        if self.server_state.final:
            self.registry.release(self.released())
            self.registry.event("released", round=self.server_round)
        self.server_state.next()

    def restore(self) -> int:
        """Go on after the last round that was committed whole, under the agreement on keys that was
        in force; returns its number, 0 if there is none."""
        found = self.registry.newest()
        if self.masking is not None:
            self.masking.restore(self.registry.agreement())
        if found is None:
            return 0
        self._scores = list(found.facts.get("scores", []))
        self.server_state.restore(found.server_round, found.adapter, found.state, found.facts)
        self.registry.event("resumed", after=found.server_round)
        self._go_on()
        return found.server_round

    def skip(self) -> RoundRecord:
        """Go on without the next round, because the operator says so. Whose sum it was to be is
        forgotten: if sites have given shares for it, they refuse another set by themselves."""
        self.begin()
        self.registry.forget_survivors()
        self.exchange.failed = dict.fromkeys(self.contract.weights(), ErrorCode.NO_ANSWER)
        return self._leave_out("the operator left it out")

    def _leave_out(self, why: str) -> RoundRecord:
        """Commit the open round without an update; what it cost its sites stays spent."""
        facts = RoundRecord(
            self.server_round,
            (),
            dict(self.exchange.failed),
            dict(self._epsilon),
            self.exchange.bytes_up,
            self.exchange.bytes_down,
            time.perf_counter() - self._began,
        )
        self.registry.event("skipped", round=self.server_round, why=why)
        self._commit(facts)
        return facts

    def released(self) -> Arrays:
        return self.server_state.released()

    def _take_masked(self, site: str, update: Masked, blobs: messages.Blobs) -> None:
        assert self.masking is not None
        assert self._masked is not None
        if set(blobs) != {MASKED} or update.agreement != self.masking.transcript:
            raise ProtocolError(
                "The update is masked for another agreement.", code=ErrorCode.MESSAGE_MISMATCH
            )
        self._masked.take(site, blobs[MASKED])
        self.masking.has_answered(site)
