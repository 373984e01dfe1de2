"""The receipts that servers keep: a ledger that was rolled back does not have what they name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from silotune.client.privacy.ledger import PrivacyLedger
from silotune.common.errors import RefusalError
from silotune.common.protocol.messages import Receipt
from tests.client.privacy.ledger_home import (
    Home,
    charge,
    close,
    lineage_of,
)


def test_a_receipt_of_any_entry_is_known_again(home: Home) -> None:
    ledger = home.open()
    receipts = [ledger.receipt()]
    for attempt in range(4, 7):
        charge(ledger, attempt, lineage_of(*range(5)))
        receipts.append(ledger.receipt())
    assert [receipt.sequence for receipt in receipts] == [5, 6, 7, 8]
    for receipt in receipts:
        home.open().check_receipt(receipt)
        ledger.check_receipt(receipt)


def forged(ledger: PrivacyLedger, **changes: Any) -> Receipt:
    """A receipt with other content, rightly signed."""
    wanted = ledger.receipt().model_copy(update=changes)
    statement = Receipt.statement(ledger.identity.name, wanted.sequence, wanted.head)
    signature = ledger.identity.sign(statement).hex()
    return wanted.model_copy(update={"signature": signature})


def test_a_receipt_this_ledger_did_not_give_is_refused(home: Home, tmp_path: Path) -> None:
    ledger = home.open()
    right = ledger.receipt()
    flipped = f"{int(right.signature[:2], 16) ^ 1:02x}" + right.signature[2:]
    wrong = {
        "forged signature": right.model_copy(update={"signature": flipped}),
        "no signature": right.model_copy(update={"signature": "0" * 128}),
        "number only": right.model_copy(update={"sequence": 4}),
        "signed, the last MAC": forged(ledger, head=home.rows()[4][2].hex()),
        "signed, other head": forged(ledger, head="0" * 64),
        "signed, other number": forged(ledger, sequence=4),
        "signed, beyond the end": forged(ledger, sequence=6),
        "signed, far beyond": forged(ledger, sequence=10**18),
        "another site's": Home.begin(tmp_path / "other").open().receipt(),
    }
    ledger.check_receipt(forged(ledger))
    for what, receipt in wrong.items():
        foreign = what in ("forged signature", "no signature", "number only", "another site's")
        says = "did not sign" if foreign else "rolled back, copied or"
        with pytest.raises(RefusalError, match=says) as refusal:
            ledger.check_receipt(receipt)
        assert refusal.value.code == ("E503" if foreign else "E211"), what


def test_a_rolled_back_ledger_with_its_head_is_told_by_a_receipt(
    home: Home, tmp_path: Path
) -> None:
    shutil.copytree(home.folder, copy := tmp_path / "copy")
    ledger = home.open()
    charge(ledger, 9, lineage_of(*range(5)))
    receipt = ledger.receipt()
    close(ledger)
    shutil.rmtree(home.folder)
    copy.rename(home.folder)
    back = home.open()
    with pytest.raises(RefusalError) as refusal:
        back.check_receipt(receipt)
    assert refusal.value.code == "E211"
    # Spending again up to the same number does not make it the same ledger.
    charge(back, 10, lineage_of(*range(5)))
    with pytest.raises(RefusalError):
        back.check_receipt(receipt)


def test_a_receipt_that_another_process_gave_is_known(home: Home) -> None:
    one, other = home.open(), home.open()
    charge(one, 9, lineage_of(*range(5)))
    right = one.receipt()
    charge(one, 10, lineage_of(*range(5)))
    for wrong in (forged(one, head="0" * 64), forged(one, sequence=9)):
        with pytest.raises(RefusalError) as refusal:
            other.check_receipt(wrong)
        assert refusal.value.code == "E211"
    for receipt in (right, one.receipt()):
        other.check_receipt(receipt)
        home.open().check_receipt(receipt)
    assert other.entries == one.entries


def test_a_receipt_of_another_process_does_not_hide_a_forged_entry(home: Home) -> None:
    """Catching up verifies what it takes up."""
    one, other = home.open(), home.open()
    charge(one, 9, lineage_of(*range(5)))
    with home.tampering() as database:
        database.execute("UPDATE entries SET mac = zeroblob(32) WHERE sequence = 6")
    with pytest.raises(RefusalError) as refusal:
        other.check_receipt(one.receipt())
    assert refusal.value.code == "E212"
    assert len(other.entries) == 5
