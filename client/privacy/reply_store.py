"""The replies that charges paid for, and what stayed at the site with them.

Both are files beside the ledger (client/privacy/stored_files.py). A reply may leave once it is
durable and an entry of the ledger says so; the same request then gets the same bytes again.
"""

from __future__ import annotations

from collections.abc import Iterable

from silotune.client.privacy.ledger import NOTHING_SPENT, PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged, Released, damaged
from silotune.client.privacy.stored_files import disk_full, storing
from silotune.common.errors import ErrorCode, RefusalError


class ReplyStore:
    """The replies of one site, by the entries of its ledger."""

    def __init__(self, ledger: PrivacyLedger) -> None:
        self._ledger, self._files = ledger, ledger.files

    def check_room(self, size: int) -> None:
        """RefusalError E216 unless the disk has room for replies of `size` bytes: asked before a
        charge, so that a full disk spends nothing."""
        if not self._files.has_room(size):
            raise disk_full(self._ledger.folder, NOTHING_SPENT)

    def release(self, charge: Charged, wire: bytes, own: bytes | None = None) -> None:
        """Make a reply, and what stays at the site, durable; then say that the reply may leave.
        Only then may it.

        Args:
            charge: what paid for the reply.
            wire: the reply.
            own: what stays (client/training/local_state.py).

        Raises:
            RefusalError: E204, the charge has its reply already; E216, the disk or the database
                does not take it, and the sentence says that the charge stands.
        """
        outcome = (
            f"Entry {charge.sequence} of the ledger stands, so what it charged is spent; its reply "
            "was not stored."
        )
        with storing(self._ledger.folder, outcome):
            name = self._files.store(wire)
            stayed = None if own is None else self._files.store(own)
        with self._ledger.writing(outcome):
            if charge.sequence in self._ledger.releases:
                raise RefusalError("This charge has its reply already.", code=ErrorCode.REPLY_LOST)
            self._ledger.append(Released, charge=charge.sequence, reply=name, local_state=stayed)

    def reply(self, released: Released) -> bytes:
        """The bytes that were released; RefusalError E204 if they are not there any more."""
        wire = self._files.read(released.reply)
        if wire is None:
            raise RefusalError(
                f"The reply of entry {released.sequence} is not on disk any more.",
                code=ErrorCode.REPLY_LOST,
            )
        return wire

    def local_state(self, charges: Iterable[Charged]) -> bytes | None:
        """What stayed at the site with the latest round of these that was released; None if there
        is none. RefusalError E212 if it is not there any more."""
        last = max(
            (c for c in charges if self._left(c)), default=None, key=lambda c: (c.round, c.sequence)
        )
        if last is None:
            return None
        found = self._files.read(self._left(last) or "")
        if found is None:
            raise damaged(f"what entry {last.sequence} left at the site is not on disk any more")
        return found

    def _left(self, charge: Charged) -> str | None:
        released = self._ledger.releases.get(charge.sequence)
        return None if released is None else released.local_state
