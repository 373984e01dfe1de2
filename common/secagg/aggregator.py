"""The server's side of secure aggregation: masked updates added, and their sum opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from silotune.common.secagg import fixed_point, shamir
from silotune.common.secagg.key_agreement import (
    Agreement,
    commitment,
    masking_key,
    public_bytes,
    refused,
)


class SecAggAggregator:
    """The server's side of one round: `add` masked updates of `size` elements, then `open`.

    asked: the digest of what it asked all members.
    """

    def __init__(
        self, agreement: Agreement, server_round: int, size: int, request_digest: bytes
    ) -> None:
        self.agreement, self.server_round, self.request_digest = (
            agreement,
            server_round,
            request_digest,
        )
        self._opened = False
        self.survivors: set[str] = set()
        self._total = fixed_point.Total(size)

    def add(self, name: str, masked: bytes) -> None:
        """ProtocolError if the site is no member, has answered, or sends another length."""
        if name not in self.agreement.members or name in self.survivors:
            raise refused("a masked update is of no member, or its second")
        self._total.add(masked)
        self.survivors.add(name)

    def open(
        self, reveals: Mapping[str, Mapping[str, bytes]], factor: float
    ) -> NDArray[np.float32]:
        """The sum of the survivors' values [size], from what at least t of them revealed.

        factor: ring.factor for a weight of 1. ProtocolError E504 if the shares are too few or not
        those of the published keys, E505 if the sum is not one that honest updates give.
        """
        if self._opened:
            raise refused("the sum was opened before")
        members = set(self.agreement.members)
        givers = [s for s in sorted(set(reveals) & self.survivors) if set(reveals[s]) == members]
        if len(givers) < self.agreement.terms.threshold:
            raise refused(
                f"{len(givers)} sites revealed their shares, {self.agreement.terms.threshold} must"
            )
        windows = self._windows(givers)
        masks: list[fixed_point.Mask] = []
        for name in self.agreement.members:
            opened = self._own if name in self.survivors else self._pairwise
            for chosen, weights in windows:
                try:
                    shares = [shamir.from_bytes(reveals[giver][name]) for giver in chosen]
                except ValueError:
                    continue
                secret = sum(w * s for w, s in zip(weights, shares, strict=True)) % shamir.PRIME
                if (found := opened(name, secret)) is not None:
                    masks += found
                    break
            else:
                raise refused(f"a site gave a share of {name} that does not fit the others")
        self._opened = True
        self._total.mask(masks)
        return self._total.values(factor)

    def _windows(self, givers: Sequence[str]) -> list[tuple[Sequence[str], list[int]]]:
        """Threshold-many givers and their weights, in as many ways as there are to leave out some
        that stand side by side: one that gives wrong shares, as long as others suffice."""
        threshold = self.agreement.terms.threshold
        ways = len(givers) if len(givers) > threshold else 1
        found = [[*givers[at:], *givers[:at]][:threshold] for at in range(ways)]
        return [
            (chosen, shamir.weights([self.agreement.place(name) for name in chosen]))
            for chosen in found
        ]

    def _own(self, name: str, seed: int) -> list[fixed_point.Mask] | None:
        agreement, place = self.agreement, self.agreement.terms.round_index(self.server_round)
        published = agreement.keys[name].commitments[place]
        if commitment(agreement.terms, name, self.server_round, seed) != published:
            return None
        return [(agreement.own_mask_key(seed, name, self.server_round), True)]

    def _pairwise(self, name: str, seed: int) -> list[fixed_point.Mask] | None:
        agreement, place = self.agreement, self.agreement.terms.round_index(self.server_round)
        secret = masking_key(agreement.terms, name, self.server_round, seed)
        if public_bytes(secret) != agreement.keys[name].masking[place]:
            return None
        # A survivor added the mask if its name is the smaller one, took it off otherwise.
        return [
            (
                agreement.mask_key(secret, name, peer, self.server_round, self.request_digest),
                peer < name,
            )
            for peer in sorted(self.survivors)
        ]
