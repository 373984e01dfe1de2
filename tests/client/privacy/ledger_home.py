"""A site's folder with keys and a ledger, to be tampered with."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import FILE, PrivacyLedger
from silotune.client.privacy.ledger_entries import (
    Charged,
)
from silotune.client.privacy.reply_store import ReplyStore
from silotune.client.records.record_ids import RecordSet
from silotune.common.errors import RefusalError

FACTS: dict[str, Any] = {
    "source": "rows.csv",
    "unit": "record",
    "contract": "1" * 64,
    "run": "r",
    "round": 1,
    "request": "2" * 64,
    "order": 3.5,
    "noise_multiplier": 1.25,
    "sampling_rate": 0.5,
    "steps": 3,
}


HASH = "ab" * 32


ALL_FACTS = {**FACTS, "attempt": 9, "record_set": HASH, "basis": "basis", "rows": 3}


def lineage_of(*numbers: int) -> RecordSet:
    found = b"".join(number.to_bytes(16, "big") for number in sorted(numbers))
    return RecordSet.of_bytes("basis", found, len(numbers))


def charge(ledger: PrivacyLedger, attempt: int, records: RecordSet, **facts: Any) -> Charged:
    with ledger.writing():
        return ledger.charge(records, attempt=attempt, **{**FACTS, **facts})


@dataclasses.dataclass
class Home:
    """A site's folder with keys and a ledger in it."""

    folder: Path

    @classmethod
    def begin(cls, folder: Path, charges: int = 3) -> Home:
        """Opened, `charges` charges on two sets of records, of which the first was released."""
        home = cls(folder)
        ledger = PrivacyLedger.create(home.state, Keys.create(home.keys), "north")
        for i in range(charges):
            paid = charge(ledger, i + 1, lineage_of(*range(5 - i % 2)))
            if i == 0:
                ReplyStore(ledger).release(paid, b"the reply")
        close(ledger)
        return home

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def file(self) -> Path:
        return self.state / FILE

    def open(self) -> PrivacyLedger:
        return PrivacyLedger.open(self.state, Keys.load(self.keys))

    @contextlib.contextmanager
    def tampering(self) -> Iterator[sqlite3.Connection]:
        """The database as somebody with a text book and no key writes to it."""
        database = sqlite3.connect(self.file, isolation_level=None)
        try:
            database.execute("PRAGMA synchronous = OFF")
            yield database
        finally:
            database.close()

    def rows(self) -> list[tuple[int, str, bytes]]:
        with self.tampering() as database:
            return database.execute("SELECT * FROM entries ORDER BY sequence").fetchall()

    def refuses(self) -> bool:
        """Whether opening is refused with E212; anything but that or success is an error."""
        try:
            close(self.open())
        except RefusalError as refusal:
            if refusal.code != "E212":
                raise
            return True
        return False


def close(ledger: PrivacyLedger) -> None:
    ledger._database.close()


def put(database: sqlite3.Connection, sequence: int, body: bytes, mac: bytes) -> None:
    database.execute(
        "UPDATE entries SET body = CAST(? AS TEXT), mac = ? WHERE sequence = ?",
        (body, mac, sequence),
    )
