"""The privacy ledger: what a site's records have spent over their lifetime, on disk before it is
spent.

Guarantees, each with a test in tests/client/privacy/test_ledger.py and tests/system/test_kills.py:
- An entry that `writing` has committed survives a crash of process or machine (SQLite, WAL,
  synchronous = FULL), and no two processes write at once (a file lock and BEGIN IMMEDIATE).
- Nothing that was written can be changed, taken out, put in or reordered without the key: each
  entry carries the SHA-256 of the one before and an HMAC-SHA256 over itself. Every entry is
  verified when it is read; a ledger that does not verify is refused as a whole (fail closed).
- A missing or shortened ledger is refused: the number and digest of the last entry are also kept
  beside the keys (`keys/head`), and by servers as signed receipts (`check_receipt`). Assumption: a
  thief of budget cannot put back ledger, keys and every server's receipts all at once.

The clock is written down for people to read; nothing is computed from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from silotune.client.privacy.keys import Keys, make_private_folder
from silotune.client.privacy.ledger_entries import (
    EXPORT,
    FIRST,
    Adopted,
    BasisLinks,
    Charged,
    Entry,
    Opened,
    Prepared,
    Released,
    RequestKey,
    Settled,
    chained,
    damaged,
    digest,
)
from silotune.client.privacy.site_identity import SiteIdentity
from silotune.client.privacy.stored_files import (
    FOLDER,
    LEAST_ROOM,
    StoredFiles,
    disk_full,
    free_bytes,
    storing,
)
from silotune.client.records.record_identity import Links, Origin
from silotune.client.records.record_ids import SIZE, Codes, RecordSet, basis_of
from silotune.common.errors import ErrorCode, RefusalError, counted
from silotune.common.protocol.messages import Receipt
from silotune.common.runtime.atomic_files import is_full

FILE = "ledger.sqlite"
BUSY_SECONDS = 30  # how long another program may hold the database
ROW_OVERHEAD = 1 << 10  # bytes of a row beside what it keeps of a file
NOTHING_SPENT = "Nothing was lost and nothing was spent by this request."
AnyEntry = TypeVar("AnyEntry", Opened, Adopted, Charged, Released, Prepared, Settled)


class PrivacyLedger:
    """The entries of one site, verified, in order: what its records have spent, over all runs.

    Use `create` once, then `open`.

    Attributes:
        entries: All entries.
        charges: Each charge, by contract, run, round and attempt.
        releases: What left the site, by the number of its charge.
        preparations: The files that `site prepare` made of others.
        settled: The sets of sites of masked sums, by the number of the charge.
        public: The site's public key; None for a ledger in memory without one.
    """

    def __init__(self, database: sqlite3.Connection, keys: Keys, folder: Path | None) -> None:
        self._database, self._keys, self._folder = database, keys, folder
        self._mac_key = keys.derive("ledger mac")
        self._lock = threading.RLock()
        self._macs: list[bytes] = []
        self._digests = [FIRST]  # one more than entries
        self._in_roster = True
        self.files = StoredFiles(folder)
        self._head = 0  # the entry that keys/head was seen to name
        self.entries: list[Entry] = []
        self.charges: dict[RequestKey, Charged] = {}
        self.releases: dict[int, Released] = {}
        self.preparations: list[Prepared] = []
        self.settled: dict[int, Settled] = {}  # by the charge's number

    @classmethod
    def create(cls, folder: Path, keys: Keys, site: str) -> Self:
        """Make a site's ledger.

        Args:
            folder: Where to; it must not have a ledger.
            keys: The site's keys, which no other ledger uses.
            site: The site's name.

        Returns:
            The ledger, with its first entry.

        Raises:
            RefusalError: If the folder has one or the keys belong to another.
        """
        make_private_folder(folder)
        path = folder / FILE
        if path.exists() or (keys.folder is not None and (keys.folder / "head").exists()):
            raise RefusalError(
                f"{folder} or its keys already belong to a ledger.", code=ErrorCode.LEDGER_DAMAGED
            )
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        make_private_folder(folder / FOLDER)
        return cls(_connect(path), keys, folder)._begin(site)

    @classmethod
    def in_memory(cls, site: str, keys: Keys | None = None) -> Self:
        """A ledger that ends with the process: for simulations on public data. keys: the site's, if
        a contract's roster names them."""
        database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        ledger = cls(database, keys or Keys.in_memory(), None)
        ledger._in_roster = keys is not None
        return ledger._begin(site)

    def _begin(self, site: str) -> Self:
        self._database.executescript(
            "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, body TEXT NOT NULL, "
            "mac BLOB NOT NULL) STRICT;"
            "CREATE TABLE record_sets (id TEXT PRIMARY KEY, columns TEXT NOT NULL, fingerprints "
            "BLOB NOT NULL, counts BLOB NOT NULL, codes BLOB NOT NULL) STRICT;"
            "CREATE TABLE links (digest TEXT PRIMARY KEY, content BLOB NOT NULL) STRICT;"
        )
        with self.writing():
            self.append(Opened, site=site, public=self._keys.public, owner=self._keys.owner.hex())
        return self

    @classmethod
    def open(cls, folder: Path, keys: Keys) -> Self:
        """Read and verify the whole ledger.

        Args:
            folder: Where it is.
            keys: The site's keys, with which it was made.

        Returns:
            The ledger.

        Raises:
            RefusalError: E212 if it is not whole.
        """
        ledger = cls(_connect(folder / FILE), keys, folder)
        with ledger._locked(NOTHING_SPENT):
            try:
                ledger._catch_up()
                ledger._check_head()
                ledger._check_lineages()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise _refusal(error, folder, NOTHING_SPENT) from None
        return ledger

    @property
    def folder(self) -> Path | None:
        """Where it is kept; None for one in memory."""
        return self._folder

    @property
    def identity(self) -> SiteIdentity:
        """The site whose ledger this is."""
        first = self.entries[0]
        assert isinstance(first, Opened)
        return SiteIdentity(first.site, self._keys, in_roster=self._in_roster)

    @property
    def order(self) -> float | None:
        """The Rényi order of every account here: fixed by the first charge with noise. A charge
        without has no finite epsilon at any order, and none is chosen for it."""
        noised = (charge for charge in self.charges.values() if charge.noise_multiplier > 0)
        return next((charge.order for charge in noised), None)

    @property
    def policy(self) -> Adopted | None:
        """The policy adopted last."""
        adopted = (entry for entry in reversed(self.entries) if isinstance(entry, Adopted))
        return next(adopted, None)

    @contextlib.contextmanager
    def writing(self, outcome: str = NOTHING_SPENT) -> Iterator[None]:
        """All or nothing: what is appended within is durable when this ends, or never was.

        Entries of other processes are there when it begins, and none comes between. outcome: what
        is true of the charge where nothing was appended, for the sentence of the refusal E216.
        """
        with self._lock, self._alone(), self._locked(outcome):
            before = len(self.entries)
            try:
                self._database.execute("BEGIN IMMEDIATE")
                self._catch_up()
                before = len(self.entries)
                yield
                self._database.execute("COMMIT")
            except BaseException as error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                self._forget_after(before)
                if isinstance(error, sqlite3.Error | UnicodeDecodeError):
                    raise _refusal(error, self._folder, outcome) from None
                raise
            if len(self.entries) > self._head:
                with storing(
                    self._folder,
                    f"The ledger's entries up to {len(self.entries)} stand, so what they charged "
                    "is spent; their number was not stored. Let the server ask again.",
                ):
                    self._keys.write_head(len(self.entries), self._digests[-1])
                self._head = len(self.entries)

    def append(self, kind: type[AnyEntry], **facts: Any) -> AnyEntry:
        """Write one entry, within `writing`; returns it. ValidationError if a fact is not valid."""
        assert self._database.in_transaction
        if (
            kind is Charged
            and (facts["contract"], facts["run"], facts["round"], facts["attempt"]) in self.charges
        ):
            raise RefusalError("This request was charged already.")
        entry = kind(
            sequence=len(self.entries) + 1,
            previous=self._digests[-1],
            at=round(time.time(), 3),
            **facts,
        )
        body = entry.model_dump_json()
        mac = self._mac(body)
        self._database.execute("INSERT INTO entries VALUES (?, ?, ?)", (entry.sequence, body, mac))
        self._remember(entry, body, mac)
        return entry

    def charge(self, record_set: RecordSet, **facts: Any) -> Charged:
        """Append a charge on the records of `record_set`, within `writing`, and keep their
        fingerprints. RefusalError if the request was charged before, E217 if there are too many."""
        assert self._database.in_transaction
        parts = (
            record_set.fingerprints.tobytes(),
            record_set.decodings.counts.tobytes(),
            record_set.decodings.codes.tobytes(),
        )
        self._check_size(record_set.columns.encode(), *parts)
        self._database.execute(
            "INSERT OR IGNORE INTO record_sets VALUES (?, ?, ?, ?, ?)",
            (record_set.id, record_set.columns, *parts),
        )
        facts |= {"record_set": record_set.id, "basis": record_set.basis, "rows": record_set.rows}
        return self.append(Charged, **facts)

    def record_sets(self) -> dict[str, Charged]:
        """Each set of records that was ever charged, by its first charge."""
        found: dict[str, Charged] = {}
        for charge in self.charges.values():
            found.setdefault(charge.record_set, charge)
        return found

    def record_set(self, charge: Charged) -> RecordSet:
        """The records of a charge; RefusalError E212 if the file does not have them."""
        row = self._row(
            "SELECT columns, fingerprints, counts, codes FROM record_sets WHERE id = ?",
            charge.record_set,
        )
        if row is not None and isinstance(row[0], str) and _are_blobs(row[1:], (SIZE, 4, 8)):
            found = RecordSet.of_bytes(charge.basis, row[1], charge.rows, *(row[0], *row[2:]))
            named = not found.columns or basis_of(found.columns) == charge.basis
            if found.id == charge.record_set and named:
                return found
        raise damaged(f"the fingerprints of entry {charge.sequence} are not those it names")

    def link(self, origin: Origin, *, source: str, rows: int) -> Prepared:
        """Note, durably, which rows `rows` prepared ones were made of
        (client/records/record_identity.py).

        Args:
            origin: what they were made of.
            source: what the raw records are called, for people.

        Raises:
            RefusalError: E217, there are too many of them; others as `writing`.
        """
        with self.writing():
            made = [
                BasisLinks(basis=basis, links=self._store(found.content()))
                for basis, found in origin.links.items()
            ]
            return self.append(
                Prepared,
                source=source,
                rows=rows,
                columns=origin.columns,
                changed=origin.changed,
                made=tuple(made),
                cells=self._store(origin.cells.astype("<u8").tobytes()),
            )

    def _store(self, content: bytes) -> str:
        """Keep what a preparation names by its digest, within `writing`."""
        name = hashlib.sha256(content).hexdigest()
        self._check_size(content)
        self._database.execute("INSERT OR IGNORE INTO links VALUES (?, ?)", (name, content))
        return name

    def _check_size(self, *parts: bytes) -> None:
        """RefusalError E217 if SQLite cannot hold these in one row."""
        largest = self._database.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
        if sum(map(len, parts)) > largest - ROW_OVERHEAD:
            raise RefusalError(
                f"The file that [data] of site.toml names has too many rows: the ledger can store "
                f"at most {largest:,} bytes about one file; nothing was written. Split the file "
                "into parts of fewer rows, and prepare and use each part by itself.",
                code=ErrorCode.TOO_MANY_ROWS,
            )

    def links(self, basis: str) -> list[Links]:
        """Those of every preparation between rows known by `basis`. RefusalError E212 if the file
        does not have them."""
        return [
            Links.of_content(self._stored(entry, entry.bases[basis]))
            for entry in self.preparations
            if basis in entry.bases
        ]

    def changed_cells(self, entry: Prepared) -> Codes | None:
        """The cells that a preparation changed, before and after; None if it did not note them.
        RefusalError E212 if the file does not have them."""
        if entry.cells is None:
            return None
        return np.frombuffer(self._stored(entry, entry.cells), "<u8").astype(np.uint64)

    def _row(self, query: str, name: str) -> tuple[Any, ...] | None:
        with self._lock:
            try:
                found: tuple[Any, ...] | None = self._database.execute(query, (name,)).fetchone()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise _refusal(error, self._folder, NOTHING_SPENT) from None
        return found

    def _stored(self, entry: Prepared, name: str) -> bytes:
        row = self._row("SELECT content FROM links WHERE digest = ?", name)
        if (
            row is not None
            and isinstance(row[0], bytes)
            and (hashlib.sha256(row[0]).hexdigest() == name)
        ):
            return row[0]
        raise damaged(f"the links of entry {entry.sequence} are not those it names")

    def receipt(self) -> Receipt:
        """Where this ledger stands now, signed, for a server to keep."""
        with self._lock:
            sequence, head = len(self.entries), self._digests[-1]
        return self.identity.receipt(sequence, head)

    def check_receipt(self, receipt: Receipt) -> None:
        """RefusalError unless this site signed it (E503) and has the entry it names (E211)."""
        if not self.identity.has_signed(receipt):
            raise RefusalError(
                "The server showed a receipt that this site's key did not sign. The ledger is not "
                "in question: ask the operator, or tell why the site has new keys.",
                code=ErrorCode.MESSAGE_MISMATCH,
            )
        with self._lock:
            if receipt.sequence > len(self.entries):
                with self.writing():  # another process may have given it
                    pass
            digests = self._digests[receipt.sequence : receipt.sequence + 1]
        if digests != [receipt.head]:
            entries = counted(len(self.entries), "entry", "entries")
            raise RefusalError(
                f"The server holds a receipt for entry {receipt.sequence} that this ledger "
                f"({entries}) did not give: it was rolled back, copied or replaced. "
                "Restore the newest ledger and head; what it lacks cannot be spent again.",
                code=ErrorCode.LEDGER_ROLLED_BACK,
            )

    def export(self) -> Iterator[str]:
        """The entries as lines of JSON, the last one a receipt: `verify_export` reads them."""
        yield json.dumps({"silotune": EXPORT, "public": self._keys.public})
        with self._lock:
            rows = self._database.execute(
                "SELECT body, mac FROM entries WHERE sequence <= ? ORDER BY sequence",
                (len(self.entries),),
            ).fetchall()
            receipt = self.receipt()
        for body, mac in rows:
            yield json.dumps({"body": body, "mac": mac.hex()})
        yield receipt.model_dump_json()

    def _catch_up(self) -> None:
        """Verify and take up what other processes wrote; fail closed if what was read is gone."""
        known = len(self._macs)
        rows = self._database.execute(
            "SELECT sequence, body, mac FROM entries WHERE sequence >= ? ORDER BY sequence",
            (max(known, 1),),
        ).fetchall()
        if known:
            if not rows or rows[0][0] != known or rows[0][2] != self._macs[-1]:
                raise damaged(f"entry {known} is gone")
            rows = rows[1:]
        for number, (sequence, body, mac) in enumerate(rows, known + 1):
            if sequence != number or not isinstance(body, str) or not isinstance(mac, bytes):
                raise damaged(f"entry {number} is not in its place")
            if not hmac.compare_digest(self._mac(body), mac):
                raise damaged(f"entry {number} does not carry this site's MAC")
            self._remember(chained(body, len(self.entries), self._digests[-1]), body, mac)

    def _check_head(self) -> None:
        number, head = self._keys.read_head()
        self._head = number
        if self._digests[number : number + 1] != [head]:
            raise damaged(f"it ends before entry {number}, or is not the ledger of these keys")
        first = self.entries[0]
        if (
            not isinstance(first, Opened)
            or first.owner != self._keys.owner.hex()
            or first.public != self._keys.public
        ):
            raise damaged("it was opened by another owner or with other keys")

    def _check_lineages(self) -> None:
        for entry in self.record_sets().values():
            self.record_set(entry)
        for prepared in self.preparations:
            for name in prepared.bases.values():
                Links.of_content(self._stored(prepared, name))
            self.changed_cells(prepared)

    def _remember(self, entry: Entry, body: str, mac: bytes) -> None:
        self.entries.append(entry)
        self._macs.append(mac)
        self._digests.append(digest(body, mac))
        if isinstance(entry, Charged):
            self.charges[entry.key] = entry
        elif isinstance(entry, Released):
            self.releases[entry.charge] = entry
        elif isinstance(entry, Prepared):
            self.preparations.append(entry)
        elif isinstance(entry, Settled):
            self.settled[entry.charge] = entry

    def _forget_after(self, number: int) -> None:
        for entry in self.entries[number:]:
            if isinstance(entry, Charged):
                self.charges.pop(entry.key, None)
            elif isinstance(entry, Released):
                self.releases.pop(entry.charge, None)
            elif isinstance(entry, Prepared):
                self.preparations.remove(entry)
            elif isinstance(entry, Settled):
                self.settled.pop(entry.charge, None)
        del self.entries[number:], self._macs[number:], self._digests[number + 1 :]

    def _mac(self, body: str) -> bytes:
        return hmac.digest(self._mac_key, body.encode(), "sha256")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._database.in_transaction:  # the file lock would wait for itself
            raise RuntimeError("the ledger is being written by this thread already")
        yield

    @contextlib.contextmanager
    def _locked(self, outcome: str) -> Iterator[None]:
        """Between processes; the kernel frees it when its holder dies."""
        if self._folder is None:
            yield
            return
        try:
            descriptor = os.open(self._folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            if is_full(error):
                raise disk_full(self._folder, outcome) from None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _are_blobs(cells: Sequence[object], sizes: Sequence[int]) -> bool:
    """Whether each cell is bytes, of a whole number of items of its size."""
    return all(
        isinstance(cell, bytes) and len(cell) % size == 0
        for cell, size in zip(cells, sizes, strict=True)
    )


def _connect(path: Path) -> sqlite3.Connection:
    try:
        database = sqlite3.connect(
            path.resolve().as_uri() + "?mode=rw",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=BUSY_SECONDS,
        )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise _refusal(error, path.parent, NOTHING_SPENT, f"{path} cannot be opened ") from None
    return database


def _refusal(
    error: sqlite3.Error | UnicodeDecodeError, folder: Path | None, outcome: str, what: str = ""
) -> RefusalError:
    """What an error of the database means: no room, in use, an unreadable disk (E216), or damage
    (E212). outcome: what is true of the charge, as this was not committed."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _has_no_room(folder)):
        return disk_full(folder, outcome)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RefusalError(
            f"Another program has held the ledger in {folder} for {BUSY_SECONDS} seconds. "
            f"{outcome} Close that program (a database browser, a backup), then try again.",
            code=ErrorCode.LEDGER_UNAVAILABLE,
        )
    if code == sqlite3.SQLITE_IOERR:
        return RefusalError(
            f"The disk that holds the ledger in {folder} reports a failure to read or write. "
            f"{outcome} Look at the system's log and check the disk, then try again.",
            code=ErrorCode.LEDGER_UNAVAILABLE,
        )
    return damaged(f"{what}({type(error).__name__})" if what else type(error).__name__)


def _has_no_room(folder: Path | None) -> bool:
    return folder is not None and free_bytes(folder) < LEAST_ROOM
