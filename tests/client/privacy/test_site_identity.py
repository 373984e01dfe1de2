"""Who a site is: what it signs is told from what others sign, and each key has one purpose."""

from __future__ import annotations

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.site_identity import SiteIdentity
from silotune.common.signing import verifies

KEYS = Keys.in_memory(bytes(range(32)))


def test_keys_of_a_simulation_are_in_no_roster() -> None:
    assert SiteIdentity("north", KEYS).public == KEYS.public
    assert SiteIdentity("north", KEYS, in_roster=False).public is None
    assert PrivacyLedger.in_memory("north").identity.public is None
    assert PrivacyLedger.in_memory("north", KEYS).identity.public == KEYS.public


def test_a_statement_is_signed_by_the_key_of_the_roster() -> None:
    signature = SiteIdentity("north", KEYS).sign(b"statement").hex()
    assert verifies(KEYS.public, signature, b"statement")
    assert not verifies(KEYS.public, signature, b"another")


def test_a_receipt_is_of_one_site_and_one_entry() -> None:
    receipt = SiteIdentity("north", KEYS).receipt(5, "ab" * 32)
    assert (receipt.sequence, receipt.head) == (5, "ab" * 32)
    assert SiteIdentity("north", KEYS).has_signed(receipt)
    assert not SiteIdentity("south", KEYS).has_signed(receipt)
    assert not SiteIdentity("north", Keys.in_memory()).has_signed(receipt)
    for change in ({"sequence": 6}, {"head": "cd" * 32}):
        assert not SiteIdentity("north", KEYS).has_signed(receipt.model_copy(update=change))


def test_each_purpose_has_a_key_of_its_own() -> None:
    one, again = SiteIdentity("north", KEYS), SiteIdentity("south", KEYS)
    assert one.fingerprint_key == again.fingerprint_key == KEYS.derive("fingerprints")
    assert one.pseudonyms_key == again.pseudonyms_key == KEYS.derive("pseudonyms")
    assert len({one.fingerprint_key, one.pseudonyms_key, KEYS.derive("ledger mac")}) == 3
