"""The replies that charges paid for: durable before they leave, the same bytes ever after."""

from __future__ import annotations

import errno
import hashlib
import sqlite3
from pathlib import Path

import pytest

from silotune.client.privacy import ledger as ledgers
from silotune.client.privacy import stored_files
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.reply_store import ReplyStore
from silotune.common.errors import RefusalError
from tests.client.privacy.ledger_home import (
    Home,
    charge,
    close,
    lineage_of,
)


def test_a_charge_has_one_reply(home: Home) -> None:
    ledger = home.open()
    before = len(ledger.entries)
    with pytest.raises(RefusalError, match="has its reply already") as refusal:
        ReplyStore(ledger).release(ledger.charges["1" * 64, "r", 1, 1], b"another reply")
    assert refusal.value.code == "E204"
    assert len(ledger.entries) == before


@pytest.mark.parametrize("how", ["edited", "removed"])
def test_a_reply_that_is_not_the_one_released_does_not_leave(home: Home, how: str) -> None:
    ledger = home.open()
    released = ledger.releases[2]
    file = home.state / "replies" / released.reply
    file.unlink()
    if how == "edited":
        file.write_bytes(b"the reply!")
    with pytest.raises(RefusalError, match="not on disk any more") as refusal:
        ReplyStore(ledger).reply(released)
    assert refusal.value.code == "E204"


def test_a_reply_that_cannot_be_stored_leaves_the_charge(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so: it is spent."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ledger = home.open()
    made = charge(ledger, 20, lineage_of(1))
    monkeypatch.setattr(stored_files, "write_durably", full)
    with pytest.raises(RefusalError, match=rf"Entry {made.sequence} of the ledger stands") as no:
        ReplyStore(ledger).release(made, b"reply")
    assert no.value.code == "E216"
    assert "what it charged is spent" in str(no.value)
    assert made.sequence not in ledger.releases
    monkeypatch.undo()
    ReplyStore(ledger).release(made, b"reply")
    close(ledger)


@pytest.mark.parametrize("fault", ["no room", "in use"])
def test_a_release_that_the_database_does_not_take_leaves_the_charge(
    home: Home, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The disk fills up, or another program locks the ledger, while the round is computed: the
    sentence must not say that nothing was spent."""
    monkeypatch.setattr(ledgers, "BUSY_SECONDS", 0.1)
    ledger = home.open()
    made = [charge(ledger, 20 + number, lineage_of(1)) for number in range(40)]  # some pages
    other = sqlite3.connect(home.file, isolation_level=None)
    if fault == "in use":
        other.execute("BEGIN IMMEDIATE")
    else:
        (pages,) = ledger._database.execute("PRAGMA page_count").fetchone()
        ledger._database.execute(f"PRAGMA max_page_count = {pages}")

    def release_all() -> None:
        for one in made:
            ReplyStore(ledger).release(one, b"reply")

    with pytest.raises(RefusalError, match="of the ledger stands, so what it charged") as no:
        release_all()
    lost = next(one for one in made if one.sequence not in ledger.releases)
    assert no.value.code == "E216"
    assert f"Entry {lost.sequence} of the ledger stands" in str(no.value)
    assert "nothing was spent" not in str(no.value)
    other.close()
    close(ledger)
    again = home.open()
    ReplyStore(again).release(lost, b"reply")
    close(again)


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_stayed_at_the_site_is_that_of_the_latest_released_round(
    tmp_path: Path, on_disk: bool
) -> None:
    keys = Keys.create(tmp_path / "keys")
    ledger = (
        PrivacyLedger.create(tmp_path / "state", keys, "north")
        if on_disk
        else PrivacyLedger.in_memory("north", keys)
    )
    charges = [charge(ledger, 1, lineage_of(1, 2), round=number) for number in (1, 2, 3)]
    assert ReplyStore(ledger).local_state(charges) is None
    for paid, own in zip(charges, (b"first", b"second", None), strict=True):
        ReplyStore(ledger).release(paid, b"the reply", own)
    assert ReplyStore(ledger).local_state(charges) == b"second"
    assert ReplyStore(ledger).local_state(charges[:1]) == b"first"
    if on_disk:
        (tmp_path / "state" / "replies" / hashlib.sha256(b"second").hexdigest()).unlink()
        with pytest.raises(RefusalError, match="is not on disk any more") as refusal:
            ReplyStore(ledger).local_state(charges)
        assert refusal.value.code == "E212"
    close(ledger)
