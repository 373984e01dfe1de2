"""A site's side of secure aggregation: its agreements, in memory only.

What the contract and the owner ask for holds whatever the server says: threshold, colluders and
quorum come from the contract that the policy permits, never from a message. A worker that starts
again has no agreement: requests that name one of before are refused (E506).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from silotune.client.privacy.accountant import Mechanism, by_round
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.errors import ErrorCode, ProtocolError, RefusalError
from silotune.common.protocol import packing
from silotune.common.protocol.messages import (
    Agree,
    Arrays,
    Blobs,
    Endorse,
    Reveal,
    Share,
    Train,
)
from silotune.common.secagg.participant import SecAggParticipant
from silotune.common.signing import Sign

MOST_AGREEMENTS = 4  # stored at a time: others give way, so a server's asking costs no memory
SPREADS = 8.0  # standard deviations of the noise that must fit into the bound
FINENESS = 4.0  # units of the ring that the noise's standard deviation must have


class SiteMasking:
    """The agreements of one site under one contract."""

    def __init__(self, contract: Contract, name: str, sign: Sign) -> None:
        self.contract, self.name, self._sign = contract, name, sign
        self._members: dict[
            tuple[str, int, int], SecAggParticipant
        ] = {}  # by run, first round, attempt

    def keys(self, request: Agree) -> Blobs:
        """This site's signed public keys; the same ones when it is asked again."""
        try:
            self.contract.round_plan(request.round)
        except ValueError as error:
            raise RefusalError(str(error)) from None
        step = request.run, request.round, request.attempt
        if step not in self._members:
            terms = self.contract.terms(*step)
            while len(self._members) >= MOST_AGREEMENTS:
                # A round that was charged stays to be opened while another agreement can go.
                spare = (s for s, m in self._members.items() if not m.has_unopened_round)
                self._members.pop(next(spare, next(iter(self._members))))
            self._members[step] = SecAggParticipant(terms, self.name, self._sign)
        return {self.name: self._members[step].keys}

    def shares(self, request: Share, keys: Blobs) -> Blobs:
        """The shares of this site's secrets, sealed for each other member."""
        member = self._members.get((request.run, request.round, request.attempt))
        if member is None:
            raise _unknown()
        return member.shares(keys)

    def check(self, request: Train, shares: Blobs) -> None:
        """ProtocolError unless the round can be masked. Takes in the other members' shares."""
        member = self._member(request.agreement)
        if member.terms.run != request.run:
            raise ProtocolError(
                "The agreement on keys is of another run.", code=ErrorCode.SECAGG_STEP_REFUSED
            )
        if not member.ready:
            member.receive(shares)
        member.check_can_mask(request.round)

    def mask(
        self, request: Train, digest: str, change: Arrays, metrics: dict[Metric, float]
    ) -> bytes:
        """The masked update [3 bytes an entry]. E502 if an entry is beyond the contract's bound.

        digest: messages.digest of the request, so that masks cancel only among equal requests.
        """
        member = self._member(request.agreement)
        factor = packing.factor(self.contract, self.contract.weight_share(self.name))
        return member.mask(
            request.round,
            packing.join(self.contract, change, metrics),
            factor,
            packing.bound(self.contract),
            bytes.fromhex(digest),
        )

    def run_of(self, agreement: str) -> str:
        """The run that an agreement is for. RefusalError E506 if there are no secrets of it."""
        return self._member(agreement).terms.run

    def members_of(self, agreement: str) -> tuple[str, ...]:
        """The sites of an agreement. RefusalError E506 if there are no secrets of it."""
        found = self._member(agreement).agreement
        assert found is not None
        return found.members

    def endorsement(self, request: Endorse) -> Blobs:
        member = self._member(request.agreement)
        return {self.name: member.endorse(request.round, request.survivors)}

    def revealed(self, request: Reveal, signatures: Blobs) -> Blobs:
        member = self._member(request.agreement)
        return member.reveal(request.round, request.survivors, signatures)

    def _member(self, transcript: str | None) -> SecAggParticipant:
        for member in self._members.values():
            if member.agreement and member.agreement.transcript.hex() == transcript:
                return member
        raise _unknown()


def _unknown() -> RefusalError:
    return RefusalError(
        "There are no secrets here of the agreement that the request names.",
        code=ErrorCode.SECAGG_SECRETS_LOST,
    )


def check_bound(contract: Contract, plan: Sequence[Mechanism]) -> None:
    """RefusalError E205 if secure_aggregation.bound does not fit the noise of this plan: updates
    would be cut off at it, or be lost in the ring's rounding."""
    if contract.secure_aggregation is None or contract.privacy.mode == "none":
        return
    bound, first, rounds = contract.secure_aggregation.bound, 0, by_round(contract, plan)
    for phase in contract.phases:  # with noise_decay the first round of a phase has most noise
        mechanism = rounds[first]
        first += phase.rounds
        clip = contract.privacy.largest_clip_norm
        divisor = contract.privacy.expected_units * mechanism.sampling_rate
        noise = mechanism.noise_multiplier / math.sqrt(1 - contract.released_share) * clip / divisor
        rates = [rate for rate in (phase.head_lr, phase.adapter_lr) if rate is not None]
        gradients = 3 if phase.drift_correction else 1  # with a correction: two mean gradients more
        if phase.adam is None:
            least = min(rates) * noise
            spread = SPREADS * mechanism.steps**0.5 * noise
            largest = gradients * max(rates) * (mechanism.steps * clip + spread)
        else:  # a step is its rate, or where the signal is below the floor the noise over the floor
            least = min(rates)
            largest = max(rates) * mechanism.steps * (1 + SPREADS * noise / phase.adam.floor)
        lowest = min(contract.weight_share(site.name) for site in contract.sites)
        widest = least / FINENESS * packing.factor(contract, lowest) * bound
        if not largest <= bound <= widest:
            raise RefusalError(
                f"secure_aggregation.bound = {bound:g} does not fit this plan's updates and "
                f"noise: it must be between {largest:.2g} and {widest:.2g}.",
                code=ErrorCode.POLICY_VIOLATED,
            )
