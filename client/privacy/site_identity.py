"""Who a site is: its name, what it signs, and the keys by which it knows its records again."""

from __future__ import annotations

from silotune.client.privacy.keys import Keys
from silotune.common.protocol.messages import Receipt
from silotune.common.signing import verifies


class SiteIdentity:
    """A site's name with its keys.

    public: the key that a contract's roster names, hexadecimal; None if `in_roster` is false: the
    keys were made up for a simulation, and no roster can name them.
    """

    def __init__(self, name: str, keys: Keys, *, in_roster: bool = True) -> None:
        self.name, self._keys = name, keys
        self.public = keys.public if in_roster else None

    @property
    def fingerprint_key(self) -> bytes:
        """For client/records/record_ids.py."""
        return self._keys.derive("fingerprints")

    @property
    def pseudonyms_key(self) -> bytes:
        """For client/preparation/deidentify.py."""
        return self._keys.derive("pseudonyms")

    def sign(self, statement: bytes) -> bytes:
        """By the site's key. A statement begins with a line that says what it is."""
        return self._keys.signing.sign(statement)

    def receipt(self, sequence: int, head: str) -> Receipt:
        """A signed statement that the ledger's entry `sequence` has the digest `head`."""
        signed = self.sign(Receipt.statement(self.name, sequence, head))
        return Receipt(sequence=sequence, head=head, signature=signed.hex())

    def has_signed(self, receipt: Receipt) -> bool:
        """Whether a receipt is this site's."""
        statement = Receipt.statement(self.name, receipt.sequence, receipt.head)
        return verifies(self._keys.public, receipt.signature, statement)
