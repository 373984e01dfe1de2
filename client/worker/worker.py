"""The worker: the process that holds a site's records and answers a closed set of requests.

`handle` takes and gives bytes (common/protocol/messages.py). It never raises: what goes wrong
inside leaves the site as a code and a random incident id, and is written to the site's own log
only.

A round in order: the request is checked, the ledger is charged, the round is computed, the reply's
bytes are made durable, the ledger notes their release, they leave. A crash anywhere before the last
step leaves the charge standing and nothing outside.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain

from silotune.client.privacy import accountant, budget
from silotune.client.privacy.accountant import Mechanism
from silotune.client.privacy.budget import Budget, Limit
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged, PlannedSteps
from silotune.client.privacy.reply_store import ReplyStore
from silotune.client.privacy.site_sets import SiteSets
from silotune.client.records import record_ids
from silotune.client.site import signed_policy
from silotune.client.site.policy import Policy
from silotune.client.training import dataset, selftest
from silotune.client.training.local_round import train_round
from silotune.client.training.local_state import NOTHING, LocalState
from silotune.client.training.noise import NoiseSource
from silotune.client.worker import release
from silotune.client.worker.request_outcome import Answered
from silotune.client.worker.secagg import SiteMasking, check_bound
from silotune.common.contract.adapter import Lora
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import epsilon_text
from silotune.common.contract.schedule import RoundPlan
from silotune.common.data import records
from silotune.common.errors import ErrorCode, ProtocolError, RefusalError
from silotune.common.models.base import Network
from silotune.common.models.factory import build
from silotune.common.protocol import messages, tensors
from silotune.common.protocol.messages import (
    Agree,
    Arrays,
    Describe,
    Endorse,
    Endorsement,
    Keys,
    Message,
    Reveal,
    Revealed,
    Share,
    Shares,
    Train,
)
from silotune.common.signing import Sign

ADAPTER_COPIES = 6  # a reply with its correction; an own adapter, copies and a mean gradient


class Worker:
    """One site, one contract. Records, model and ledger are read once and stay in it.

    insecure_seed: for simulations and tests only (client/training/noise.py), so the ledger must
    then be in memory: RefusalError E203. on_answer: is told of
    each request before its reply leaves, and must not raise. lane: workers of one process that
    answer at the same time need models of their own (common/models/factory.py). masking: makes the
    site's side of secure aggregation, where the contract has it; another one is a malicious site's.
    """

    def __init__(
        self,
        policy: Policy,
        contract: Contract,
        ledger: PrivacyLedger,
        *,
        insecure_seed: int | None = None,
        on_answer: Callable[[Answered], object] | None = None,
        lane: int = 0,
        masking: Callable[[Contract, str, Sign], SiteMasking] = SiteMasking,
    ) -> None:
        if insecure_seed is not None and ledger.folder is not None:
            raise RefusalError(
                "insecure_seed makes noise that anyone can remove: leave it out, or use a ledger "
                "in memory.",
                code=ErrorCode.DP_REQUIRED,
            )
        for refusal in policy.refusals(contract):
            raise refusal
        key = next(site.public_key for site in contract.sites if site.name == policy.name)
        identity = ledger.identity
        if None not in (key, identity.public) and key != identity.public:
            raise RefusalError(
                "The contract names another key for this site.",
                code=ErrorCode.CONTRACT_NOT_ACCEPTED,
            )
        self.policy, self.contract, self.ledger = policy, contract, ledger
        self.identity, self.replies = identity, ReplyStore(ledger)
        self.adopted = ledger.policy
        self.unit, self.target = contract.privacy.unit, policy.target(contract)
        self.limit = policy.limits[self.unit]
        self.plan = budget.planned(ledger, contract, self.target)
        self.rounds = accountant.by_round(contract, self.plan)
        # Once: a charge waits for it otherwise. By the number of rounds before the phase.
        firsts = accumulate((phase.rounds for phase in contract.phases), initial=0)
        self._steps_of_phase = {
            first: Counter(self.rounds[first : first + phase.rounds])
            for first, phase in zip(firsts, contract.phases, strict=False)
        }
        self._named_plan = tuple(
            PlannedSteps(**mechanism._asdict())
            for mechanism in (self.plan if contract.privacy.mode == "dp" else ())
        )
        check_bound(contract, self.plan)
        self.masking: SiteMasking | None = None
        if contract.secure_aggregation is not None:
            if key != identity.public:
                raise RefusalError(
                    "This site's key is not in the contract's roster.",
                    code=ErrorCode.CONTRACT_NOT_ACCEPTED,
                )
            self.masking = masking(contract, policy.name, identity.sign)
        self.site_sets = SiteSets(ledger, contract.hash, policy.permits.set_changes)
        # Fixed before the first request, so that the stop below holds for an adaptive server.
        self._first_order = budget.order_of(self.plan, self.limit)
        self.source = NoiseSource(site=policy.name, insecure_seed=insecure_seed)
        # Once: what is fingerprinted is what is trained on.
        table = records.named_by(contract, policy.data.table())
        self.record_set = record_ids.of_table(table, policy.data.key, identity.fingerprint_key)
        narrowed = contract.at(policy.name)
        self.model: Network = build(narrowed, policy.model.folder, policy.performance, lane)
        self.data = dataset.load(table, contract, self.model)
        policy.check_records(self.record_set, self.unit, ledger)
        selftest.check(contract, self.model)
        self.source_name = table.source
        self.budget = Budget(ledger, self.record_set, self.unit)
        if not any(charge.contract == contract.hash for charge in ledger.charges.values()):
            self._check_plan("This contract's plan", policy)
        self.own_shapes = self.shapes = tensors.shapes_of(self.model.initial_arrays())
        if isinstance(contract.adapter, Lora):
            self.shapes = tensors.reshaped(self.own_shapes, contract.adapter.rank)
        # A reply and what stays here are each at most some copies of the adapter in float32.
        entries = sum(math.prod(shape) for shape in self.own_shapes.values())
        self._reply_room = 4 * ADAPTER_COPIES * entries
        self._lock, self._on_answer = threading.Lock(), on_answer

    @property
    def order(self) -> float:
        return self.ledger.order or self._first_order

    def handle(self, wire: bytes) -> bytes:
        """Answer one request. The same request gets the same bytes back, at no further cost."""
        began, request = time.monotonic(), None
        try:
            request = messages.unpack(wire)
            reply = self._answer(request)
        except Exception as error:  # whatever it is, it must not leave the site
            reply = release.refusal(self.contract, self.policy.name, error)
        if self._on_answer is not None:
            header = request.header if request is not None else None
            self._on_answer(Answered.of(header, reply, time.monotonic() - began))
        return reply

    def _answer(self, request: Message) -> bytes:
        if request.header.contract != self.contract.hash:
            raise RefusalError(
                "The request is for another contract.", code=ErrorCode.CONTRACT_NOT_ACCEPTED
            )
        if isinstance(request.header, Describe):
            return release.description(
                self.contract, self.policy.name, request.header.challenge, self.identity.sign
            )
        if isinstance(request.header, Train):
            with self._lock:
                return self._train_once(request)
        if self.masking is not None:
            with self._lock:
                return self._unmask_step(request)
        raise ProtocolError("The message is no request.")

    def _unmask_step(self, message: Message) -> bytes:
        """The stages of secure aggregation in which no record has any part."""
        request, masking = message.header, self.masking
        assert masking is not None
        kind: type[Keys | Shares | Endorsement | Revealed]
        if isinstance(request, Agree):
            kind, blobs = Keys, masking.keys(request)
        elif isinstance(request, Share):
            kind, blobs = Shares, masking.shares(request, message.blobs)
        elif isinstance(request, Endorse | Reveal):
            if isinstance(request, Endorse):
                kind, blobs = Endorsement, masking.endorsement(request)
            else:
                kind, blobs = Revealed, masking.revealed(request, message.blobs)
            # Durable before anything that could help to open the sum leaves.
            run = masking.run_of(request.agreement)
            self.site_sets.settle(run, request.round, request.survivors)
        else:
            raise ProtocolError("The message is no request.")
        return release.step(self.contract, self.policy.name, kind, blobs)

    def _train_once(self, message: Message) -> bytes:
        request, arrays = message.header, message.arrays
        assert isinstance(request, Train)
        if request.receipt is not None:
            self.ledger.check_receipt(request.receipt)
        # Receipt and shares may change from one sending to the next; what is asked does not.
        digest = messages.digest(request, arrays)
        try:
            plan = self.contract.round_plan(request.round)
        except ValueError as error:
            raise RefusalError(str(error)) from None
        self._check_arrays(plan, arrays)
        asked = tensors.pad_or_truncate_rank(arrays, self.own_shapes)
        clip_norm = self._clip_norm(request)
        charge, own = self._charge(request, plan, arrays, message.blobs, digest)
        if isinstance(own, bytes):
            return own
        change, metrics = train_round(
            self.contract,
            plan,
            budget.mechanism_of(charge),
            self.model,
            self.data,
            asked,
            self.source,
            clip_norm,
            own,
        )
        stay = tensors.trained_names(change, plan.stays)
        sent = {name: array for name, array in change.items() if name not in stay}
        reply = release.update(
            self.contract,
            self.policy.name,
            charge,
            tensors.pad_or_truncate_rank(sent, self.shapes),
            metrics,
            self.shapes,
            epsilon=self._run_epsilon(request.run),
            receipt=self.ledger.receipt(),
            sign=self.identity.sign,
            agreement=request.agreement,
            mask=partial(self.masking.mask, request, digest) if self.masking else None,
        )
        kept = None
        if self.contract.keeps:
            kept = own.after(plan, asked, change).content()
        self.replies.release(charge, reply, kept)
        return reply

    def local_state(self, run: str, before: int) -> LocalState:
        """What a run has left here before a round. RefusalError E212 if it is no longer there."""
        if not self.contract.keeps:
            return NOTHING
        charges = [charge for charge in self._run_charges(run) if charge.round < before]
        found = LocalState.read(self.replies.local_state(charges))
        # A mean gradient of longer ago is not what the server's is of.
        return found if found.round == before - 1 else replace(found, gradient={})

    def _check_arrays(self, plan: RoundPlan, arrays: Arrays) -> None:
        """ProtocolError E502 unless they are what the round needs: the adapter's, and with scaffold
        all or none of the mean gradients."""
        needed = {
            n: self.shapes[n] for n in tensors.needed_names(self.shapes, adapts=plan.phase.adapts)
        }
        if plan.phase.drift_correction and any(name.startswith(tensors.CONTROL) for name in arrays):
            trained = tensors.trained_names(self.shapes, plan.sends)
            needed |= {tensors.CONTROL + name: self.shapes[name] for name in trained}
        tensors.check(arrays, needed, "The server's adapter")

    def _clip_norm(self, request: Train) -> float:
        """What to clip to. Any norm is as private as any other; the owner's limit bounds it."""
        p, asked = self.contract.privacy, request.clip_norm
        if (asked is not None) != (p.adaptive is not None):
            raise RefusalError("The request's clip norm is not what the contract says.")
        if p.adaptive is None or asked is None:
            return p.clip_norm
        if not p.adaptive.min_clip_norm <= asked <= p.adaptive.max_clip_norm:
            raise RefusalError("The request's clip norm is outside the contract's bounds.")
        return asked

    def _charge(
        self,
        request: Train,
        plan: RoundPlan,
        arrays: Arrays,
        shares: messages.Blobs,
        digest: str,
    ) -> tuple[Charged, LocalState | bytes]:
        """The charge for a request, and what the run left here before it; or the charge it had
        before, with its reply. Raises RefusalError.

        In one transaction: what is spent is read, checked and written with nobody in between.
        """
        with self.ledger.writing():
            charge = self._charged_before(request)
            if charge is not None:
                return charge, self._reply_of(charge, request, digest)
            policy = self._policy_for(request.run)
            adapter_sha256 = None
            if self.masking is not None:
                self.masking.check(request, shares)
                assert request.agreement is not None
                adapter_sha256 = tensors.digest(arrays)
                self.site_sets.check_members(
                    request.run,
                    request.round,
                    adapter_sha256,
                    self.masking.members_of(request.agreement),
                    policy.permits.set_changes,
                )
            elif request.agreement is not None or shares:
                raise RefusalError("The contract's updates are not masked.")
            charges = self._run_charges(request.run)
            mechanism = self._check_run(request.run, plan, charges, policy)
            own = self.local_state(request.run, request.round)  # refused before anything is charged
            self.replies.check_room(self._reply_room)
            return self.ledger.charge(
                self.record_set,
                source=self.source_name,
                unit=self.unit,
                contract=self.contract.hash,
                run=request.run,
                round=request.round,
                attempt=request.attempt,
                request=digest,
                order=self.order,
                noise_multiplier=mechanism.noise_multiplier,
                sampling_rate=mechanism.sampling_rate,
                steps=mechanism.steps,
                plan=() if charges else self._named_plan,
                adapter=adapter_sha256,
            ), own

    def _charged_before(self, request: Train) -> Charged | None:
        """The charge for this round and attempt; with masks for this round, whatever the attempt:
        two updates of one round in two sums of different sites would lay their difference open."""
        if self.masking is None:
            key = (self.contract.hash, request.run, request.round, request.attempt)
            return self.ledger.charges.get(key)
        charges = self._run_charges(request.run)
        return next((charge for charge in charges if charge.round == request.round), None)

    def _reply_of(self, charge: Charged, request: Train, digest: str) -> bytes:
        """The reply that a charge paid for. RefusalError E202 or, with masks, E204 if it answers
        another request; E204 if it was lost."""
        masked = self.masking is not None
        if charge.request != digest and not masked:
            raise RefusalError(f"Round {request.round} was already asked with other bytes.")
        if charge.request != digest:
            raise RefusalError(
                f"Round {request.round} was charged for another request (entry {charge.sequence}). "
                "Under [secure_aggregation] a site charges a round once, whatever the attempt: "
                "the charge stands, and the run goes on with the next round.",
                code=ErrorCode.REPLY_LOST,
            )
        released = self.ledger.releases.get(charge.sequence)
        if released is None:
            raise RefusalError(
                f"Entry {charge.sequence} was charged and its reply lost before it left. The "
                "charge stands; "
                + (
                    "under [secure_aggregation] the run goes on with the next round."
                    if masked
                    else "another attempt is a new charge."
                ),
                code=ErrorCode.REPLY_LOST,
            )
        return self.replies.reply(released)

    def _policy_for(self, run: str) -> Policy:
        """What the next round of `run` is held to, beside the policy this worker started with: the
        one that the owner signed last.

        A run that has a charge here goes on under a later signature as far as the later policy
        permits it: its refusals, least number of records, limits and ε for a run hold at once.
        What it permits beyond the earlier one counts after the next start only.

        Raises:
            RefusalError: E213 for a run that has not begun here, or if the later policy names other
                records; else the later policy's own refusal of the contract.
            DataError: E304, E307 if the later policy does not accept the records.
        """
        if self.ledger.policy == self.adopted:
            return self.policy
        if not self._run_charges(run):
            raise RefusalError(
                "The owner has signed another policy since this worker started, and this run has "
                "not begun here. Start the worker again.",
                code=ErrorCode.POLICY_NOT_SIGNED,
            )
        later = signed_policy.adopted(self.ledger).for_worker_of(self.policy)
        for refusal in later.refusals(self.contract):
            raise refusal
        later.check_records(self.record_set, self.unit, self.ledger)
        return later

    def _check_run(
        self, run: str, asked: RoundPlan, charges: list[Charged], policy: Policy
    ) -> Mechanism:
        """The mechanism for a round. RefusalError E210 unless it is a step of the run's plan that
        was not taken, and fits, with all that was ever charged, the limits for these records; a
        run's first, unless its whole plan does.

        charges: of the run so far. policy: holds beside the one that this worker started with
        (`_policy_for`). Where it has a smaller ε for a run, the run ends unless its whole plan fits
        that: a server chooses which steps of a plan come first, and stopping at the exact ε of
        those taken so far is no valid filter (client/privacy/budget.py). Nothing more leaves, so
        nothing about the smaller ε is left to prove.
        """
        if self.contract.privacy.mode == "none":
            return self.rounds[asked.server_round - 1]
        if charges and charges[0].plan != self._named_plan:
            # The plan would be another one, chosen after replies were seen.
            raise RefusalError(
                f"Run {run} began at another noise: [run] in site.toml has changed "
                "since. Put it back, or let the server start another run.",
                code=ErrorCode.POLICY_NOT_SIGNED,
            )
        mechanism = self._step_left(asked, charges)
        so_far = [budget.mechanism_of(charge) for charge in charges]
        epsilon = policy.target(self.contract).epsilon
        cost = accountant.plan_epsilon(self.plan, self.target.delta)
        if cost > epsilon * budget.ROUNDING:
            raise RefusalError(
                f"Run {run} began with a plan of ε = {epsilon_text(cost)} ({accountant.EXACT}, δ = "
                f"{self.target.delta:g}); the owner has since signed {epsilon_text(epsilon)} as "
                "[run] epsilon of site.toml. Sign the former value again, or let the server start "
                "another run.",
                code=ErrorCode.BUDGET_EXCEEDED,
            )
        if not charges:
            self._check_plan("This run's plan", policy)
        then = accountant.left_of(self.plan, [*so_far, mechanism]) or ()
        for limit in self._limits(policy):
            self.budget.check([mechanism], self.plan, self.order, limit, "This round", then)
        return mechanism

    def _step_left(self, asked: RoundPlan, charges: list[Charged]) -> Mechanism:
        """The step that a round takes: its own or, where earlier attempts have taken that, another
        one of its phase that no charge of the run has taken. RefusalError E210 if there is none."""
        first, rounds = asked.server_round - asked.round_in_phase, asked.phase.rounds
        taken = Counter(
            budget.mechanism_of(charge) for charge in charges if 0 < charge.round - first <= rounds
        )
        own = asked.round_in_phase - 1
        for place in chain(range(own, rounds), range(own)):
            mechanism = self.rounds[first + place]
            if taken[mechanism] < self._steps_of_phase[first][mechanism]:
                return mechanism
        raise RefusalError(
            f"Round {asked.server_round} has no step left: earlier attempts took all that the "
            "plan of this run has for the phase. The operator can let the run go on without this "
            "round: silotune server resume RUN --skip-round.",
            code=ErrorCode.BUDGET_EXCEEDED,
        )

    def _check_plan(self, what: str, policy: Policy) -> None:
        for limit in self._limits(policy):
            self.budget.check_plan(self.plan, self.order, limit, what)

    def _limits(self, policy: Policy) -> list[Limit]:
        """What holds for these records over their lifetime."""
        if self.contract.privacy.mode == "none":
            return []
        return list(dict.fromkeys((self.limit, policy.limits[self.unit])))

    def _run_charges(self, run: str) -> list[Charged]:
        return [
            charge
            for charge in self.ledger.charges.values()
            if (charge.contract, charge.run) == (self.contract.hash, run)
        ]

    def _run_epsilon(self, run: str) -> float | None:
        """What this run has spent of the contract's ε: a function of its requests alone."""
        if self.contract.privacy.mode == "none":
            return None
        history = [budget.mechanism_of(charge) for charge in self._run_charges(run)]
        return accountant.plan_epsilon(history, self.target.delta)
